"""Summaries of the selective PEFT toolkit (Agarwal et al. 2024, ID3), `summary.pt`.

Per parameter the chosen entries: final weights [nnz], coordinates int64 [nnz, ndim] and the shape;
per BatchNorm module its statistics; the budget used. Version 0.4 pickles an object of these and
lists all of the model's parameters, None where frozen; version 0.2 a tuple (values, pointers,
shapes, bn_metadata, budget_used) of the trained ones. No names: the base tells them. Weights are
absolute, so tensors are in `set` mode; tensors that the base lacks (a head) become extras.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.differences import proven_differences
from deltakit.dtypes import Array, dtype_of
from deltakit.errors import ConfigError, FormatError
from deltakit.formats.bridges import torch_pickle
from deltakit.formats.bridges.bridge import BRIDGES, Bridge, Options, Reading, needed
from deltakit.formats.bridges.entries import flattened, in_order
from deltakit.formats.checkpoint import Checkpoint

if TYPE_CHECKING:
    from deltakit.formats.bridges.parameter_order import Order

_CLASS = "selective_optimizers.load_store.SelectivePeftSummary"
_FIELDS = ("values", "pointers", "shapes", "bn_metadata", "budget_used")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_OLD = (
    "a summary of version 0.2 records neither what weight decay did to other weights nor the "
    "order of the optimizer's groups; parameters are taken in the model's order, as its own "
    "loader does"
)


class _Pickled:
    """Stands in for the toolkit's class; its fields arrive as attributes."""


@dataclass(frozen=True)
class _Summary:
    """A summary whose lists have one length; `old` for version 0.2."""

    values: Sequence[Any]
    pointers: Sequence[Any]
    shapes: Sequence[tuple[int, ...] | None]
    norms: Sequence[dict[str, Any]]
    budget: int
    old: bool


@BRIDGES.register(
    "id3-toolkit", "summaries of the selective PEFT toolkit (ID3)", "Agarwal et al. 2024"
)
class Id3Toolkit(Bridge):
    """`summary.pt` or `summary.pth` of selective-optimizers. Needs the base, as a folder."""

    name = "id3-toolkit"

    def recognise(self, path: Path) -> str | None:
        seen = torch_pickle.peek(path)
        if seen is None:
            return None
        if seen.wanted[:1] == (_CLASS,):
            return "summary of the selective PEFT toolkit, version 0.4"
        of_tensors = seen.wanted[:1] == ("torch._utils._rebuild_tensor_v2",)
        if of_tensors and seen.opcodes[1:3] == ("MARK", "EMPTY_LIST"):  # (of a tuple, [of a list
            return "summary of the selective PEFT toolkit, version 0.2"
        return None

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        checkpoint = needed(base, "summaries of the selective PEFT toolkit hold no names")
        summary = _summary(path)
        # torch and transformers, which only this needs; torch_pickle has told if torch is missing.
        try:
            from deltakit.formats.bridges.parameter_order import order_of
            from deltakit.live.translation import to_checkpoint
        except ImportError as error:
            raise ConfigError(
                f"only a model's class knows the order of its parameters, which needs "
                f"{error.name}: pip install 'deltakit-sparse[train]'"
            ) from None
        order = order_of(checkpoint, summary.shapes, len(summary.norms))
        chosen, extras, notes = _chosen(path, summary, order)
        tensors, rounded = {}, []
        for name, tensor in to_checkpoint(chosen, order.where).items():
            tensors[name], fits = _fitted(tensor, checkpoint)
            rounded += [] if fits else [name]
        if rounded:
            notes.append(
                f"weights of {len(rounded)} tensors (such as {rounded[0]!r}) were rounded to the "
                "base's dtype"
            )
        config = order.config if extras else {}
        extras |= _statistics(path, summary.norms, order, checkpoint)
        return Reading(SparseDelta(tensors=tensors, extras=extras, config=config), tuple(notes))


def _summary(path: Path) -> _Summary:
    """The five fields of either version, lists of fitting lengths."""
    found = torch_pickle.read(path, {_CLASS: _Pickled})
    fields: list[Any]
    if isinstance(found, _Pickled):
        fields = [vars(found).get(name) for name in _FIELDS]
    elif isinstance(found, tuple) and len(found) == len(_FIELDS):
        fields = list(found)
    else:
        raise FormatError(f"{path} holds {type(found).__name__}, expected a summary")
    values, pointers, shapes, norms, budget = fields
    lists = (values, pointers, shapes)
    if not all(isinstance(part, list) and len(part) == len(shapes) for part in lists):
        raise FormatError(f"{path}: values, pointers and shapes must be lists of one length")
    if not isinstance(norms, list) or not all(isinstance(norm, dict) for norm in norms):
        raise FormatError(f"{path}: bn_metadata must be a list of statistics")
    if type(budget) is not int:
        counted = torch_pickle.array(f"{path}: budget_used", budget)
        if counted.size != 1 or counted.dtype.kind != "i":
            raise FormatError(f"{path}: budget_used is no number")
        budget = int(counted.reshape(()))
    checked = [_shape(path, shape) for shape in shapes]
    return _Summary(values, pointers, checked, norms, budget, isinstance(found, tuple))


