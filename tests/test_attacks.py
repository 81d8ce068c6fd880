"""Files made to deceive: always a typed error, in bounded memory, and never silent garbage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack_factory import forged, joined, refused, sealed, split
from golden_deltas import FOLDER, delta, golden

from deltakit.errors import ChecksumError, DeltakitError, FormatError
from deltakit.formats.header_json import digest
from deltakit.formats.sdelta import SdeltaFile, encode, load


def test_forging_nothing_gives_the_file_itself() -> None:
    """So that every refusal below is due to its own deceit."""
    for name in ("v1-rice", "v1-many", "v1-identity", "v1-extras", "v1-order"):
        outer = split(forged(name))[0]
        assert outer == split((FOLDER / f"{name}.sdelta").read_bytes())[0]
    content = (FOLDER / "v1-rice.sdelta").read_bytes()
    assert len(forged("v1-rice")) == len(content.replace(b" ", b""))


def test_files_cut_at_every_byte_are_refused(tmp_path: Path) -> None:
    data = (FOLDER / "v1-rice.sdelta").read_bytes()
    for length in range(len(data)):
        refused(data[:length], tmp_path)
    for more in (b"\0", b"{}", data):
        refused(data + more, tmp_path, "bytes that belong to no tensor")


def test_files_cut_at_every_boundary_are_refused(tmp_path: Path) -> None:
    for name in golden():
        data = (FOLDER / f"{name}.sdelta").read_bytes()
        outer = split(data)[0]
        body = 8 + int.from_bytes(data[:8], "little")
        ends = {body + at for entry in outer.values() for at in entry["data_offsets"]} | {8, body}
        for end in sorted(ends):
            for length in {end - 1, end, end + 1} & set(range(len(data))):
                refused(data[:length], tmp_path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("v1-many", [0x01]), ("v1-example", [0x20, 0xFF])],
)
def test_every_changed_byte_is_noticed(tmp_path: Path, name: str, changes: Any) -> None:
    """Or changes nothing: never other content."""
    data = (FOLDER / f"{name}.sdelta").read_bytes()
    content = golden()[name][0]
    path = tmp_path / "changed.sdelta"
    for at in range(len(data)):
        for change in changes:
            path.write_bytes(data[:at] + bytes([data[at] ^ change]) + data[at + 1 :])
            try:
                found = load(path)
            except DeltakitError:
                continue
            assert found.equals(content), f"byte {at} xor {change}"


def test_damage_is_reported_where_it_is(tmp_path: Path) -> None:
    data = bytearray((FOLDER / "v1-many.sdelta").read_bytes())
    data[-1] ^= 1
    refused(bytes(data), tmp_path, r"tensor 'b': sdelta\.order: 3 bytes differ", ChecksumError)
    data = bytearray((FOLDER / "v1-many.sdelta").read_bytes())
    data[data.index(b"BF16")] ^= 1
    refused(bytes(data), tmp_path, "the sdelta header differs from its digest", ChecksumError)


def rice(parameter: int, unary: str, remainders: str = "") -> bytes:
    bits = [text + "0" * (-len(text) % 8) for text in (unary, remainders)]
    return bytes([parameter]) + b"".join(
        int(text, 2).to_bytes(len(text) // 8, "big") for text in bits if text
    )


ONES = "1" * 31  # 31 entries, as in the golden files below
STREAMS: dict[str, tuple[str, dict[str, bytes], str]] = {
    "index out of range": ("v1-rice", {"indices": rice(0, "0" * 1000 + ONES)}, "beyond the last"),
    "last index out of range": (
        "v1-rice",
        {"indices": rice(0, "1" * 30 + "0" * 970 + "1")},
        "beyond",
    ),
    "too few indices": ("v1-rice", {"indices": rice(0, "1" * 30)}, "holds 30 entries, expected 31"),
    "too many indices": ("v1-rice", {"indices": rice(0, "1" * 32)}, "holds more than 31"),
    "bytes behind the indices": ("v1-rice", {"indices": rice(0, ONES) + b"\0"}, "goes on behind"),
    "parameter 255": ("v1-rice", {"indices": b"\xff" * 9}, "cannot hold 31 Rice"),
    "no unary stream": ("v1-rice", {"indices": rice(5, "", "1" * 155)}, "cannot hold 31 Rice"),
    "padding": ("v1-rice", {"indices": rice(1, ONES, "0" * 31 + "1")}, "padding bits"),
    "sums beyond int64": ("v1-rice", {"indices": rice(62, ONES, "1" * 62 * 31)}, "beyond the last"),
    "bitmap too short": ("v1-bitmap", {"indices": b"\xff\xe0"}, "takes 3 bytes, found 2"),
    "bitmap too full": ("v1-bitmap", {"indices": b"\xff\xff\xf0"}, "holds more than 11"),
    "bitmap padding": ("v1-bitmap", {"indices": b"\xff\xc0\x01"}, "padding bits of the bitmap"),
    "row out of range": ("v1-rows", {"indices": rice(0, "11" + "0" * 49 + "1")}, "beyond the last"),
    "column out of range": ("v1-columns", {"indices": rice(0, "1" + "0" * 60 + "1")}, "beyond"),
    "no runs": ("v1-runs", {"indices": bytes(8)}, "cannot form 0 runs"),
    "too many runs": ("v1-runs", {"indices": b"\xff" * 8}, "entries cannot form"),
    "runs too short": (
        "v1-runs",
        {"indices": (2).to_bytes(8, "little") + rice(0, "1111")},
        "runs hold 2",
    ),
    "runs out of range": (
        "v1-runs",
        {"indices": (1).to_bytes(8, "little") + rice(0, "1" + "0" * 5000 + "1")},
        "beyond the last",
    ),
    "NaN": (
        "v1-rice",
        {"values": np.full(31, np.nan, "<f4").tobytes()},
        "nan of entry 0 is not finite",
    ),
    "infinity": (
        "v1-values-bfloat16",
        {"values": b"\x00\x00" * 30 + b"\x80\xff"},
        "-inf of entry 30",
    ),
    "order of needless width": (
        "v1-order",
        {"order": bytes(39)},
        "written in 10 bits, its largest",
    ),
    "order padding": ("v1-order", {"order": b"\xff" * 39}, "order: the padding bits"),
}


@pytest.mark.parametrize("deceit", list(STREAMS))
def test_streams_that_break_the_rules_are_refused(tmp_path: Path, deceit: str) -> None:
    """Each with correct digests."""
    name, streams, message = STREAMS[deceit]
    refused(forged(name, streams=streams), tmp_path, message)


def test_a_bool_extra_holds_zeros_and_ones(tmp_path: Path) -> None:
    """Any other byte is a bool that equals neither true nor false."""
    outer, header, parts = split(encode(delta(extras={"mask": np.array([True])})))
    header["extras"]["mask"][2] = digest(b"\2")
    assert parts == {"mask": b"\1"}
    data = joined({"__metadata__": {"sdelta": sealed(json.dumps(header))}} | outer, b"\2")
    refused(data, tmp_path, "extra 'mask': a bool must be 0 or 1, found 2")


def test_inspecting_reads_the_header_alone(tmp_path: Path) -> None:
    """A file that lacks its body says so before anything is read of it."""
    data = (FOLDER / "v1-many.sdelta").read_bytes()
    path = tmp_path / "a.sdelta"
    path.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    with pytest.raises(FormatError, match="is truncated: its tensors take"):
        SdeltaFile(path)


def test_a_file_cut_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.sdelta"
    path.write_bytes(encode(delta(extras={"head": np.zeros(10**5)})))
    with SdeltaFile(path) as file:
        with path.open("r+b") as other:
            other.truncate(file.size - 1)
        with pytest.raises(FormatError, match="it was cut meanwhile"):
            file.extra("head")
