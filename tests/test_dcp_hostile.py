"""Directories of torch.distributed.checkpoint made to do harm, or broken: refused, and nothing is run."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dcp_lab import Writer, bits, grid, save
from foreign_files import Attack, Call
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from deltakit.errors import FormatError, MissingFileError
from deltakit.formats import pickle_data, zip_directory
from deltakit.formats.checkpoint import Checkpoint


def refuse(folder: Path, message: str) -> None:
    """Opening the directory, or reading its tensors, gives one line of FormatError."""
    with pytest.raises(FormatError, match=message) as caught:
        read_all(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def read_all(folder: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name).tobytes() for name in checkpoint.names}


def written(folder: Path) -> Writer:
    """A directory with the matrix `w` in two chunks and the vector `v`, not finished."""
    writer = Writer(folder)
    writer.add("w", torch.arange(12.0).reshape(4, 3), grid((4, 3), [[2], []]))
    writer.add("v", torch.ones(5))
    return writer


# The pickles.


def attacked(trace: Path) -> dict[str, Any]:
    """Metadata that run a command in one place or another if they are unpickled."""
    attack = Attack(trace)
    return {
        "alone": attack,
        "as a tensor": Metadata({"w": attack}, None, {}),  # type: ignore[dict-item]
        "as a path": Metadata({}, {"w": attack}, {}),
        "as a place": Metadata({}, None, {MetadataIndex("w", (0,)): attack}),
        "as a setting": Metadata({}, None, {}, attack),  # type: ignore[arg-type]
        "by eval": Metadata({}, Call(eval, (f"open({str(trace)!r}, 'w')",)), {}),
        "by exec": Metadata({}, Call(builtins.exec, (f"open({str(trace)!r}, 'w')",)), {}),
        "by getattr": Metadata({}, Call(getattr, (os, "system")), {}),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("where", list(attacked(Path("trace"))))
def test_metadata_run_nothing(tmp_path: Path, where: str, protocol: int) -> None:
    trace = tmp_path / "trace"
    if where == "by getattr":
        content = {"by getattr": Metadata({}, Call(getattr, ("", "join")), {})}
    else:
        content = attacked(trace)
    pickled = pickle.dumps(content[where], protocol)
    folder = Writer(tmp_path / "saved").write(pickled)
    refuse(folder, r"asks for '[\w.]+', which deltakit does not run; nothing of it was run")
    assert not trace.exists()


def test_the_attack_would_run(tmp_path: Path) -> None:
    """The test above could fail: unpickled, the same bytes do run the command."""
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(attacked(trace)["as a path"]))
    assert trace.exists()


def item(tensor: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def repacked(archive: bytes, change: Callable[[str, bytes], bytes], method: int = 0) -> bytes:
    """The archive with the records that `change` makes of its own."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(stream, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return stream.getvalue()


def storing(folder: Path, archive: bytes, tensor: torch.Tensor | None = None) -> Path:
    """A directory whose only tensor (5 ones) is stored as `archive`."""
    writer = Writer(folder)
    writer.add("v", torch.ones(5) if tensor is None else tensor)
    writer.stored.clear()
    writer.place("v", (0,), archive, "__1_0.distcp")
    return writer.finish()


def test_stored_tensors_run_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    refuse(storing(tmp_path / "a", item(Attack(trace))), r"tensor 'v' at \[0\], data.pkl: asks for")
    hidden = item({"v": torch.ones(5), "w": Attack(trace)})
    refuse(storing(tmp_path / "b", hidden), "data.pkl: asks for")
    assert not trace.exists()


