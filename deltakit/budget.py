"""Budgets: how many entries a delta may hold, as people write them.

`100k`, `2.5m`, `1_000` are counts; `0.1%` is a share of all weights of the base.
"""

from __future__ import annotations

import re
from fractions import Fraction

from deltakit.errors import BudgetError

ALLOCATIONS = {  # ways of sharing a budget among tensors
    "global": "all tensors compete for the whole budget",
    "proportional": "in proportion to a tensor's size",
    "uniform": "the same number for every tensor",
    "erdos-renyi": "in proportion to the sum of a tensor's dimensions (Evci et al. 2020, RigL)",
}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_NUMBER = re.compile(r"(\d[\d_]*(?:\.\d+)?|\.\d+)\s*([kmbg%]?)", re.IGNORECASE)


def parse_budget(text: str | int, total: int | None = None) -> int:
    """The exact number of entries that `text` asks for.

    text: a count ("100k", "2.5m", 5000) or a share ("0.1%") of `total`, the number of all weights
    of the base; a share is rounded down. Raises BudgetError for text that is no number, for a
    count that is not whole, and for a share when `total` is unknown.
    """
    if isinstance(text, int):
        return _at_least_zero(text)
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise BudgetError(f"budget {text!r} is no number; write 100k, 2.5m, 5000 or 0.1%")
    number, unit = Fraction(match[1].replace("_", "")), match[2].lower()
    if unit == "%":
        if total is None:
            raise BudgetError(
                f"budget {text!r} is a share, but the size of the base is not known here; "
                "give a count such as 100k"
            )
        if number > 100:
            raise BudgetError(f"budget {text!r} is more than the whole base")
        return int(number * total / 100)
    count = number * _UNITS[unit]
    if count.denominator != 1:
        raise BudgetError(f"budget {text!r} is {float(count)} entries; it must be a whole number")
    return int(count)


def _at_least_zero(count: int) -> int:
    if count < 0:
        raise BudgetError(f"budget {count} is negative")
    return count


def format_count(count: int) -> str:
    """A count in human units with three significant digits: 1234567 -> '1.23M'."""
    for factor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= factor:
            digits = max(0, 3 - len(str(count // factor)))
            return f"{count / factor:.{digits}f}{unit}"
    return str(count)


def format_bytes(size: float) -> str:
    """A size in decimal units: 412345 -> '412 kB'."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= factor:
            value = size / factor
            return f"{value:.2f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{size:.0f} B"
