"""What a `.sdelta` file holds and what it costs, from its header; values are read on request."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltakit.adapters.summary import adapter_summary
from deltakit.changes import Changes
from deltakit.entropy import support_bits
from deltakit.formats.header import SdeltaHeader, TensorRecord
from deltakit.formats.safetensors_header import header_size
from deltakit.formats.sdelta import SdeltaFile, parse_header
from deltakit.groups import Group, by_block, by_kind
from deltakit.hub.location import Location, is_location

if TYPE_CHECKING:
    from deltakit.hub.remote_delta import RemoteFile

COO_ENTRY_BYTES = 12  # a flat int64 index and a float32 value


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Look at a `.sdelta` file without reading more than its header.

    Of `hf://owner/repo[@revision][/file]` only the header is downloaded, by range requests, unless
    the file is in the cache. Raises MissingFileError for a path that does not exist, HubError for
    one that cannot be had, and FormatError for a file that is no whole, sound `.sdelta`.
    """
    if is_location(path):
        from deltakit.hub.remote_delta import remote_delta

        return inspect_remote(remote_delta(Location.parse(path)))
    with SdeltaFile(path) as file:
        return Inspection(path=Path(path), file_bytes=file.size, header=file.header)


def inspect_remote(delta: RemoteFile) -> Inspection:
    """`inspect` for a delta whose place on the Hub is known."""
    if delta.is_cached:
        return replace(inspect(delta.file), path=delta.location)
    where, size = str(delta.location), delta.size
    header, _ = parse_header(delta.head(lambda p: header_size(p, size, where)), size, where)
    return Inspection(path=delta.location, file_bytes=size, header=header, remote=True)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` found. All of it comes from the header, except `changes`.

    path: of a file, or its location at the very commit. file_bytes: size of the file. header: what
    the file says about its tensors and extras, its base, the changes of configuration and its
    provenance. remote: whether no more of it than the header is on this machine. known: `changes`,
    from whoever has read the tensors already.
    """

    path: Path | Location
    file_bytes: int
    header: SdeltaHeader
    remote: bool = False
    known: Mapping[str, Changes] | None = None

    @property
    def tensors(self) -> list[TensorRecord]:
        """The sparse tensors, in tensor order."""
        return list(self.header.tensors.values())

    @property
    def entries(self) -> int:
        """Entries over all tensors: the budget that is used."""
        return self.header.nnz

    @property
    def extra_weights(self) -> int:
        """Elements of all extras, which do not count into the budget."""
        return sum(prod(extra.shape) for extra in self.header.extras.values())

    @property
    def density_of_base(self) -> float | None:
        """Entries as a share of all weights of the base; None where its size is not recorded."""
        base = self.header.base
        if base is None or base.total_weights is None:
            return None
        return ratio(self.entries, base.total_weights)

    @property
    def density_of_touched(self) -> float:
        """Entries as a share of the elements of the touched tensors."""
        return ratio(self.entries, sum(t.numel for t in self.tensors))

    @property
    def blocks(self) -> list[Group]:
        """The tensors by block of layers."""
        return by_block(self.tensors)

    @property
    def kinds(self) -> list[Group]:
        """The tensors by kind, over all layers."""
        return by_kind(self.tensors)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each sort of content; together they are the file."""
        sizes = {
            "indices": sum(t.index_bytes for t in self.tensors),
            "values": sum(t.value_bytes for t in self.tensors),
            "order": sum(t.order_bytes for t in self.tensors),
            "base_values": sum(t.base_bytes for t in self.tensors),
            "extras": sum(e.nbytes for e in self.header.extras.values()),
        }
        return {"header": self.file_bytes - sum(sizes.values()), **sizes}

    @property
    def raw_coo_bytes(self) -> int:
        """Bytes of the same entries as pairs of a flat int64 index and a float32 value."""
        return COO_ENTRY_BYTES * self.entries

    @property
    def entropy_bytes(self) -> float:
        """log2 C(numel, entries) / 8 over the tensors: the least bytes for uniform supports."""
        return sum(support_bits(t.numel, t.nnz) for t in self.tensors) / 8

    def open(self) -> SdeltaFile:
        """The file itself, for reading; one that is on the Hub is downloaded."""
        return SdeltaFile(self.path if isinstance(self.path, Path) else str(self.path))

    @cached_property
    def changes(self) -> Mapping[str, Changes]:
        """Statistics of |change| per tensor; the first use reads and checks the sparse tensors, and
        so downloads a file that is on the Hub."""
        if self.known is not None:
            return self.known
        with self.open() as file:
            return {t.name: Changes.of(file.tensor(t.name)) for t in self.tensors}

    def changes_in(self, tensors: Iterable[TensorRecord]) -> Changes | None:
        """Statistics of |change| over some of the tensors together; None for a remote file."""
        if self.remote:
            return None
        return Changes.combined(self.changes[t.name] for t in tensors)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; statistics of the changes are null for a remote file."""
        header = self.header
        return {
            "path": str(self.path),
            "format_version": header.version,
            "entries": self.entries,
            "extra_weights": self.extra_weights,
            "density_of_base": self.density_of_base,
            "density_of_touched": self.density_of_touched,
            "bytes": {
                "file": self.file_bytes,
                **self.parts,
                "raw_coo": self.raw_coo_bytes,
                "support_entropy": self.entropy_bytes,
            },
            "bits_per_index": ratio(8 * self.parts["indices"], self.entries),
            "entropy_bits_per_index": ratio(8 * self.entropy_bytes, self.entries),
            "changes": self._changes(self.tensors),
            "blocks": [self._group(group) for group in self.blocks],
            "kinds": [self._group(group) for group in self.kinds],
            "tensors": [self._tensor(tensor) for tensor in self.tensors],
            "extras": [asdict(extra) for extra in header.extras.values()],
            "adapter": adapter_summary(header),
            "base": None if header.base is None else asdict(header.base),
            "config": dict(header.config),
            "provenance": dict(header.provenance),
        }

    def _group(self, group: Group) -> dict[str, Any]:
        return {
            "name": group.name,
            "tensors": len(group.tensors),
            "entries": group.entries,
            "density": group.density,
            "changes": self._changes(group.tensors),
        }

    def _changes(self, tensors: Iterable[TensorRecord]) -> dict[str, Any] | None:
        found = self.changes_in(tensors)
        return None if found is None else found.as_dict()

    def _tensor(self, tensor: TensorRecord) -> dict[str, Any]:
        return {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "trained_dtype": tensor.trained_dtype,
            "value_dtype": tensor.value_dtype,
            "mode": tensor.mode,
            "entries": tensor.nnz,
            "density": ratio(tensor.nnz, tensor.numel),
            "coding": tensor.coding,
            "seed": tensor.seed,
            "bytes": tensor.nbytes,
            "bits_per_index": ratio(8 * tensor.index_bytes, tensor.nnz),
            "entropy_bits_per_index": ratio(support_bits(tensor.numel, tensor.nnz), tensor.nnz),
            "changes": self._changes([tensor]),
        }


def ratio(part: float, whole: float) -> float:
    """part / whole; 0.0 of nothing."""
    return part / whole if whole else 0.0
