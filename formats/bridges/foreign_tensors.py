"""Tensors out of files that others wrote, and their place in the base checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array, dtype, dtype_of
from deltakit.errors import CoordinateError, DeltakitError, FormatError
from deltakit.formats.bridges import torch_pickle
from deltakit.formats.bridges.entries import in_order
from deltakit.formats.bridges.names import checkpoint_names
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_file import TensorInfo


class StateDict:
    """A torch file that holds tensors by name, mapped, with what `SafetensorsFile` has: `path`,
    `tensors` (name -> TensorInfo) and `read` (flat raw words).

    Raises FormatError for a file that holds anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = torch_pickle.read(path)
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise FormatError(f"{path} holds {type(found).__name__}, expected tensors by name")
        self._arrays = {
            name: torch_pickle.array(f"{path}: tensor {name!r}", tensor)
            for name, tensor in found.items()
        }
        self.tensors = {
            name: TensorInfo(name, dtype_of(array).name, array.shape, path, 0, array.nbytes)
            for name, array in self._arrays.items()
        }

    def read(self, name: str) -> Array:
        """The raw words of a tensor, flat."""
        return self._arrays[name].reshape(-1).view(self.tensors[name].kind.words)


class NamedArrays(Mapping[str, Array]):
    """The tensors of a checkpoint in safetensors, or of a torch file holding a state dict, by name,
    each read when it is asked for: NumPy arrays of the stored shape and dtype.

    `tensors` tells of each (TensorInfo) without reading it. Raises FormatError for what is neither
    kind of file, MissingFileError for what cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = Checkpoint(path) if torch_pickle.peek(path) is None else StateDict(path)
        self._file: Checkpoint | StateDict = file
        self.tensors = file.tensors

    def __getitem__(self, name: str) -> Array:
        info = self.tensors[name]
        return self._file.read(name).view(info.kind.numpy).reshape(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def part(self, name: str) -> Array:
        """The tensor `name`; FormatError where the file lacks it."""
        if name not in self.tensors:
            raise FormatError(f"{self.path}: tensor {name!r} is missing")
        return self[name]


def mentioned(path: Path) -> tuple[str, ...]:
    """Names of a checkpoint's tensors, or strings in the first 64 kB of a torch file, by which a
    format is recognised; nothing for what is neither."""
    seen = torch_pickle.peek(path)
    if seen is not None:
        return seen.strings
    try:
        return tuple(Checkpoint(path).tensors)
    except (DeltakitError, OSError):
        return ()


def additive(
    name: str,
    shape: tuple[int, ...],
    indices: Array,
    values: Array,
    base: Checkpoint | None,
    *,
    rounded: bool = False,
) -> TensorDelta:
    """An `add` tensor out of foreign entries.

    indices: integers [nnz], flat and row-major, in any order; values: floats [nnz]. The dtype is
    the base's, or the values' own where there is no base. rounded: cast values to it first. Raises
    FormatError for entries that are not such, CoordinateError for a base that lacks the tensor or
    has it in another shape.
    """
    if base is None:
        stored = dtype_of(values).name
    else:
        info = base.info(name)
        if info.shape != shape:
            raise CoordinateError(
                f"tensor {name!r} has shape {list(shape)} in the file and {list(info.shape)} in "
                f"{base.path}; give the base that the file was made of"
            )
        stored = info.dtype
    if values.dtype.kind not in "fV":  # ml_dtypes' bfloat16 is of kind V
        raise FormatError(f"tensor {name!r}: values are {values.dtype}, expected floats")
    flat, ordered = in_order(name, shape, indices, values)
    if rounded:
        with np.errstate(over="ignore"):  # infinite then, and refused by the delta
            ordered = ordered.astype(dtype(stored).numpy)
    return TensorDelta(
        name=name,
        shape=shape,
        dtype=stored,
        mode="add",
        indices=flat,
        values=ordered.astype(np.float64 if stored == "float64" else np.float32),
    )


def assembled(
    tensors: Mapping[str, tuple[tuple[int, ...], Array, Array]],
    extras: Mapping[str, Array],
    base: Checkpoint | None,
) -> SparseDelta:
    """An additive delta: live name -> (shape, flat indices, values), and whole tensors by live
    name, all brought to the names of the base. Tensors without entries are left out."""
    touched = {name: parts for name, parts in tensors.items() if parts[1].size}
    names = checkpoint_names(touched, base, extras)
    made = [additive(names[name], *parts, base) for name, parts in touched.items()]
    return SparseDelta(
        tensors={tensor.name: tensor for tensor in made},
        extras={names[name]: np.array(array) for name, array in extras.items()},
    )