OPCODES = {
    "a memo slot far away": b"\x80\x04]r\xff\xff\xff\x7f.",
    "a string longer than all": b"\x80\x04X\xff\xff\xff\x7fabc.",
    "bytes longer than all": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    "a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "an enormous int": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "no end": b"\x80\x04]",
    "nothing": b"",
    "an empty stack": b"\x80\x04.",
    "a value too many": b"\x80\x04]].",
    "a mark left": b"\x80\x04(].",
    "behind the end": b"\x80\x04}.}.",
    "no memo": b"\x80\x04h\x07.",
    "a call of what was made": b"\x80\x04)R.",
    "a list as a key": b"\x80\x04}]Ns.",
    "a tuple as a key": b"\x80\x04})Ns.",
    "a state of a list": b"\x80\x04]}b.",
    "a name of numbers": b"\x80\x04K\x01K\x02\x93.",
    "a name out of nesting": b"\x80\x04" + b"(" * 50_000 + b"t" * 50_000 + b"N\x93.",
    "an extension": b"\x80\x04\x82\x01.",
    "text": b"hello",
}


@pytest.mark.parametrize("how", OPCODES)
def test_broken_pickles(tmp_path: Path, how: str) -> None:
    folder = Writer(tmp_path / "saved").write(OPCODES[how])
    tracemalloc.start()
    refuse(folder, r"no pickle, or a broken one|opcode 0x|no metadata of torch")
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_deep_nesting_is_read_and_let_go(tmp_path: Path) -> None:
    """Neither reading nor what follows recurses into values."""
    deep = b"\x80\x04" + b"(" * 100_000 + b"t" * 100_000 + b"."
    assert type(pickle_data.read(deep, "deep", [])) is tuple
    refuse(Writer(tmp_path / "saved").write(deep), r"no metadata of torch")


def test_shared_lists_are_not_read_again_and_again(tmp_path: Path) -> None:
    """A list of n chunks that n tensors share would be n * n chunks in a file of size n."""
    writer = written(tmp_path / "saved")
    shared = [ChunkStorageMetadata(torch.Size((0,)), torch.Size((0,)))] * 500
    for n in range(500):
        writer.add(f"t{n}", torch.ones(1))
        writer.tensors[f"t{n}"].chunks = shared
    folder = writer.finish()
    with pytest.raises(FormatError, match="has 500 chunks, of which 1 are stored"):
        Checkpoint(folder)


def test_truncated_metadata(tmp_path: Path) -> None:
    folder = written(tmp_path / "saved").finish()
    whole = (folder / ".metadata").read_bytes()
    for size in range(0, len(whole), 7):
        (folder / ".metadata").write_bytes(whole[:size])
        refuse(folder, r"no pickle, or a broken one")


def test_every_changed_byte_is_harmless(tmp_path: Path) -> None:
    """Whatever byte of the metadata is another: the same tensors, or FormatError, or a file that is
    not there; never anything else."""
    folder = written(tmp_path / "saved").finish()
    whole = (folder / ".metadata").read_bytes()
    outcomes = set()
    for at in range(0, len(whole), 5):
        for flip in (0x01, 0x80):
            changed = bytearray(whole)
            changed[at] ^= flip
            (folder / ".metadata").write_bytes(changed)
            try:
                read_all(folder)
                outcomes.add("read")
            except (FormatError, MissingFileError) as error:
                assert "\n" not in str(error)
                outcomes.add(type(error).__name__)
    assert outcomes == {"read", "FormatError", "MissingFileError"}


# What the metadata say.


def test_places_outside_of_the_folder(tmp_path: Path) -> None:
    for number, name in enumerate(
        ["../out", "a/b", "/etc/passwd", "a\\b", "C:x", "..", "", "a\0b"]
    ):
        writer = written(tmp_path / f"saved-{number}")
        next(iter(writer.stored.values())).relative_path = name
        refuse(writer.finish(), "no plain name of a file in the same folder")


