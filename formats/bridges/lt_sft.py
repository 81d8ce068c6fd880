"""LT-SFT: the sparse fine-tunings of composable-sft (Ansell et al. 2022), `pytorch_diff.bin`.

A pickle of {"diffs": {name: tensor}, "abs": {name: dense tensor}}; files of September 2021 call
these "body" and "head", the earliest are the mapping of tensors alone. Differences add; whole
("abs") tensors replace. A tensor is {"size", "index_steps", "values"}: flat COLUMN-major indices
as a list of steps, the first from 0; before that {"size", "indices": [ndim][nnz], "values": [nnz]}
in plain lists, or an object that holds the same. composable-sft itself decodes with 32-bit integers
and, beyond two dimensions, with the wrong modulus; its encoding is sound, and is undone here.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.delta import MAX_NUMEL
from deltakit.dtypes import Array
from deltakit.errors import FormatError
from deltakit.formats.bridges import torch_pickle
from deltakit.formats.bridges.bridge import BRIDGES, Bridge, Options, Reading
from deltakit.formats.bridges.entries import flattened
from deltakit.formats.bridges.foreign_tensors import assembled
from deltakit.formats.checkpoint import Checkpoint

_FILE = "pytorch_diff.bin"
_GENERATIONS = (("diffs", "abs"), ("body", "head"))


class _IntegerType:
    """Stands in for numpy.dtype, of which these files need "i8" alone."""

    def __init__(self, code: str, *_: object) -> None:
        if code != "i8":
            raise FormatError(f"an index is of NumPy dtype {code!r}, expected i8")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] != "<":
            raise FormatError("an index is big-endian")


def _integer(kind: _IntegerType, data: bytes) -> int:
    """Stands in for NumPy's constructor of scalars."""
    return int.from_bytes(data, "little", signed=True)


class _Difference:
    """Stands in for composable-sft's class of September 2021; its fields arrive as attributes."""


_STAND_INS = {
    "numpy.dtype": _IntegerType,
    "numpy._core.multiarray.scalar": _integer,
    "numpy.core.multiarray.scalar": _integer,
    "sft.sft.SparseTensorDifference": _Difference,
}


@BRIDGES.register("lt-sft", "LT-SFT differences (composable-sft)", "Ansell et al. 2022")
class LtSft(Bridge):
    """`pytorch_diff.bin`, or a folder with it."""

    name = "lt-sft"

    def recognise(self, path: Path) -> str | None:
        seen = torch_pickle.peek(_file(path))
        if seen is None or "EMPTY_DICT" not in seen.opcodes[:2]:
            return None
        keys = set(seen.strings)  # "values" stands behind the indices, perhaps megabytes of them
        if "size" not in keys or not keys & {"index_steps", "indices"}:
            return None
        return "LT-SFT differences (composable-sft)"

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        file = _file(path)
        diffs, whole = _components(file, torch_pickle.read(file, _STAND_INS))
        tensors = {name: _entries(file, name, found) for name, found in diffs.items()}
        extras = {
            name: torch_pickle.array(f"{file}: {name!r}", tensor) for name, tensor in whole.items()
        }
        notes = []
        if base is None:
            notes.append(
                "LT-SFT files do not name their base: names are the trained model's and dtypes "
                "those of the differences; give the base (--base) to have both checked"
            )
        return Reading(assembled(tensors, extras, base), tuple(notes))


def _file(path: Path) -> Path:
    return path / _FILE if path.is_dir() else path


def _components(file: Path, content: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The differences and the whole tensors of any generation."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise FormatError(f"{file} holds {type(content).__name__}, expected tensors by name")
    diffs: Any = content
    whole: Any = {}
    for sparse, dense in _GENERATIONS:
        if sparse in content or dense in content:
            diffs, whole = content.get(sparse, {}), content.get(dense) or {}
    for found in (diffs, whole):
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise FormatError(f"{file}: expected tensors by name, found {type(found).__name__}")
    return diffs, whole


def _entries(file: Path, name: str, found: Any) -> tuple[tuple[int, ...], Array, Array]:
    """Shape, flat row-major indices int64 [nnz], and values [nnz] of one difference."""
    what = f"{file}: {name!r}"
    if isinstance(found, _Difference):
        found = vars(found)
    if not isinstance(found, dict) or not {"size", "values"} <= set(found):
        raise FormatError(f"{what}: no difference of any known generation of LT-SFT")
    size = found["size"]
    sizes = isinstance(size, (tuple, list)) and all(type(n) is int and n >= 0 for n in size)
    if not sizes or prod(size) > MAX_NUMEL:
        raise FormatError(f"{what}: size {size!r:.80} is not possible")
    shape = tuple(size)
    values = found["values"]
    if isinstance(values, list):
        values = _numbers(what, values, float).astype(np.float32)
    else:
        values = torch_pickle.array(what, values)
    if "index_steps" in found:
        flat = _row_major(what, shape, _numbers(what, found["index_steps"], int))
    else:
        axes = found.get("indices")
        if not isinstance(axes, list) or len(axes) != len(shape):
            raise FormatError(f"{what}: expected a list of indices per dimension of {list(shape)}")
        rows = [_numbers(what, axis, int) for axis in axes]
        if any(len(row) != len(values) for row in rows):
            raise FormatError(f"{what}: expected {len(values)} indices per dimension")
        flat = flattened(name, shape, np.array(rows, np.int64).reshape(len(shape), len(values)))
    return shape, flat, values


def _row_major(what: str, shape: tuple[int, ...], steps: Array) -> Array:
    """Flat row-major indices of column-major ones given as steps, all from 1 but the first."""
    total = sum(steps.tolist()) if steps.size else 0  # of Python, which does not wrap around
    if steps.size and (steps[0] < 0 or (steps[1:] < 1).any() or total >= prod(shape)):
        raise FormatError(
            f"{what}: index_steps do not lead through {prod(shape)} elements in increasing order"
        )
    if not steps.size:
        return steps
    coordinates = np.unravel_index(np.cumsum(steps), shape, order="F")
    return np.ravel_multi_index(coordinates, shape)


def _numbers(what: str, found: Any, kind: type) -> Array:
    """A flat list of Python's numbers of one kind as an array, int64 or float64."""
    if not isinstance(found, list) or not all(type(n) is kind for n in found):
        raise FormatError(f"{what}: expected a list of {kind.__name__} numbers")
    try:
        return np.array(found, np.int64 if kind is int else np.float64)
    except OverflowError:
        raise FormatError(f"{what}: an index does not fit into 64 bits") from None
