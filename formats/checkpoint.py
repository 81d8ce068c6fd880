"""A base checkpoint on disk, one safetensors file or many or a directory of
torch.distributed.checkpoint, read lazily and never written to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltakit.delta import in_tensor_order
from deltakit.dtypes import Array
from deltakit.errors import CoordinateError, FormatError, nearest
from deltakit.formats.checkpoint_files import Located, locate
from deltakit.formats.dcp_folder import open_dcp
from deltakit.formats.dcp_shard import DcpShard
from deltakit.formats.safetensors_file import SafetensorsFile, TensorInfo
from deltakit.formats.undo_folder import refuse_unfinished, undo_folder
from deltakit.hub.locate import local_base, named_after

Shard = SafetensorsFile | DcpShard


class Checkpoint:
    """All tensors of a checkpoint, by name.

    path: a .safetensors file, an index file, or a directory, of safetensors or as
    torch.distributed.checkpoint.save writes it (see `deltakit.formats.checkpoint_files`), or
    `hf://owner/repo[@revision][/file]`, which is downloaded into the cache. model_id and revision: where it was published, if known; of a location they are
    its repository and commit.
    unfinished: open it also where a merge into its files was interrupted.

    `tensors` maps names to TensorInfo in bytewise order; `files` are the files that hold it and
    `index` the index file, or None; `shards` are the weight files by name, for a directory of
    torch.distributed.checkpoint those that would hold its tensors; `directory` is None for a lone file; `journal` is the place of the
    folder that tells of merges into these files; `named_after` is what outputs made of it stand
    beside and are named after; `is_dcp` says whether it is a directory of
    torch.distributed.checkpoint; `notes` says what was found but not used.
    Everything about the files is checked here: headers, sizes, and that index and shards agree.
    Raises MissingFileError, HubError, FormatError, and JournalError for a merge that has not ended.
    """

    is_dcp = False
    _made_index: tuple[str, bytes] | None = None

    def __init__(
        self,
        path: str | Path,
        *,
        model_id: str | None = None,
        revision: str | None = None,
        unfinished: bool = False,
    ) -> None:
        found = local_base(path)
        self.path = found.path
        self.model_id = model_id or found.model_id
        self.revision = revision or found.revision
        located = locate(path if found.model_id is None else found.path)
        if not unfinished:
            refuse_unfinished(located)
        if located.is_dcp:
            self._open_dcp(located)
        else:
            self._open(located, {file.name: SafetensorsFile(file) for file in located.files})
        is_local = found.model_id is None
        self.named_after = (self.directory or self.path) if is_local else named_after(path)

    def _open(self, located: Located, shards: Mapping[str, Shard]) -> None:
        """Take the files of the checkpoint, as their headers tell them."""
        self.journal = undo_folder(located)
        self.directory = located.directory
        self.files = located.files
        self.index = located.index
        self.notes: list[str] = []
        self.shards = shards
        held: Mapping[str, str]
        if located.weight_map is None:
            held = {name: file for file, shard in shards.items() for name in shard.tensors}
        else:
            held = self._indexed(located.weight_map)
        self._holders = held
        tensors = {name: shards[file].tensors[name] for name, file in held.items()}
        self.tensors: Mapping[str, TensorInfo] = in_tensor_order(tensors)

    def _open_dcp(self, located: Located) -> None:
        assert located.directory is not None
        found = open_dcp(located.directory, located.part)
        self._open(located, found.shards)
        self.files = found.files
        self.notes.extend(found.notes)
        self.is_dcp = True
        self._made_index = found.index()

    def __str__(self) -> str:
        """Its path, as reports tell it."""
        return str(self.path)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in bytewise order."""
        return list(self.tensors)

    @property
    def total_weights(self) -> int:
        """Elements of all tensors."""
        return sum(info.numel for info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """What is known about a tensor; CoordinateError with the nearest names when unknown."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CoordinateError(
                f"{self.path} has no tensor {name!r}{nearest(name, self.names)}"
            ) from None

    def words(self, name: str) -> Array:
        """The raw words of a tensor (unsigned integers as wide as its dtype), flat [numel]: a
        read-only view of the mapped file, a copy where it is stored in several chunks."""
        return self._shard(name).words(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """A copy of the raw words [start, stop) of a tensor, without keeping pages mapped."""
        return self._shard(name).read(name, start, stop)

    def gather(self, name: str, indices: Array) -> Array:
        """The raw words of a tensor at flat `indices` (int64 [n], any order), [n].

        Takes O(n) time and memory. Raises CoordinateError for an index outside the tensor.
        """
        return self._shard(name).gather(name, indices)

    def config(self) -> dict[str, Any] | None:
        """The content of config.json beside the weights of a directory; None without one."""
        if self.directory is None or not (self.directory / "config.json").is_file():
            return None
        file = self.directory / "config.json"
        try:
            content = json.loads(file.read_bytes())
        except ValueError as error:
            raise FormatError(f"{file} is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise FormatError(f"{file} is no JSON object")
        return content

    def index_content(self) -> tuple[str, bytes] | None:
        """Name and content of the index of the weight files; None where they have none."""
        return (
            self._made_index if self.index is None else (self.index.name, self.index.read_bytes())
        )

    def version(self) -> str:
        """Text that differs once the weight files do: their sizes and times of change."""
        found = [(str(file), file.stat()) for file in self.files]
        return repr([(name, status.st_size, status.st_mtime_ns) for name, status in found])

    @contextmanager
    def at_hand(self, file: str) -> Iterator[None]:
        """Have a weight file, given by its name, ready to be read for the length of a `with`; those
        of a local checkpoint always are."""
        yield

    def _shard(self, name: str) -> Shard:
        return self.shards[self._holders[self.info(name).name]]

    def _indexed(self, weight_map: Mapping[str, str]) -> Mapping[str, str]:
        for name, file in weight_map.items():
            if name not in self.shards[file].tensors:
                raise FormatError(
                    f"{self.index}: tensor {name!r} is mapped to {file}, which does not hold it"
                )
        for file, shard in self.shards.items():
            unlisted = [name for name in shard.tensors if weight_map.get(name) != file]
            if unlisted:
                self.notes.append(
                    f"{file} holds {len(unlisted)} tensors that the index does not list there "
                    f"(such as {unlisted[0]!r}); they are not used"
                )
        return weight_map