def test_places_that_cannot_be(tmp_path: Path) -> None:
    def changed(name: str, change: Callable[[Any], None]) -> Path:
        writer = written(tmp_path / name)
        change(writer.stored[MetadataIndex("v", (0,))])
        return writer.finish()

    refuse(changed("far", lambda place: setattr(place, "offset", 10**6)), "the file is truncated")
    refuse(changed("long", lambda place: setattr(place, "length", 10**6)), "the file is truncated")
    refuse(changed("before", lambda place: setattr(place, "offset", -1)), "has no place")
    refuse(changed("text", lambda place: setattr(place, "length", "9")), "has no place")
    refuse(changed("short", lambda place: setattr(place, "length", 12)), "which are too few")
    refuse(changed("other", lambda place: setattr(place, "offset", 0)), r"no zip archive|expected")
    zstd = changed("packed", lambda place: setattr(place, "transform_descriptors", ["zstd"]))
    refuse(zstd, "through an extension of torch")
    with pytest.raises(MissingFileError, match="names gone, which is missing"):
        Checkpoint(changed("gone", lambda place: setattr(place, "relative_path", "gone")))


def test_a_chunk_that_is_stored_nowhere(tmp_path: Path) -> None:
    writer = written(tmp_path / "saved")
    del writer.stored[MetadataIndex("w", (2, 0))]
    refuse(writer.finish(), "tensor 'w' has 2 chunks, of which 1 are stored")
    writer.stored[MetadataIndex("w", (3, 0))] = writer.stored[MetadataIndex("w", (0, 0))]
    refuse(writer.finish(), r"tensor 'w': the chunk at \[2, 0\] is stored in no file")


def test_shapes_that_cannot_be(tmp_path: Path) -> None:
    huge = written(tmp_path / "huge")
    huge.tensors["v"].size = torch.Size((2**62, 4))
    refuse(huge.finish(), "'v': shape .* has too many elements")
    large = written(tmp_path / "large")
    large.tensors["v"].size = torch.Size((2**40,))
    large.tensors["v"].chunks[0].sizes = torch.Size((2**40,))
    refuse(large.finish(), r"chunk of float32 of shape \[1099511627776\] in \d+ bytes")
    other = written(tmp_path / "other")
    other.tensors["v"].properties.dtype = torch.complex64
    refuse(other.finish(), "'v' has dtype complex64, which deltakit cannot read")


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    folder = written(tmp_path / "saved").finish(planned={"w": ("m", "w"), "v": ("m", "w")})
    refuse(folder, r"holds two tensors under 'm\.w'")


def test_no_tensors_at_all(tmp_path: Path) -> None:
    refuse(save({"step": 3}, tmp_path / "saved"), "holds no tensors")


# What is stored.


@pytest.mark.parametrize("size", [0, 1, 100, 400, 700, -30])
def test_truncated_files(tmp_path: Path, size: int) -> None:
    folder = storing(tmp_path / "saved", item(torch.ones(5)))
    file = folder / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:size])
    refuse(folder, r"has \d+ bytes, and tensor 'v' needs \d+ from byte 0 on; the file is truncated")


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    folder = written(tmp_path / "saved").finish()
    checkpoint = Checkpoint(folder)
    checkpoint.read("w")
    os.truncate(folder / "__0_0.distcp", 100)
    with pytest.raises(FormatError, match=r"__0_0\.distcp became shorter while it was read"):
        checkpoint.read("w")


def test_a_file_of_another_checkpoint(tmp_path: Path) -> None:
    refuse(
        storing(tmp_path / "a", item(torch.ones(6))), r"is float32 of shape \[6\], expected .*\[5\]"
    )
    refuse(storing(tmp_path / "b", item(torch.ones(5).double())), "is float64 .*, expected float32")


