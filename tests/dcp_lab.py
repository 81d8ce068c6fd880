"""Directories of torch.distributed.checkpoint for tests: saved by torch itself, or chunk by chunk with
torch's own classes and torch.save."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

GOLDEN = Path(__file__).parent / "dcp" / "torch-2.13"
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def save(state: Mapping[str, Any], folder: Path, **options: Any) -> Path:
    """`torch.distributed.checkpoint.save` of one process; options: of FileSystemWriter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(dict(state), storage_writer=FileSystemWriter(folder, **options), no_dist=True)
    return folder


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's elements, row-major, as they are in memory."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def every_dtype() -> dict[str, torch.Tensor]:
    """A small tensor of each dtype that checkpoints hold, with NaNs and signed zeros."""
    made = {}
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        values = torch.tensor([0.0, -0.0, 1.5, -2.25, float("nan"), 448.0])
        made[name] = values.reshape(2, 3).to(getattr(torch, name))
    for name in ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"):
        made[name] = torch.arange(12).reshape(3, 4).to(getattr(torch, name))
    return made


class Writer:
    """A directory made chunk by chunk, of which tests may change any part before it is written."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.stored: dict[MetadataIndex, _StorageInfo] = {}

    def add(
        self,
        name: str,
        tensor: torch.Tensor,
        boxes: Iterable[Box] | None = None,
        *,
        files: int = 1,
        laid_out: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    ) -> None:
        """Store the boxes of a tensor (all of it without), in turns in `files` files; laid_out: what
        gives a chunk its strides."""
        boxes = [((0,) * tensor.dim(), tuple(tensor.shape))] if boxes is None else list(boxes)
        told = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, [])
        for number, (offsets, sizes) in enumerate(boxes):
            part = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
            stream = io.BytesIO()
            torch.save(laid_out(part), stream)
            self.place(name, offsets, stream.getvalue(), f"__{number % files}_0.distcp")
            told.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        self.tensors[name] = told

    def place(self, name: str, offsets: Sequence[int], item: bytes, file: str) -> None:
        """Append an item to a file, as what is stored of a tensor at `offsets`."""
        path = self.folder / file
        start = path.stat().st_size if path.exists() else 0
        with path.open("ab") as stream:
            stream.write(item)
        self.stored[MetadataIndex(name, offsets)] = _StorageInfo(file, start, len(item))

    def finish(self, planned: Any = None) -> Path:
        """Write the metadata; planned: name -> keys, those of the names where there are none."""
        planned = {name: (name,) for name in self.tensors} if planned is None else planned
        told = Metadata(dict(self.tensors), planned, self.stored, StorageMeta("here"), "1.0.0")
        return self.write(pickle.dumps(told))

    def write(self, pickled: bytes) -> Path:
        """Take these bytes for the metadata."""
        (self.folder / ".metadata").write_bytes(pickled)
        return self.folder


def grid(shape: Sequence[int], cuts: Sequence[Sequence[int]]) -> list[Box]:
    """The boxes that cuts of each dimension make of a tensor; empty ones too."""
    boxes: list[Box] = [((), ())]
    for size, inner in zip(shape, cuts, strict=True):
        bounds = [0, *sorted(inner), size]
        sides = list(pairwise(bounds))
        boxes = [
            ((*offsets, low), (*sizes, high - low))
            for offsets, sizes in boxes
            for low, high in sides
        ]
    return boxes
