"""Tensors in chunks of any grid are read as if they were whole; what is no grid is refused."""

from __future__ import annotations

import tempfile
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dcp_lab import Box, Writer, bits, grid
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakit.errors import FormatError
from deltakit.formats import rewrite
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.chunk_grid import MAX_CELLS, ChunkGrid, flat_boxes
from deltakit.formats.rewrite import Copied, Part, Piece


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[Box]]:
    """A tensor of 0 to 4 dimensions and boxes that make it up, in any order, some of them empty."""
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    cuts = [draw(st.lists(st.integers(0, size), max_size=2)) for size in shape]
    tensor = torch.arange(prod(shape), dtype=torch.int32).reshape(shape)
    dtype = draw(st.sampled_from([torch.int32, torch.bfloat16, torch.float64, torch.uint8]))
    boxes = {box[0]: box for box in grid(shape, cuts) if 0 in box[1]}
    boxes |= {box[0]: box for box in grid(shape, cuts) if 0 not in box[1]}  # one at each place
    return tensor.to(dtype), draw(st.permutations(list(boxes.values())))


def reversed_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements, the first dimension being the one whose elements stand together."""
    axes = tuple(range(tensor.dim()))[::-1]
    return tensor.permute(axes).contiguous().permute(axes)


def content(pieces: list[Piece]) -> bytes:
    """The bytes that a merge writes of these pieces."""
    found = b""
    for piece in pieces:
        if isinstance(piece, Copied):
            with piece.file.open("rb") as file:
                file.seek(piece.offset)
                found += file.read(piece.nbytes)
        else:
            found += piece.tobytes()
    return found


@settings(max_examples=60)
@given(cut=cut_tensors(), turned=st.booleans(), data=st.data())
def test_any_grid_is_read_as_the_whole(
    cut: tuple[torch.Tensor, list[Box]], turned: bool, data: Any
) -> None:
    tensor, boxes = cut
    laid_out = reversed_strides if turned else torch.clone
    with tempfile.TemporaryDirectory() as place:
        writer = Writer(Path(place) / "saved")
        writer.add("w", tensor, boxes, files=2, laid_out=laid_out)
        checkpoint = Checkpoint(writer.finish())
        (shard,) = checkpoint.shards.values()
        info = checkpoint.info("w")
        expected = np.frombuffer(bits(tensor), info.kind.words)

        assert checkpoint.words("w").tobytes() == expected.tobytes()
        start = data.draw(st.integers(0, info.numel))
        stop = data.draw(st.integers(start, info.numel))
        assert (checkpoint.read("w", start, stop) == expected[start:stop]).all()
        chosen = st.lists(st.integers(0, max(0, info.numel - 1)), max_size=20 if info.numel else 0)
        indices = np.array(data.draw(chosen), np.int64)
        assert (checkpoint.gather("w", indices) == expected[indices]).all()
        assert content(list(shard.pieces("w"))) == expected.tobytes()
        assert content(list(shard.pieces("w", start, stop))) == expected[start:stop].tobytes()
        with shard.reader("w") as read:
            words = np.empty(stop - start, info.kind.words)
            read(start, words)
            assert (words == expected[start:stop]).all()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_a_flat_range_is_few_boxes(shape: list[int], data: Any) -> None:
    whole = np.arange(prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, whole.size))
    stop = data.draw(st.integers(start, whole.size))
    boxes = list(flat_boxes(tuple(shape), start, stop))
    assert len(boxes) <= 2 * len(shape) - 1
    parts = [
        whole[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].ravel()
        for low, high in boxes
    ]
    assert [int(i) for part in parts for i in part] == list(range(start, stop))


def test_rows_are_copied_by_the_system(tmp_path: Path) -> None:
    """What FSDP makes is never put together in memory, what is split by columns is."""
    tensor = torch.arange(60.0).reshape(10, 6)
    writer = Writer(tmp_path / "saved")
    writer.add("rows", tensor, grid((10, 6), [[3, 7], []]), files=3)
    writer.add("columns", tensor, grid((10, 6), [[], [2]]), files=2)
    (shard,) = Checkpoint(writer.finish()).shards.values()
    assert [type(p) for p in shard.pieces("rows")] == [Copied] * 3
    assert [type(p) for p in shard.pieces("columns")] == [memoryview]


BROKEN: dict[str, tuple[list[Box], str]] = {
    "overlapping": ([((0, 0), (3, 4)), ((2, 0), (2, 4))], r"chunk at \[2, 0\] overlaps another"),
    "missing": ([((0, 0), (2, 4)), ((3, 0), (1, 4))], r"no chunk holds its element at \[2, 0\]"),
    "a corner missing": ([((0, 0), (2, 4)), ((2, 0), (2, 3))], r"its element at \[2, 3\]"),
    "nothing": ([], r"no chunk holds its element at \[0, 0\]"),
    "outside": ([((0, 0), (4, 4)), ((4, 0), (1, 4))], r"\[1, 4\] at \[4, 0\] is not within"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_chunks_that_do_not_make_up_the_tensor(tmp_path: Path, how: str) -> None:
    boxes, message = BROKEN[how]
    writer = Writer(tmp_path / "saved")
    writer.add("w", torch.ones(5, 4), boxes)
    writer.tensors["w"].size = torch.Size((4, 4))
    writer.finish()
    with pytest.raises(FormatError, match=message) as caught:
        Checkpoint(writer.folder)
    assert "'w'" in str(caught.value)


def test_chunks_cut_too_irregularly_take_no_memory() -> None:
    count = 300
    assert count**3 > MAX_CELLS
    shape = (count, count, count)
    diagonal = [(n, n, n) for n in range(count)]
    with pytest.raises(ValueError, match="too irregularly"):
        ChunkGrid(shape, diagonal, [(1, 1, 1)] * count)


def test_many_files_need_few_handles(tmp_path: Path) -> None:
    """As many as systems allow by default would not do for the ranks of a large model."""
    resource = pytest.importorskip("resource")
    tensor = torch.arange(300.0).reshape(150, 2)
    writer = Writer(tmp_path / "saved")
    writer.add("w", tensor, grid((150, 2), [range(1, 150), []]), files=150)
    checkpoint = Checkpoint(writer.finish())
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (120, before[1]))
    try:
        for _ in range(2):
            assert checkpoint.read("w").tobytes() == bits(tensor)
            assert checkpoint.gather("w", np.arange(300)).tobytes() == bits(tensor)
        (shard,) = checkpoint.shards.values()
        part = Part("w", "F32", (150, 2), 1200, partial(shard.pieces, "w"))
        rewrite.write(tmp_path / "out", b"", [part], lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (tmp_path / "out").read_bytes() == bits(tensor)
