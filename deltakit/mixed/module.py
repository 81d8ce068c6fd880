"""Modules run again for each task's rows, with the task's tensors in place of their own.

The way for whatever is neither a linear layer nor an embedding: norms, convolutions, positions and
class tokens held by a module itself, attention in one module, experts in one tensor, whole heads.
It is exact for every module that treats rows independently. Rows whose task changes nothing there
keep what the module gave them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from deltakit.errors import ConfigError
from deltakit.mixed.changes import Change
from deltakit.mixed.rows import Rows, select

KEPT = 2**16  # elements of a changed tensor up to which it is made once and kept

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor stands: `name` in `module`'s parameters or buffers."""

    module: torch.nn.Module
    name: str

    @property
    def registry(self) -> dict[str, Any]:
        """The parameters or buffers it is among."""
        held: dict[str, Any] = self.module._parameters
        return held if self.name in held else self.module._buffers

    @property
    def tensor(self) -> torch.Tensor:
        """What stands there."""
        found: torch.Tensor = self.registry[self.name]
        return found


class BatchedModule:
    """Forward hook of a module of any kind.

    changes: task -> its changes of tensors in the module or below it.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        changes: Mapping[int, Sequence[tuple[Place, Change]]],
    ) -> None:
        self.name, self._module = name, module
        self._changes = {task: [Changed(*pair) for pair in changes[task]] for task in changes}

    def __call__(
        self, rows: Rows, args: tuple[Any, ...], named: Mapping[str, Any], output: Any
    ) -> Any:
        """The module's output with the rows of tasks that change it run again."""
        result = self._map(output, lambda whole: _for_rows(whole, rows.batch).clone())
        for task, members in rows.groups(self._changes):
            inputs = _Selection(rows, members, self.name)
            few = [inputs.of(value) for value in args]
            few_named = {key: inputs.of(value) for key, value in named.items()}
            with in_place_of(self._changes[task]):
                again = self._module.forward(*few, **few_named)
            if not (inputs.found or _is_shared(output)):
                raise ConfigError(
                    f"layer {self.name!r} is not given the batch's rows, so they cannot have "
                    "weights of their own there; run the tasks one by one (dk.applied)"
                )
            self._write(rows, members, again, result)
        return result

    def _map(self, output: Any, function: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return function(output)
        if type(output) in (tuple, list):
            return type(output)(self._map(each, function) for each in output)
        if output is None:
            return None
        raise ConfigError(
            f"layer {self.name!r} returns a {type(output).__name__}, expected tensors, of which "
            "rows can be taken; run the tasks one by one (dk.applied)"
        )

    def _write(self, rows: Rows, members: list[int], again: Any, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            chunks = rows.chunks(result, self.name)
            at = torch.tensor(members, device=result.device)
            again = _for_rows(again, len(members) * rows.batch // len(rows))
            chunks.index_copy_(0, at, again.reshape(len(members), *chunks.shape[1:]))
        elif result is not None:
            for part, whole in zip(again, result, strict=True):
                self._write(rows, members, part, whole)


def _is_shared(output: Any) -> bool:
    """Whether all rows share what a module returns, [1, tokens, features], as positions are."""
    return isinstance(output, torch.Tensor) and output.ndim > 2 and len(output) == 1


def _for_rows(output: torch.Tensor, batch: int) -> torch.Tensor:
    return output.expand(batch, *output.shape[1:]) if _is_shared(output) else output


@contextmanager
def in_place_of(changed: Sequence[Changed]) -> Iterator[None]:
    """Let modules find changed tensors in place of their own, for the length of the block."""
    before = [(each.place.registry, each.place.name, each.place.tensor) for each in changed]
    try:
        for each in changed:
            each.place.registry[each.place.name] = each.tensor()
        yield
    finally:
        for registry, name, tensor in before:
            registry[name] = tensor


class Changed:
    """A tensor as one task has it; large ones are made when they are needed."""

    def __init__(self, place: Place, change: Change) -> None:
        self.place, self._change = place, change
        self._kept = change.whole
        if self._kept is None and place.tensor.numel() <= KEPT:
            self._kept = self._made()

    def tensor(self) -> torch.Tensor:
        """The whole tensor, in the live one's shape and dtype."""
        return self._made() if self._kept is None else self._kept

    def _made(self) -> torch.Tensor:
        new = self.place.tensor.detach().clone(memory_format=torch.contiguous_format)
        new.view(-1)[self._change.indices] = self._change.value
        return new


class _Selection:
    """Takes some rows of a module's arguments."""

    def __init__(self, rows: Rows, members: list[int], name: str) -> None:
        self.found = False
        self._rows, self._members, self._name = rows, members, name

    def of(self, value: Any) -> Any:
        """The same argument for the chosen rows; what has no rows is given as it is."""
        if isinstance(value, torch.Tensor):
            if value.ndim < 2 or not self._rows.has_rows(value):
                return value
            self.found = True
            return select(self._rows.chunks(value, self._name), self._members).flatten(0, 1)
        if type(value) in (tuple, list):
            return type(value)(self.of(each) for each in value)
        if isinstance(value, _PLAIN):
            return value
        raise ConfigError(
            f"layer {self._name!r} is given a {type(value).__name__}, of which rows cannot be "
            "taken; run the tasks one by one (dk.applied)"
        )
