"""Writing an `.sdelta` file tensor by tensor, for deltas that do not fit in memory.

The header stands in front and holds sizes and digests of everything, so streams wait in an unnamed
temporary file beside the target until the last tensor is known. The file is the one that `save`
writes of the same delta, byte for byte.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from deltakit.delta import BaseIdentity, Fingerprint, TensorDelta, in_tensor_order
from deltakit.dtypes import Array
from deltakit.errors import DeltaError, FormatError
from deltakit.formats import header_json, safetensors_header
from deltakit.formats.atomic import replacing
from deltakit.formats.header import ExtraRecord, SdeltaHeader, TensorRecord, layout
from deltakit.formats.sdelta_writer import METADATA_KEY, extra_stream, tensor_streams

_BLOCK = 2**20  # bytes copied at a time


class SdeltaStream:
    """An `.sdelta` file in the making: `add` and `add_extra` its content, then `finish` it.

    Made by `sdelta_stream`. Tensors come in bytewise order of their names.
    """

    def __init__(self, spool: IO[bytes], path: Path) -> None:
        self._spool, self._path = spool, path
        self._tensors: dict[str, TensorRecord] = {}
        self._extras: dict[str, ExtraRecord] = {}
        self._places: dict[str, list[tuple[int, int]]] = {}  # stream -> (offset, size) in order

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """What has been added so far."""
        return self._tensors

    @property
    def extras(self) -> Mapping[str, ExtraRecord]:
        """The extras that have been added so far."""
        return self._extras

    def add(self, tensor: TensorDelta, known: Fingerprint | None = None) -> None:
        """Add the entries of one tensor, whose base has the fingerprint `known`.

        Raises DeltaError for a tensor that is not behind all others in tensor order.
        """
        last = next(reversed(self._tensors), None)
        if last is not None and tensor.name.encode() <= last.encode():
            raise DeltaError(f"tensor {tensor.name!r} comes after {last!r}, out of tensor order")
        record, parts = tensor_streams(tensor, known)
        self._tensors[tensor.name] = record
        for name, data in zip(record.streams(), parts, strict=True):
            self._keep(name, data)

    def add_extra(self, name: str, array: Array) -> None:
        """Add a whole tensor. Raises DeltaError for a reserved name."""
        self._extras[name], data = extra_stream(name, array)
        self._keep(name, data)

    def finish(
        self,
        base: BaseIdentity | None = None,
        config: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the file. base: its fingerprints are those that came with the tensors."""
        header = SdeltaHeader(
            tensors=self._tensors,
            extras=in_tensor_order(self._extras),
            base=base,
            config=config or {},
            provenance=provenance or {},
        )
        entries = layout(header)
        with self._path.open("wb") as file:
            text = header_json.dumps(header)
            file.write(safetensors_header.render(entries, {METADATA_KEY: text}))
            for name in entries:
                for offset, size in self._places[name]:
                    file.writelines(self._blocks(offset, size))

    def _keep(self, name: str, data: bytes) -> None:
        self._places.setdefault(name, []).append((self._spool.tell(), len(data)))
        self._spool.write(data)

    def _blocks(self, offset: int, size: int) -> Iterator[bytes]:
        self._spool.seek(offset)
        for start in range(0, size, _BLOCK):
            yield self._spool.read(min(_BLOCK, size - start))


@contextmanager
def sdelta_stream(path: str | os.PathLike[str]) -> Iterator[SdeltaStream]:
    """Yield a stream to the file at `path`, which appears (or is replaced) at the end, whole.

    Takes the size of the file twice on disk while it runs, and memory for one tensor. Nothing is
    left behind when the block raises. Errors as for `save`.
    """
    if sys.byteorder != "little":
        raise FormatError("sdelta files are little-endian; this machine is not, and cannot write")
    with replacing(path) as temporary, tempfile.TemporaryFile(dir=temporary.parent) as spool:
        yield SdeltaStream(spool, temporary)
