"""Preconditioning: gradients made comparable between rows and columns before they are scored.

The raw gradient of a linear layer, a sum of products of errors and inputs, is largest where a
few inputs or errors are large, so its top entries crowd into few columns and rows and all say the
same. Divided by the factored root mean square they spread, as Adam's own update does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from deltakit.errors import ConfigError

PRECONDITIONS = ("none", "factored")


def check_precondition(name: str) -> None:
    """Raise ConfigError for a name that is no preconditioning."""
    if name not in PRECONDITIONS:
        raise ConfigError(f"unknown precondition {name!r}; known: {', '.join(PRECONDITIONS)}")


def factored_rms(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (rows [R, 1], columns [1, C]) whose product divides a gradient [R, C].

    The rank-one estimate of the second moment, g_ij^2 ~ r_i c_j / mean(r) with r and c the mean
    squares of rows and columns (Adafactor, Shazeer and Stern 2018, algorithm 1), of this one
    gradient. A single row is divided by its root mean square. Returned are reciprocal roots,
    float32, 0 where a row or column is all zero; the products of gradient and factors have no unit.
    """
    if gradient.shape[0] == 1:
        rms = _mean_square(gradient, 1).sqrt()
        return _reciprocal(rms), torch.ones(1, 1, device=gradient.device)
    rows, columns = _mean_square(gradient, 1), _mean_square(gradient, 0)
    mean = rows.double().mean().float()
    return _reciprocal((rows / mean).sqrt()), _reciprocal(columns.sqrt())


def factored_rms_of_part(
    part: torch.Tensor, total: Callable[[torch.Tensor], None], *, is_row: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`factored_rms` of a gradient of which this process holds the rows `part`, [r, C].

    The factors of these rows, and of all columns, rounded where `factored_rms` rounds: where one
    row alone has a gradient all of its scores are one, but for rounding. total: adds to sums those
    of the other processes. is_row: the whole gradient is one row, and `part` some of its elements,
    [1, c].
    """
    if is_row:
        sums = torch.stack([_squares(part, (0, 1)).view(()), _count(part, part.numel())])
        total(sums)
        rms = (sums[:1, None] / sums[1]).float().sqrt()
        return _reciprocal(rms), torch.ones(1, 1, device=part.device)
    rows, columns = _mean_square(part, 1), _squares(part, 0)[0]
    sums = torch.cat([columns, rows.double().sum().view(1), _count(part, len(part)).view(1)])
    total(sums)
    columns, mean = (sums[:-2] / sums[-1]).float(), (sums[-2] / sums[-1]).float()
    return _reciprocal((rows / mean).sqrt()), _reciprocal(columns.sqrt())[None]


def _squares(gradient: torch.Tensor, dim: int | tuple[int, int]) -> torch.Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    norm: torch.Tensor = torch.linalg.vector_norm(gradient, dim=dim, keepdim=True, dtype=wide)
    return norm.double().square()


def _count(like: torch.Tensor, number: int) -> torch.Tensor:
    return torch.tensor(float(number), dtype=torch.float64, device=like.device)


def _mean_square(gradient: torch.Tensor, dim: int) -> torch.Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    norm: torch.Tensor = torch.linalg.vector_norm(gradient, dim=dim, keepdim=True, dtype=wide)
    return (norm.square() / gradient.shape[dim]).float()


def _reciprocal(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values > 0, values.reciprocal(), torch.zeros_like(values))
