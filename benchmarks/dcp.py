"""Directories of torch.distributed.checkpoint beside the same weights in safetensors: diff and merge.

    python benchmarks/dcp.py [--megabytes 400] [--ranks 8] [--entries 1000000] [--rounds 3]
        [--chunks 50000] [--folder DIR]

The tuned side is a safetensors file, a directory that one process saved, and directories as ranks save
them that split every matrix by rows (FSDP) or by columns; rounds alternate, after one that does not
count, and files are in the system's cache. Opening is timed on metadata alone, of so many chunks.
"""

from __future__ import annotations

import argparse
import io
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import deltakit as dk
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.dcp_metadata import Metadata as ReadMetadata

SHAPE = (4096, 1024)  # 8.4 MB in bfloat16


def describe(tensors: Mapping[str, torch.Tensor], ranks: int, dim: int) -> Metadata:
    """Metadata of tensors split along `dim`, without places."""
    told = {}
    for name, tensor in tensors.items():
        chunks, at = [], [0] * tensor.dim()
        for part in tensor.chunk(ranks, dim):
            chunks.append(ChunkStorageMetadata(torch.Size(at), part.shape))
            at[dim] += part.shape[dim]
        told[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
    return Metadata(told, {name: (name,) for name in tensors}, {})


def write(folder: Path, tensors: Mapping[str, torch.Tensor], ranks: int, dim: int) -> Path:
    """Save tensors as `ranks` ranks would, each with its part of all of them in one file."""
    folder.mkdir()
    metadata = describe(tensors, ranks, dim)
    for rank in range(ranks):
        with (folder / f"__{rank}_0.distcp").open("wb") as file:
            for name, tensor in tensors.items():
                chunk = metadata.state_dict_metadata[name].chunks[rank]
                stream = io.BytesIO()
                torch.save(tensor.chunk(ranks, dim)[rank].clone(), stream)
                place = _StorageInfo(f"__{rank}_0.distcp", file.tell(), stream.tell())
                metadata.storage_data[MetadataIndex(name, chunk.offsets)] = place
                file.write(stream.getbuffer())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternating(rounds: int, ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each way."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            taken = seconds(work)
            found[name] += [taken] if number else []
    return {name: median(taken) for name, taken in found.items()}


def opening(folder: Path, chunks: int) -> tuple[float, int]:
    """Seconds to read metadata of about so many chunks, and the size of the file in bytes."""
    folder.mkdir()
    ranks = 64
    meta = torch.empty(SHAPE, device="meta", dtype=torch.bfloat16)
    metadata = describe({f"layers.{n}.weight": meta for n in range(chunks // ranks)}, ranks, 0)
    for name, told in metadata.state_dict_metadata.items():
        for rank, chunk in enumerate(told.chunks):
            index = MetadataIndex(name, chunk.offsets, rank)
            metadata.storage_data[index] = _StorageInfo(f"__{rank}_0.distcp", 0, 2**20)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    def read() -> None:
        found = ReadMetadata(folder)
        for name in found.paths:
            found.tensor(name)

    return seconds(read), (folder / ".metadata").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=50_000)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        folder = Path(place)
        count = max(1, round(given.megabytes * 1e6 / (2 * SHAPE[0] * SHAPE[1])))
        base = {f"layers.{n}.weight": torch.randn(SHAPE).bfloat16() for n in range(count)}
        tuned = {name: tensor.clone() for name, tensor in base.items()}
        for tensor in tuned.values():
            flat = tensor.view(-1)
            at = torch.randint(flat.numel(), (given.entries // count,))
            flat[at] = -flat[at]
        save_file(base, folder / "base.safetensors")
        save_file(tuned, folder / "tuned.safetensors")
        sides = {
            "safetensors": folder / "tuned.safetensors",
            "one process": write(folder / "one", tuned, 1, 0),
            f"{given.ranks} ranks, by rows": write(folder / "rows", tuned, given.ranks, 0),
            f"{given.ranks} ranks, by columns": write(folder / "columns", tuned, given.ranks, 1),
        }
        size = sum(info.nbytes for info in Checkpoint(folder / "base.safetensors").tensors.values())
        deltas = {name: dk.diff(folder / "base.safetensors", side) for name, side in sides.items()}
        delta = deltas["safetensors"]
        assert all(each.equals(delta) for each in deltas.values())
        back = dk.diff(folder / "tuned.safetensors", folder / "base.safetensors")
        ways = {
            "diff": lambda side: dk.diff(folder / "base.safetensors", side),
            "merge": lambda side: dk.merge(side, back, folder / "out.safetensors", force=True),
        }
        print(f"{size / 1e6:.0f} MB of bfloat16 in {count} tensors, {delta.nnz:,} entries")
        for what, way in ways.items():
            runs = {name: lambda side=side, way=way: way(side) for name, side in sides.items()}
            for name, taken in alternating(given.rounds, runs).items():
                print(f"{what:6}{name:22}{taken:8.2f} s{size / taken / 1e6:8.0f} MB/s")
        taken, size = opening(folder / "many", given.chunks)
        print(f"metadata of {given.chunks:,} chunks ({size / 1e6:.1f} MB): {taken:.2f} s")


if __name__ == "__main__":
    main()