def _chosen(
    path: Path, summary: _Summary, order: Order
) -> tuple[dict[str, TensorDelta], dict[str, Array], list[str]]:
    """Entries in the model's coordinates, whole tensors that the base lacks, and notes."""
    notes = [_OLD] if summary.old else []
    notes.append(
        f"parameters are named in the order of {order.model}"
        if order.model
        else "parameters are named by their shapes, each of which the base has once"
    )
    chosen: dict[str, TensorDelta] = {}
    extras: dict[str, Array] = {}
    listed = zip(order.live, summary.values, summary.pointers, summary.shapes, strict=True)
    for live, values, pointers, shape in listed:
        found = _entries(f"{path}: {live!r}", values, pointers, shape)
        stored = order.where.names[live]
        if found is None or not found.nnz:
            if stored is None:
                notes.append(f"the base lacks {live!r} and the summary holds nothing of it")
        elif stored is not None:
            chosen[stored] = replace(found, name=stored)
        elif found.nnz == found.numel:
            extras[live] = found.values.view(found.kind.numpy).reshape(found.shape)
        else:
            raise FormatError(
                f"{path}: the base lacks {live!r}, and the summary holds {found.nnz} of its "
                "entries only; give as base the model as it began, saved with its head"
            )
    held = sum(t.nnz for t in chosen.values()) + sum(array.size for array in extras.values())
    if held != summary.budget:
        notes.append(f"the summary claims {summary.budget:,} entries and holds {held:,}")
    return chosen, extras, notes


def _shape(path: Path, found: Any) -> tuple[int, ...] | None:
    if found is None:
        return None
    if not isinstance(found, tuple) or not all(type(n) is int and n >= 0 for n in found):
        raise FormatError(f"{path}: {found!r} is no shape")
    return tuple(found)


def _entries(
    what: str, values: Any, pointers: Any, shape: tuple[int, ...] | None
) -> TensorDelta | None:
    """The chosen entries of one parameter, in the dtype of training; None where it was frozen."""
    if values is None or pointers is None or shape is None:
        return None
    coordinates = torch_pickle.array(f"{what}: pointers", pointers)
    if coordinates.ndim != 2 or coordinates.dtype.kind != "i":
        raise FormatError(f"{what}: pointers are {coordinates.dtype} {list(coordinates.shape)}")
    flat = flattened(what, shape, coordinates.T)
    weights = torch_pickle.array(f"{what}: values", values)
    if flat.size == 0 and weights.size == 0:
        return None  # of no chosen entry the toolkit keeps a tensor of whatever shape
    indices, ordered = in_order(what, shape, flat, weights)
    return TensorDelta(
        name=what,
        shape=shape,
        dtype=dtype_of(ordered).name,
        mode="set",
        indices=indices,
        values=ordered,
    )


def _fitted(tensor: TensorDelta, base: Checkpoint) -> tuple[TensorDelta, bool]:
    """The entries in the base's dtype, and whether they keep the trained bits.

    Weights trained in a dtype that the base's does not contain become differences, if adding those
    to the base, cast to that dtype, gives the trained bits back.
    """
    info = base.info(tensor.name)
    before = base.gather(tensor.name, tensor.indices)
    trained = tensor.values.view(tensor.kind.numpy)
    with np.errstate(over="ignore"):
        values = trained.astype(info.kind.numpy)
        if values.astype(trained.dtype).tobytes() == trained.tobytes():
            return replace(tensor, dtype=info.dtype, values=values, base_values=before), True
        wide = before.view(info.kind.numpy).astype(trained.dtype).view(tensor.kind.words)
    change = proven_differences(wide, tensor.values, tensor.kind)
    if change is not None and info.kind.compute == change.dtype:
        return replace(tensor, dtype=info.dtype, mode="add", values=change), True
    kept = replace(
        tensor, dtype=info.dtype, trained_dtype=info.dtype, values=values, base_values=before
    )
    return kept, False


def _statistics(
    path: Path, norms: Sequence[dict[str, Any]], order: Order, base: Checkpoint
) -> dict[str, Array]:
    """BatchNorm statistics by name in the base, those that differ from it."""
    extras = {}
    for module, norm in zip(order.batch_norms, norms, strict=True):
        for part in _STATISTICS:
            name = f"{module}.{part}"
            array = torch_pickle.array(f"{path}: {name!r}", norm.get(part))
            info = base.tensors.get(name)
            if info is None:
                extras[name] = np.array(array)
            elif info.shape != array.shape:
                raise FormatError(f"{path}: {name!r} is {list(array.shape)}, not {info.shape}")
            elif array.astype(info.kind.numpy).tobytes() != base.read(name).tobytes():
                extras[name] = array.astype(info.kind.numpy)
    return extras