def test_archives_that_torch_does_not_write(tmp_path: Path) -> None:
    archive = item(torch.ones(5))
    same = repacked(archive, lambda _, data: data)
    assert read_all(storing(tmp_path / "same", same)) == {"v": bits(torch.ones(5))}
    packed = repacked(archive, lambda _, data: data, zipfile.ZIP_DEFLATED)
    refuse(storing(tmp_path / "packed", packed), "is compressed or encrypted")
    behind = repacked(archive, lambda n, d: b"big" if n.endswith("byteorder") else d)
    refuse(storing(tmp_path / "big", behind), "big-endian")
    short = repacked(archive, lambda n, d: d[:-1] if n.endswith("data/0") else d)
    refuse(storing(tmp_path / "short", short), "lacks elements of its storage '0'")
    refuse(storing(tmp_path / "long", archive + b"x"), "no zip archive of torch.save, or a broken")
    refuse(storing(tmp_path / "none", b"x" * 500), "no zip archive of torch.save; save with Serial")
    refuse(
        storing(tmp_path / "end", archive[:900]), "no zip archive of torch.save, or a broken one"
    )
    old = io.BytesIO()
    torch.save(torch.ones(5), old, _use_new_zipfile_serialization=False)
    refuse(storing(tmp_path / "old", old.getvalue()), "no zip archive of torch.save; save with")
    other = save(
        {"v": torch.ones(5)},
        tmp_path / "other",
        serialization_format=SerializationFormat.SAFETENSORS,
    )
    refuse(other, "no zip archive of torch.save; save with SerializationFormat.TORCH_SAVE")


def test_tensors_that_are_not_plain(tmp_path: Path) -> None:
    for number, tensor in enumerate(
        [
            torch.ones(5).to_sparse(),
            torch.ones(5, device="meta"),
            [torch.ones(5)],
            "text",
        ]
    ):
        message = "asks for|does not describe a plain dense tensor|broken one"
        refuse(storing(tmp_path / str(number), item(tensor)), message)
    conjugate = torch.ones(5)._neg_view()
    refuse(storing(tmp_path / "negative", item(conjugate)), "conjugate or negative")


def test_every_changed_byte_of_an_archive_is_harmless(tmp_path: Path) -> None:
    archive = item(torch.ones(5))
    folder = storing(tmp_path / "saved", archive)
    outcomes = set()
    for at in range(0, len(archive), 3):
        changed = bytearray(archive)
        changed[at] ^= 0x41
        (folder / "__1_0.distcp").write_bytes(changed)
        try:
            read_all(folder)
            outcomes.add("read")
        except FormatError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_large_archives_have_wide_fields() -> None:
    """Offsets, sizes and counts as zip64 has them, in the record or at the end of the archive."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(stream, "w") as archive,
        archive.open("a/0", "w", force_zip64=True) as file,
    ):
        file.write(b"content")
    narrow = stream.getvalue()
    start = narrow.index(b"PK\1\2")
    wide = bytearray(narrow)
    extra = struct.pack("<2H3Q", 1, 24, 7, 7, 0)
    wide[start + 20 : start + 28] = b"\xff" * 8
    wide[start + 42 : start + 46] = b"\xff" * 4
    wide[start + 30 : start + 32] = struct.pack("<H", len(extra))
    end = narrow.index(b"PK\5\6")
    size = end - start + len(extra)
    entry = bytes(wide[start:end]) + extra
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
    last = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    made = bytes(wide[:start]) + entry + end64 + locator + last
    for each in (narrow, made):
        place = zip_directory.read(each, "archive")["a/0"]
        assert each[place.offset : place.offset + place.size] == b"content"


# Directories that are not whole.


def test_a_save_that_did_not_end(tmp_path: Path) -> None:
    folder = written(tmp_path / "saved").folder
    with pytest.raises(MissingFileError, match=r"holds __0_0.distcp but no \.metadata"):
        Checkpoint(folder)


def test_shards_in_safetensors_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for rank in (1, 2):
        save_file(
            {"w": torch.ones(2)}, tmp_path / f"shard-0000{rank}-model-00001-of-00001.safetensors"
        )
    with pytest.raises(FormatError, match="HuggingFaceStorageWriter of torch writes them; consol"):
        Checkpoint(tmp_path)
