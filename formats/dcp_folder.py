"""A directory of torch.distributed.checkpoint as the weight files that a merge would make of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from deltakit.dtypes import DTYPES
from deltakit.errors import FormatError, MissingFileError
from deltakit.formats.checkpoint_files import DCP_METADATA, INDEX_SUFFIX, SUFFIX
from deltakit.formats.chunked_tensor import ChunkedTensor
from deltakit.formats.dcp_metadata import Metadata, StoredTensor
from deltakit.formats.dcp_names import Chosen, choose
from deltakit.formats.dcp_shard import DcpShard
from deltakit.formats.mapped_file import MappedFiles
from deltakit.formats.safetensors_file import TensorInfo

SHARD_SIZE = 5_000_000_000  # bytes of a weight file at most, but for a tensor that is larger


@dataclass(frozen=True, slots=True)
class DcpFolder:
    """What was found in a directory.

    files: `.metadata` and those that hold the model. shards: name -> weight file, as the model would
    be written. notes: what else is there.
    """

    files: tuple[Path, ...]
    shards: Mapping[str, DcpShard]
    notes: tuple[str, ...]

    def index(self) -> tuple[str, bytes] | None:
        """Name and content of the index of the weight files; None where there is only one."""
        if len(self.shards) == 1:
            return None
        tensors = {
            n: (file, info) for file, s in self.shards.items() for n, info in s.tensors.items()
        }
        ordered = sorted(tensors.items(), key=lambda item: item[0].encode())
        content: dict[str, Any] = {
            "metadata": {"total_size": sum(info.nbytes for _, info in tensors.values())},
            "weight_map": {name: file for name, (file, _) in ordered},
        }
        text = json.dumps(content, indent=2, ensure_ascii=False)
        return f"model{INDEX_SUFFIX}", text.encode() + b"\n"


def open_dcp(folder: Path, part: str | None) -> DcpFolder:
    """The model in a directory that torch.distributed.checkpoint.save has written.

    part: the keys that lead to the model in the state dict, joined by dots ("" for the top level);
    None finds out (see `deltakit.formats.dcp_names.choose`). Weight files take up to 5 GB each, in
    the order of the tensors' names. Raises MissingFileError, and FormatError where the metadata do
    not describe whole tensors of known dtypes in files that are there.
    """
    metadata = Metadata(folder)
    chosen = choose(metadata.paths, part, str(folder))
    stored = {
        name: metadata.tensor(chosen.names[name]) for name in sorted(chosen.names, key=str.encode)
    }
    infos = {name: _info(folder, name, tensor) for name, tensor in stored.items()}
    sizes = _file_sizes(folder, stored)
    files = MappedFiles(folder, sizes)
    tensors = [ChunkedTensor(infos[name], tensor, files) for name, tensor in stored.items()]
    groups = list(_grouped(tensors))
    names = [f"model-{n:05d}-of-{len(groups):05d}{SUFFIX}" for n in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else [f"model{SUFFIX}"]
    shards = {n: DcpShard(folder / n, group) for n, group in zip(names, groups, strict=True)}
    found = (folder / DCP_METADATA, *(folder / name for name in sizes))
    return DcpFolder(found, shards, tuple(_notes(metadata, chosen, folder)))


def _file_sizes(folder: Path, stored: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Name -> size of the files that hold the tensors, each of which must reach as far as they say."""
    names = {chunk.file for tensor in stored.values() for chunk in tensor.chunks}
    sizes = {}
    for name in sorted(names, key=str.encode):
        if not (folder / name).is_file():
            raise MissingFileError(f"{folder / DCP_METADATA} names {name}, which is missing")
        sizes[name] = (folder / name).stat().st_size
    for tensor, told in stored.items():
        for chunk in told.chunks:
            if chunk.offset + chunk.length > sizes[chunk.file]:
                raise FormatError(
                    f"{folder / chunk.file} has {sizes[chunk.file]} bytes, and tensor {tensor!r} "
                    f"needs {chunk.length} from byte {chunk.offset} on; the file is truncated"
                )
            if chunk.length < prod(chunk.sizes) * DTYPES[told.dtype].itemsize:
                raise FormatError(
                    f"{folder / DCP_METADATA}: tensor {tensor!r} has a chunk of {told.dtype} of shape "
                    f"{list(chunk.sizes)} in {chunk.length} bytes, which are too few"
                )
    return sizes


def _info(folder: Path, name: str, stored: StoredTensor) -> TensorInfo:
    if stored.dtype not in DTYPES:
        raise FormatError(
            f"{folder}: tensor {name!r} has dtype {stored.dtype}, which deltakit cannot read"
        )
    nbytes = prod(stored.shape) * DTYPES[stored.dtype].itemsize
    return TensorInfo(name, stored.dtype, stored.shape, folder, 0, nbytes)


def _grouped(tensors: Iterable[ChunkedTensor]) -> Iterator[list[ChunkedTensor]]:
    group: list[ChunkedTensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.info.nbytes > SHARD_SIZE:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.info.nbytes
    yield group


def _notes(metadata: Metadata, chosen: Chosen, folder: Path) -> Iterator[str]:
    left = len(metadata.paths) - len(chosen.names) + len(metadata.others)
    if left:
        where = f"under {'.'.join(chosen.keys)!r}" if chosen.keys else "at the top level"
        yield f"{folder}: the {len(chosen.names)} tensors {where} are taken, {left} other items left"
