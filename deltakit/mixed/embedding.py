"""Embeddings whose rows of the batch have entries of their own: looked up, then set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deltakit.errors import ConfigError
from deltakit.mixed.changes import Change
from deltakit.mixed.rows import Rows


class BatchedEmbedding:
    """Forward hook of an embedding: a changed weight takes the place of the base's, bit for bit.

    changes: task -> its change of the weight [tokens, features]. scale: what the layer multiplies
    its vectors by, if it does.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        changes: Mapping[int, Change],
        scale: torch.Tensor | float | None,
    ) -> None:
        self.name = name
        self._height, width = shape
        tasks = sorted(changes)
        # Sorted, since tasks are taken in order and indices are sorted within each.
        self._keys = torch.cat(
            [changes[task].indices // width + task * self._height for task in tasks]
        )
        self._columns = torch.cat([changes[task].indices % width for task in tasks])
        values = torch.cat([changes[task].value for task in tasks])
        self._values = values if scale is None else values * _as_factor(scale, values)

    def __call__(
        self, rows: Rows, args: tuple[Any, ...], named: Mapping[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        """The looked up vectors [batch, tokens, features] with each row's entries in place.

        Positions, looked up once for all rows as [1, tokens] or [tokens], are repeated for every
        row; [tokens] that might as well be rows are refused.
        """
        tokens: torch.Tensor = (*args, *named.values())[0]
        if len(rows) > 1 and tokens.ndim == 1 and rows.has_rows(tokens):
            raise ConfigError(
                f"layer {self.name!r} looks up {len(tokens)} ids, which may be the batch's rows or "
                "positions that all rows share; run the tasks one by one (dk.applied)"
            )
        if len(rows) > 1 and (tokens.ndim == 1 or (tokens.ndim == 2 and len(tokens) == 1)):
            tokens = tokens.expand(rows.batch, -1)
            output = output.expand(rows.batch, -1, -1).contiguous()
        ids = rows.chunks(tokens, self.name).reshape(len(rows), -1)
        wanted = (ids + rows.numbers(ids.device)[:, None] * self._height).reshape(-1)
        first = torch.searchsorted(self._keys, wanted)
        counts = torch.searchsorted(self._keys, wanted, right=True) - first
        token = torch.repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        entry = torch.arange(len(token), device=token.device) + (first - before)[token]
        output.view(-1, output.shape[-1])[token, self._columns[entry]] = self._values[entry]
        return output


def _as_factor(scale: torch.Tensor | float, values: torch.Tensor) -> torch.Tensor | float:
    return scale.to(values) if isinstance(scale, torch.Tensor) else scale
