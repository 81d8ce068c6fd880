"""All numbers behind the figures of one delta, from a single reading of its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

from deltakit.analyses import UnmaskingHistory
from deltakit.changes import Changes
from deltakit.inspection import Inspection
from deltakit.views.grid import LayerGrid, layer_grid
from deltakit.views.histogram import Histogram
from deltakit.views.occupancy import Occupancy, occupancy
from deltakit.views.unmasking import Joined, history_of, joined

_BINS = 64  # of the whole delta's histogram, and of a tensor's sides, where tensors are few
_TENSOR_BINS = 32  # of one tensor's histogram
_CELLS = 60_000  # over the rasters of all tensors, so that a page with them stays below 1 MB
_TENSORS_BINS = 8_000  # over the histograms of all tensors, for the same reason


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorView:
    """One tensor: how large its changes are, and where. The more tensors, the coarser both."""

    histogram: Histogram
    occupancy: Occupancy


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeltaView:
    """What figures of a delta show, in arrays whose size does not grow with the entries.

    grid: tensors by block and kind. changes: name -> statistics of |change|. histogram: of |change|
    over the whole delta, at most 64 bins. tensors: name -> its own view, in tensor order.
    unmasking: entries over the steps of training; None where they did not join over time. Of a
    delta of which only the header is here, nothing but the grid is known: its mean changes are NaN,
    `changes` and `tensors` are empty, `histogram` and `unmasking` None.
    """

    grid: LayerGrid
    changes: Mapping[str, Changes] = field(default_factory=dict)
    histogram: Histogram | None = None
    tensors: Mapping[str, TensorView] = field(default_factory=dict)
    unmasking: UnmaskingHistory | None = None

    @classmethod
    def of(cls, found: Inspection) -> DeltaView:
        """Read every sparse tensor once, checked, one after the other.

        Raises ChecksumError and FormatError for a file that is damaged.
        """
        records = found.tensors
        if found.remote:
            return cls(grid=layer_grid(records))
        changes: dict[str, Changes] = {}
        histograms: dict[str, Histogram] = {}
        occupied: dict[str, Occupancy] = {}
        steps: dict[str, Joined | None] = {}
        with found.open() as file:
            for record in records:
                tensor = file.tensor(record.name)
                changes[record.name] = Changes.of(tensor)
                histograms[record.name] = Histogram.of(tensor)
                occupied[record.name] = occupancy(tensor, _share(_CELLS, len(records)))
                steps[record.name] = joined(tensor)
                del tensor  # before the next one is read
        bins = min(_TENSOR_BINS, _TENSORS_BINS // max(len(records), 1))
        return cls(
            grid=layer_grid(records, changes),
            changes=changes,
            histogram=Histogram.combined(histograms.values()).coarsened(_BINS),
            tensors={
                name: TensorView(histogram=h.coarsened(bins), occupancy=occupied[name])
                for name, h in histograms.items()
            },
            unmasking=history_of(records, steps),
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers; null or empty where it is not known."""
        return {
            "grid": self.grid.as_dict(),
            "histogram": None if self.histogram is None else self.histogram.as_dict(),
            "tensors": {
                name: {"histogram": v.histogram.as_dict(), "occupancy": v.occupancy.as_dict()}
                for name, v in self.tensors.items()
            },
            "unmasking": None if self.unmasking is None else _unmasking(self.unmasking),
        }


def _share(cells: int, tensors: int) -> int:
    """Bins of either side, so that the rasters of so many tensors have `cells` cells together."""
    return max(1, min(_BINS, isqrt(cells // max(tensors, 1))))


def _unmasking(history: UnmaskingHistory) -> dict[str, Any]:
    kinds = {kind: counts.tolist() for kind, counts in history.by_kind().items()}
    return {"steps": history.steps.tolist(), "kinds": kinds}
