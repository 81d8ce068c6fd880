"""Which rows of a batch belong to which task, and where the rows are in a layer's activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from deltakit.errors import ConfigError


class Rows:
    """The tasks of a batch's rows, and the sizes of the calls under way.

    tasks: one number per row, 0 for the base. Where `generate` repeats rows (beams, returned
    sequences) each row's copies stand together, so row r is chunk r of any leading size that is a
    multiple of the rows, tokens flattened behind their row included. A leading size counts as one
    of rows only if the model, or a model inside it, was called with it: tokens picked out of the
    batch by a router must not pass for rows.
    """

    def __init__(self, tasks: Sequence[int]) -> None:
        self.tasks = tuple(tasks)
        self.batch = len(self.tasks)  # rows of the call under way, copies counted
        self._sizes: dict[torch.nn.Module, set[tuple[int, int]]] = {}
        self._numbers: dict[torch.device, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.tasks)

    def enter(self, module: torch.nn.Module, args: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Forward pre-hook of a model: learn its batch size and number of tokens."""
        inputs = [
            value
            for value in (*args, *named.values())
            if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0]
        ]
        fitting = [value for value in inputs if value.shape[0] % len(self) == 0]
        if inputs and not fitting:
            raise ConfigError(
                f"the batch has {inputs[0].shape[0]} rows, expected {len(self)}, as many as tasks "
                "were named for it, or a multiple where generation repeats rows"
            )
        if fitting:
            self.batch = fitting[0].shape[0]
            self._sizes[module] = {(len(value), _tokens(value)) for value in fitting}

    def has_rows(self, activations: torch.Tensor) -> bool:
        """Whether the leading dimension is that of the batch, or of the batch's tokens."""
        if activations.ndim == 0 or len(self) == 1:
            return activations.ndim > 0
        known = {size for sizes in self._sizes.values() for size in sizes}
        allowed = {batch for batch, _ in known}
        if activations.ndim < 3:
            allowed |= {batch * tokens for batch, tokens in known}
        return activations.shape[0] in allowed

    def chunks(self, activations: torch.Tensor, name: str) -> torch.Tensor:
        """[batch, ...] or [batch * tokens, ...] as a view [rows, n, ...].

        Raises ConfigError where the leading dimension is another; name: of the layer.
        """
        if not self.has_rows(activations):
            raise ConfigError(
                f"layer {name!r}: activations of shape {list(activations.shape)} do not lead with "
                f"the batch of {self.batch} or its tokens, so rows cannot be told apart there; "
                "run the tasks one by one (dk.applied)"
            )
        return activations.reshape(len(self), -1, *activations.shape[1:])

    def groups(self, wanted: Iterable[int]) -> Iterator[tuple[int, list[int]]]:
        """Each of the wanted tasks that has rows, and its rows."""
        for task in wanted:
            rows = [row for row, each in enumerate(self.tasks) if each == task]
            if rows:
                yield task, rows

    def numbers(self, device: torch.device) -> torch.Tensor:
        """The rows' tasks, int64 [rows]."""
        if device not in self._numbers:
            self._numbers[device] = torch.tensor(self.tasks, device=device)
        return self._numbers[device]


def select(chunks: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Rows of [rows, ...], without a copy where they stand together."""
    if list(rows) == list(range(rows[0], rows[-1] + 1)):
        return chunks[rows[0] : rows[-1] + 1]
    return chunks[torch.tensor(rows, device=chunks.device)]


def _tokens(inputs: torch.Tensor) -> int:
    """Tokens per row of ids [batch, tokens] or embeddings [batch, tokens, features]."""
    has_tokens = inputs.ndim == 3 or (inputs.ndim == 2 and not inputs.is_floating_point())
    return inputs.shape[1] if has_tokens else 1
