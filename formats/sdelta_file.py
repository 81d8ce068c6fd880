"""An open `.sdelta` file: the header at once, any one tensor on demand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from deltakit.adapter import Adapter
from deltakit.delta import BaseIdentity, TensorDelta
from deltakit.dtypes import DTYPES, Array
from deltakit.errors import (
    ChecksumError,
    CoordinateError,
    FormatError,
    MissingFileError,
    nearest,
)
from deltakit.formats import codings, header_json, safetensors_header
from deltakit.formats.coding import Place
from deltakit.formats.header import ExtraRecord, SdeltaHeader, TensorRecord, extents, layout
from deltakit.formats.sdelta_writer import METADATA_KEY
from deltakit.formats.values import decode_order, decode_values
from deltakit.hub.locate import local_delta

if TYPE_CHECKING:
    from typing_extensions import Self

MAGIC = b'{"__metadata__":{"sdelta":"'  # from byte 8 on


def parse_header(prefix: bytes, file_size: int, where: str) -> tuple[SdeltaHeader, int]:
    """The header in the first bytes of a file of `file_size` bytes, and where its body begins.

    prefix: the whole header at least; `safetensors_header.header_size` tells its size. Raises
    FormatError (also UnsupportedVersionError, ChecksumError) when the header is not valid or does
    not fit the file.
    """
    if prefix[8 : 8 + len(MAGIC)] != MAGIC:
        raise FormatError(f"{where}: not an .sdelta file")
    outer = safetensors_header.parse(prefix, file_size, where)
    if list(outer.metadata) != [METADATA_KEY]:
        raise FormatError(f"{where}: an .sdelta file has {METADATA_KEY!r} as its only metadata key")
    header = header_json.loads(outer.metadata[METADATA_KEY], where)
    if dict(outer.entries) != layout(header):
        raise FormatError(f"{where}: the safetensors header contradicts the sdelta header in it")
    return header, outer.body_offset


class SdeltaFile:
    """An `.sdelta` file, opened for reading; a context manager.

    path: of a file, or `hf://owner/repo[@revision][/file]`, which is downloaded into the cache.
    Opening reads and checks the header alone. `tensor` and `extra` read and check the bytes of
    that one and no others. Raises MissingFileError when the file cannot be opened, HubError when
    it cannot be downloaded and FormatError when it is not valid.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = local_delta(path)
        self._file = open_binary(self.path)
        try:
            self.size = self._file.seek(0, os.SEEK_END)
            self.header, self._body = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the header stays readable."""
        self._file.close()

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Name -> record of each sparse tensor."""
        return self.header.tensors

    @property
    def extras(self) -> Mapping[str, ExtraRecord]:
        """Name -> record of each extra."""
        return self.header.extras

    @property
    def base(self) -> BaseIdentity | None:
        """The identity of the base, or None."""
        return self.header.base

    @property
    def config(self) -> Mapping[str, Any]:
        """Changes to the base's config.json."""
        return self.header.config

    @property
    def provenance(self) -> Mapping[str, Any]:
        """How the delta came to be."""
        return self.header.provenance

    @property
    def adapter(self) -> Adapter | None:
        """The adapter whose tensors these are, or None."""
        return self.header.adapter

    def tensor(self, name: str) -> TensorDelta:
        """The entries of one tensor.

        Raises CoordinateError when there is none of this name, ChecksumError when its bytes are
        not those that were written, and FormatError when they are no valid streams.
        """
        if name not in self.header.tensors:
            known = nearest(name, list(self.header.tensors))
            raise CoordinateError(f"{self.path}: no tensor {name!r} in this delta{known}")
        record = self.header.tensors[name]
        where = f"{self.path}: tensor {name!r}"
        parts = [
            self._read(*self._extents[name][stream], sha256, f"{where}: {stream}")
            for stream, (_, _, sha256) in record.streams().items()
        ]
        kind = DTYPES[record.dtype]
        base = order = None
        if record.base_values:
            base = np.frombuffer(parts.pop(), kind.words).copy()
        if record.order_bits is not None:
            order = decode_order(parts.pop(), record.nnz, record.order_bits, where)
        place = Place(name, record.shape, record.nnz, record.seed, where)
        return TensorDelta(
            name=name,
            shape=record.shape,
            dtype=record.dtype,
            mode=record.mode,
            indices=codings.decode(record.coding, parts[0], place),
            values=decode_values(parts[1], DTYPES[record.value_dtype], kind, record.mode, where),
            order=order,
            base_values=base,
            trained_dtype=record.trained_dtype,
            seed=record.seed,
        )

    def extra(self, name: str) -> Array:
        """One extra, as an array of its shape and dtype; errors as for `tensor`."""
        if name not in self.header.extras:
            known = nearest(name, list(self.header.extras))
            raise CoordinateError(f"{self.path}: no extra {name!r} in this delta{known}")
        record = self.header.extras[name]
        entry = self._layout[name]
        where = f"{self.path}: extra {name!r}"
        data = self._read(entry.start, entry.end, record.sha256, where)
        kind = DTYPES[record.dtype]
        words = np.frombuffer(data, kind.words).copy()  # writable, as torch wants it
        if kind.name == "bool" and (words > 1).any():
            raise FormatError(f"{where}: a bool must be 0 or 1, found {words.max()}")
        return words.view(kind.numpy).reshape(record.shape)

    @cached_property
    def _extents(self) -> dict[str, dict[str, tuple[int, int]]]:
        return extents(self.header)

    @cached_property
    def _layout(self) -> dict[str, safetensors_header.Entry]:
        return layout(self.header)

    def _read_header(self) -> tuple[SdeltaHeader, int]:
        where = str(self.path)
        self._file.seek(0)
        prefix = self._file.read(8 + len(MAGIC))
        if prefix[8:] != MAGIC:
            raise FormatError(f"{where}: not an .sdelta file")
        length = safetensors_header.header_size(prefix, self.size, where)
        rest = self._file.read(max(0, length - len(prefix)))
        return parse_header(prefix + rest, self.size, where)

    def _read(self, start: int, end: int, sha256: str | None, what: str) -> bytes:
        """Bytes [start, end) of the body, whose size the header has been checked against."""
        self._file.seek(self._body + start)
        data = self._file.read(end - start)
        if len(data) != end - start:
            raise FormatError(f"{what}: the file ends before its last byte; it was cut meanwhile")
        if data and header_json.digest(data) != sha256:
            raise ChecksumError(
                f"{what}: {len(data)} bytes differ from their digest; the file is damaged, get it "
                "again from where it came"
            )
        return data


def open_binary(path: Path) -> BinaryIO:
    """`path` opened for reading; MissingFileError when it cannot be."""
    try:
        return path.open("rb")
    except OSError as error:
        raise MissingFileError(f"cannot read {path}: {error.strerror}") from None
