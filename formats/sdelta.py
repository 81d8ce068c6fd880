"""`.sdelta` files: `save`, `load`, and `SdeltaFile` for reading tensor by tensor.

    save(delta, "a.sdelta", values="bfloat16")
    delta = load("a.sdelta")
    with SdeltaFile("a.sdelta") as file:
        entries = file.tensor("encoder.layer.0.output.dense.weight")

`SPEC.md` beside this file describes the format.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.errors import MissingFileError
from deltakit.formats.atomic import replacing
from deltakit.formats.header import ExtraRecord, SdeltaHeader, TensorRecord
from deltakit.formats.sdelta_file import MAGIC, SdeltaFile, open_binary, parse_header
from deltakit.formats.sdelta_writer import pieces
from deltakit.hub.locate import local_delta

__all__ = [
    "ExtraRecord",
    "SdeltaFile",
    "SdeltaHeader",
    "TensorRecord",
    "encode",
    "is_sdelta",
    "load",
    "parse_header",
    "save",
]


def save(
    delta: SparseDelta,
    path: str | os.PathLike[str],
    *,
    values: str | None = None,
    order: bool = True,
    base_values: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `delta` to `path`, atomically; a file that is there is replaced.

    values: the dtype that `add` values are stored in, "float32", "bfloat16" or "float16", rounded
    to nearest even; by default float32, and float64 for float64 tensors. `set` values are always
    the base dtype's own bits. order, base_values: whether to write these where the delta has them.
    progress: called with (entries done, entries in all). Equal arguments give equal bytes. Raises DeltaError when a value is too large for `values` or
    an extra has a reserved name, FormatError when config or provenance are no JSON or a seed does
    not generate its indices, ConfigError for other `values`, MissingFileError when `path` cannot
    be written.
    """
    parts = list(
        pieces(delta, values=values, order=order, base_values=base_values, progress=progress)
    )
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines(parts)


def encode(
    delta: SparseDelta,
    *,
    values: str | None = None,
    order: bool = True,
    base_values: bool = True,
) -> bytes:
    """The bytes that `save` writes."""
    return b"".join(pieces(delta, values=values, order=order, base_values=base_values))


def load(
    path: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> SparseDelta:
    """Read a whole `.sdelta` file, every byte of it checked.

    path: of a file, or `hf://owner/repo[@revision][/file]`, which is downloaded into the cache.
    progress: called with (entries done, entries in all).
    Raises MissingFileError when it cannot be opened, HubError when it cannot be downloaded, and FormatError (also UnsupportedVersionError,
    ChecksumError) when it is not exactly what the format demands.
    """
    with SdeltaFile(path) as file:
        tensors: dict[str, TensorDelta] = {}
        done = 0
        for name in file.tensors:
            tensors[name] = file.tensor(name)
            done += tensors[name].nnz
            if progress is not None:
                progress(done, file.header.nnz)
        return SparseDelta(
            tensors=tensors,
            extras={name: file.extra(name) for name in file.extras},
            base=file.base,
            config=file.config,
            provenance=file.provenance,
            adapter=file.adapter,
        )


def is_sdelta(path: str | os.PathLike[str]) -> bool:
    """Whether the file at `path` begins as an `.sdelta` file does; its name does not matter.

    False for folders and for files that are not there.
    """
    try:
        with open_binary(local_delta(path)) as file:
            return file.read(8 + len(MAGIC))[8:] == MAGIC
    except MissingFileError:
        return False
