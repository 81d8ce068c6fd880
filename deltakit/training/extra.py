"""Extras: whole tensors that are trained densely beside the entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltakit.parallel.shards import Shards, held_here


@dataclass(eq=False)
class Extra:
    """One tensor trained densely: the live parameter and its float32 master (itself if float32)."""

    name: str
    parameter: torch.nn.Parameter
    master: torch.nn.Parameter
    updates: int = 0

    @property
    def held_gradient(self) -> torch.Tensor | None:
        """The gradient of what this process holds, sharing its memory, or None."""
        return self.parameter.grad

    @property
    def gradient(self) -> torch.Tensor | None:
        """The gradient in the master's dtype, or None."""
        grad = self.held_gradient
        return None if grad is None else grad.to(self.master.dtype)

    @torch.no_grad()
    def take(self, values: torch.Tensor) -> None:
        """Start from values of the whole tensor, of its shape."""
        self.master.copy_(values)
        self.write_through()

    @torch.no_grad()
    def write_through(self) -> None:
        """Round the master into the live parameter."""
        if self.master is not self.parameter:
            self.parameter.copy_(self.master)


@dataclass(eq=False)
class ShardExtra(Extra):
    """A tensor that FSDP2 has split; the master holds the rows that are here, of which the first
    element is number `start` of the whole tensor, flat."""

    start: int = 0

    @property
    def held_gradient(self) -> torch.Tensor | None:
        """The gradient of the rows held here, or None."""
        grad = self.parameter.grad
        return None if grad is None else held_here(grad)

    @torch.no_grad()
    def take(self, values: torch.Tensor) -> None:
        """Start from values of the whole tensor, of its shape."""
        stop = self.start + self.master.numel()
        self.master.copy_(values.reshape(-1)[self.start : stop].view_as(self.master))
        self.write_through()

    @torch.no_grad()
    def write_through(self) -> None:
        """Round the master into the rows held here."""
        held_here(self.parameter).copy_(self.master)


def make_extra(name: str, parameter: torch.nn.Parameter, shards: Shards | None = None) -> Extra:
    """An extra whose master is float32 where the parameter is narrower."""
    if shards is not None:
        held = held_here(parameter)
        master = torch.nn.Parameter(held.to(torch.promote_types(held.dtype, torch.float32)))
        return ShardExtra(name, parameter, master, start=shards.start(parameter))
    if parameter.dtype in (torch.float32, torch.float64):
        return Extra(name, parameter, parameter)
    return Extra(name, parameter, torch.nn.Parameter(parameter.detach().float()))
