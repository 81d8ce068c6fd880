"""Random masking (Xu & Zhang 2024): whole checkpoints of a model whose linear layers carry a mask.

A masked layer holds `<module>.base_Linear.weight` (and `.bias`) as the base has them, and beside
them `tunable_weights` [nnz] float16, which add, and their places in compressed sparse rows:
`row_offsets` int32 [out + 1], `col_indices` int16 [nnz] (and `row_indices`, an order of rows that
only the kernel needs). Saved as safetensors or as `pytorch_model.bin`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from deltakit.dtypes import Array, dtype_of
from deltakit.errors import BaseMismatchError, FormatError
from deltakit.formats.bridges.bridge import BRIDGES, Bridge, Options, Reading
from deltakit.formats.bridges.csr import flat_of_rows
from deltakit.formats.bridges.foreign_tensors import NamedArrays, assembled, mentioned
from deltakit.formats.bridges.names import checkpoint_names
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_file import TensorInfo

_VALUES = ".tunable_weights"
_PLACES = (".row_offsets", ".col_indices", ".row_indices")
_WRAPPED = ".base_Linear."
_UNCHECKED = (
    "everything but the masked entries is taken to be as in the base; give the base (--base) to "
    "have that checked and other changes kept"
)


@BRIDGES.register(
    "random-masking", "checkpoints with random masks in their layers", "Xu & Zhang 2024"
)
class RandomMasking(Bridge):
    """Checkpoints of the Random Masking paper's code: a file, or a folder with one."""

    name = "random-masking"

    def recognise(self, path: Path) -> str | None:
        endings = {name[name.rfind(".") :] for name in mentioned(_weights(path)) if "." in name}
        if not {_VALUES, *_PLACES[:2]} <= endings:
            return None
        return "checkpoint of the Random Masking paper's code"

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        arrays = NamedArrays(_weights(path))
        modules = [name.removesuffix(_VALUES) for name in arrays if name.endswith(_VALUES)]
        if not modules:
            raise FormatError(f"{arrays.path} holds no tensor that ends in {_VALUES}")
        trained = {f"{module}.weight": dtype_of(_kept(arrays, module)).name for module in modules}
        names = checkpoint_names(trained, base, _unmasked(arrays))
        if base is None:
            extras: dict[str, Array] = {}
            notes = [_UNCHECKED]
        else:
            extras, notes = _changed(arrays, names, trained, base)
        entries = {f"{module}.weight": _entries(arrays, module) for module in modules}
        delta = assembled(entries, extras, base)
        dtypes = {names[live]: dtype for live, dtype in trained.items()}
        tensors = {
            name: replace(tensor, trained_dtype=dtypes[name])
            for name, tensor in delta.tensors.items()
        }
        return Reading(replace(delta, tensors=tensors), tuple(notes))


def _weights(path: Path) -> Path:
    pickled = path / "pytorch_model.bin"
    return pickled if pickled.is_file() and not any(path.glob("*.safetensors")) else path


def _kept(arrays: NamedArrays, module: str) -> Array:
    return arrays.part(f"{module}{_WRAPPED}weight")


def _entries(arrays: NamedArrays, module: str) -> tuple[tuple[int, ...], Array, Array]:
    """Shape, flat indices and values of one masked layer."""
    shape = _kept(arrays, module).shape
    offsets, columns = (arrays.part(f"{module}{part}") for part in _PLACES[:2])
    flat = flat_of_rows(f"{module}.weight", shape, offsets, columns)
    return shape, flat, arrays.part(f"{module}{_VALUES}")


def _unmasked(arrays: NamedArrays) -> dict[str, str]:
    """Live name -> name in the file, of all that a checkpoint without masks would hold."""
    masks = (_VALUES, *_PLACES)
    return {name.replace(_WRAPPED, "."): name for name in arrays if not name.endswith(masks)}


def _changed(
    arrays: NamedArrays, names: Mapping[str, str], masked: Container[str], base: Checkpoint
) -> tuple[dict[str, Array], list[str]]:
    """Whole tensors that the base lacks or has otherwise, by live name, and notes on them.

    Raises BaseMismatchError where the weights under a mask are not the base's.
    """
    extras: dict[str, Array] = {}
    notes = []
    for live, key in _unmasked(arrays).items():
        stored = base.tensors.get(names[live])
        if stored is None and not _is_tied(key, arrays):
            extras[live] = arrays[key]
        elif stored is None:
            notes.append(f"tensor {live!r} repeats another one (tied weights) and is left out")
        elif not _is_base(arrays[key], stored, base):
            if live in masked:
                raise BaseMismatchError(
                    f"{arrays.path}: {key!r}, which training leaves as it is, is not tensor "
                    f"{stored.name!r} of {base.path}; give the base that the run started from"
                )
            extras[live] = arrays[key].astype(stored.kind.numpy)
            notes.append(f"tensor {stored.name!r} differs from the base and is kept whole")
    return extras, notes


def _is_base(array: Array, stored: TensorInfo, base: Checkpoint) -> bool:
    """Whether `array` is the base's tensor, cast to the dtype of the run."""
    if array.shape != stored.shape:
        return False
    with np.errstate(over="ignore"):
        before = base.read(stored.name).view(stored.kind.numpy).astype(array.dtype)
    return before.tobytes() == array.tobytes()


def _is_tied(key: str, arrays: NamedArrays) -> bool:
    """Whether a tensor repeats another one of the file."""
    array = arrays[key]
    return any(
        other != key
        and arrays.tensors[other].shape == array.shape
        and arrays[other].tobytes() == array.tobytes()
        for other in arrays
    )
