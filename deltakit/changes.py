"""How far a delta moves its entries: statistics of |change|, combined over tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deltakit.delta import TensorDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Statistics of |change| over entries: |v| in add mode, |v - base| in set mode.

    known: entries whose change is known and finite; a set entry without its base value is not.
    unknown and non_finite: the other entries. zeros: known entries that change nothing.
    least, most: the smallest and largest known |change|; total: their sum (all 0.0 when none is
    known). first_step, last_step: when the first and the last entry were unmasked, or None.
    """

    known: int = 0
    unknown: int = 0
    non_finite: int = 0
    zeros: int = 0
    least: float = 0.0
    total: float = 0.0
    most: float = 0.0
    first_step: int | None = None
    last_step: int | None = None

    @property
    def mean(self) -> float:
        """Mean of the known |change|; 0.0 when none is known."""
        return self.total / self.known if self.known else 0.0

    @classmethod
    def of(cls, tensor: TensorDelta) -> Changes:
        """The statistics of one tensor."""
        order = tensor.order
        steps = (None, None) if order is None or not order.size else (order.min(), order.max())
        first, last = (None if step is None else int(step) for step in steps)
        if tensor.mode == "set" and tensor.base_values is None:
            return cls(unknown=tensor.nnz, first_step=first, last_step=last)
        with np.errstate(invalid="ignore", over="ignore"):  # set mode holds any bits
            sizes = tensor.magnitudes()
        finite = sizes[np.isfinite(sizes)]
        return cls(
            known=finite.size,
            non_finite=sizes.size - finite.size,
            zeros=finite.size - int(np.count_nonzero(finite)),
            least=float(finite.min()) if finite.size else 0.0,
            total=float(finite.sum(dtype=np.float64)),
            most=float(finite.max(initial=0.0)),
            first_step=first,
            last_step=last,
        )

    @classmethod
    def combined(cls, parts: Iterable[Changes]) -> Changes:
        """The statistics of several tensors together."""
        given = list(parts)
        told = [p for p in given if p.known]
        firsts = [p.first_step for p in given if p.first_step is not None]
        lasts = [p.last_step for p in given if p.last_step is not None]
        return cls(
            known=sum(p.known for p in given),
            unknown=sum(p.unknown for p in given),
            non_finite=sum(p.non_finite for p in given),
            zeros=sum(p.zeros for p in given),
            least=min((p.least for p in told), default=0.0),
            total=sum(p.total for p in told),
            most=max((p.most for p in told), default=0.0),
            first_step=min(firsts, default=None),
            last_step=max(lasts, default=None),
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, with the mean; null where nothing is known."""
        told: dict[str, Any] = asdict(self) | {"mean": self.mean}
        del told["total"]
        if not self.known:
            told |= dict.fromkeys(("least", "mean", "most"))
        return told
