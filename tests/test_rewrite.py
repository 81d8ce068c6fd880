"""Laws of streaming into a new file: the bytes asked for, by either way of copying."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from deltakit.errors import FormatError
from deltakit.formats import rewrite
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.rewrite import Copied, Part, arranged, header, write


def make_parts(source: Path) -> list[Part]:
    """Ranges of `source`, neighbouring and not, with bytes of our own between them."""
    own = memoryview(np.arange(6, dtype=np.uint8))
    return [
        Part("a", "U8", (5,), 5, lambda: [Copied(source, 10, 2), Copied(source, 12, 3)]),
        Part("b", "I32", (2, 2), 16, lambda: [Copied(source, 15, 10), own]),
        Part("c", "F16", (0,), 0, list),
        Part("d", "U16", (1500000,), 3000000, lambda: [Copied(source, 0, 3000000)]),
    ]


@pytest.mark.parametrize("in_system", [True, False])
def test_pieces_become_a_safetensors_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_system: bool
) -> None:
    """Systems without copy_file_range get the same bytes."""
    if not in_system:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    data = np.random.default_rng(50).bytes(3_000_000)
    source = tmp_path / "source"
    source.write_bytes(data)
    parts = arranged(make_parts(source))
    assert [part.name for part in parts] == ["b", "c", "d", "a"]
    head = header(parts, {"format": "pt"})
    seen: list[int] = []
    out = tmp_path / "out.safetensors"
    write(out, head, parts, seen.append)
    assert out.read_bytes() == head + data[15:25] + bytes(range(6)) + data + data[10:15]
    assert sum(seen) == out.stat().st_size
    assert {n: i.shape for n, i in Checkpoint(out).tensors.items()} == {
        p.name: p.shape for p in parts
    }


@pytest.mark.parametrize("advice", ["taken", "refused", "unknown"])
def test_what_is_written_is_sent_to_the_disk_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, advice: str
) -> None:
    """Once each, when it is written, and no later than the size of two pieces; the bytes are the
    same where the system does not know the advice or does not take it."""
    sent: list[tuple[int, int]] = []
    out = tmp_path / "out"

    def advise(handle: int, offset: int, size: int, what: int) -> None:
        assert what == 4 and os.fstat(handle).st_size == offset + size
        sent.append((offset, size))
        if advice == "refused":
            raise OSError("not on this file system")

    monkeypatch.setattr(rewrite, "_WRITEBACK", 1000)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    if advice == "unknown":
        monkeypatch.delattr(os, "posix_fadvise")
    source = tmp_path / "source"
    source.write_bytes(np.random.default_rng(51).bytes(9000))
    data = source.read_bytes()
    own = [memoryview(data)[at : at + 300] for at in range(0, 9000, 300)]
    parts = [
        Part("a", "U8", (9000,), 9000, lambda: own),
        Part("b", "U8", (9000,), 9000, lambda: [Copied(source, 0, 9000)]),
    ]
    write(out, b"head", parts, lambda size: None)
    assert out.read_bytes() == b"head" + data + data
    if advice == "unknown":
        assert not sent
        return
    ends = [offset + size for offset, size in sent]
    assert [offset for offset, _ in sent] == [0, *ends[:-1]]
    assert ends[0] == 4 + 4 * 300 and ends[-1] > 18_004 - 1000


def test_a_part_must_be_as_long_as_it_says(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"0123456789")
    part = Part("a", "U8", (4,), 4, lambda: [Copied(source, 0, 3)])
    with pytest.raises(FormatError, match="tensor 'a' came out with 3 bytes, expected 4"):
        write(tmp_path / "out", b"", [part], lambda size: None)


@pytest.mark.parametrize("in_system", [True, False])
def test_a_source_that_was_cut_meanwhile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_system: bool
) -> None:
    if not in_system:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    source = tmp_path / "source"
    source.write_bytes(b"0123456789")
    part = Part("a", "U8", (40,), 40, lambda: [Copied(source, 0, 40)])
    with pytest.raises(FormatError, match=r"source became shorter while it was read"):
        write(tmp_path / "out", b"", [part], lambda size: None)
