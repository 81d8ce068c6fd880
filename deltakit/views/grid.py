"""The tensors of a delta as a grid: blocks of layers against the kinds of tensor in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from deltakit.changes import Changes
from deltakit.dtypes import Array
from deltakit.groups import block_of, kind_of, natural_order

Cell = tuple["Counted", ...]


class Counted(Protocol):
    """What a grid needs of a tensor; a header's record and a tensor of a delta have it."""

    @property
    def name(self) -> str:
        """The tensor's name."""

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""

    @property
    def nnz(self) -> int:
        """Entries in the delta."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerGrid:
    """Every tensor of a delta in one cell of R blocks by C kinds.

    rows: the blocks, in natural order. columns: the kinds of tensor inside a block, also.
    names[R][C]: the tensors of each cell, none, one or several (experts of one layer). entries:
    int64 [R, C]. density: entries as a share of the cell's elements, float64 [R, C] in [0, 1], NaN
    where there is no tensor. mean_change: mean |change| over the cell's entries, float64 [R, C],
    NaN where it is not known.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    names: tuple[tuple[tuple[str, ...], ...], ...]
    entries: Array
    density: Array
    mean_change: Array

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain lists; what is not known stays NaN."""
        return {
            "rows": list(self.rows),
            "columns": list(self.columns),
            "names": [[list(cell) for cell in row] for row in self.names],
            "entries": self.entries.tolist(),
            "density": self.density.tolist(),
            "mean_change": self.mean_change.tolist(),
        }


def layer_grid(
    tensors: Iterable[Counted], changes: Mapping[str, Changes] | None = None
) -> LayerGrid:
    """The grid of some tensors; changes: name -> statistics of |change|, where they are known."""
    cells: dict[tuple[str, str], list[Counted]] = {}
    for tensor in tensors:
        cells.setdefault(place_of(tensor.name), []).append(tensor)
    rows = sorted({block for block, _ in cells}, key=natural_order)
    columns = sorted({kind for _, kind in cells}, key=natural_order)
    grid = [[tuple(cells.get((row, column), ())) for column in columns] for row in rows]

    def array(measure: Callable[[Cell], float], dtype: type) -> Array:
        flat = [measure(cell) for row in grid for cell in row]
        return np.array(flat, dtype).reshape(len(rows), len(columns))

    known = changes or {}
    return LayerGrid(
        rows=tuple(rows),
        columns=tuple(columns),
        names=tuple(tuple(tuple(t.name for t in cell) for cell in row) for row in grid),
        entries=array(lambda cell: sum(t.nnz for t in cell), np.int64),
        density=array(_density, np.float64),
        mean_change=array(lambda cell: _mean_change(cell, known), np.float64),
    )


def place_of(name: str) -> tuple[str, str]:
    """The block of a tensor, and its kind inside the block.

    `encoder.layer.3.output.dense.weight` -> (`encoder.layer.3`, `output.dense.weight`). Numbers
    inside a block become `*`, so that the experts of a layer share a cell.
    """
    block = block_of(name)
    inside = name[len(block) + 1 :] or name.rpartition(".")[2]  # the name itself can be the block
    return block, kind_of(inside)


def _density(cell: Cell) -> float:
    elements = sum(t.numel for t in cell)
    if not elements:
        return 0.0 if cell else np.nan
    return sum(t.nnz for t in cell) / elements


def _mean_change(cell: Cell, changes: Mapping[str, Changes]) -> float:
    together = Changes.combined(changes[t.name] for t in cell if t.name in changes)
    return together.mean if together.known else np.nan
