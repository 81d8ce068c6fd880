"""Extras: whole tensors that are trained densely beside the entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(eq=False)
class Extra:
    """One tensor trained densely: the live parameter and its float32 master (itself if float32)."""

    name: str
    parameter: torch.nn.Parameter
    master: torch.nn.Parameter
    updates: int = 0

    @property
    def gradient(self) -> torch.Tensor | None:
        """The gradient in the master's dtype, or None."""
        grad = self.parameter.grad
        return None if grad is None else grad.to(self.master.dtype)

    @torch.no_grad()
    def write_through(self) -> None:
        """Round the master into the live parameter."""
        if self.master is not self.parameter:
            self.parameter.copy_(self.master)


def make_extra(name: str, parameter: torch.nn.Parameter) -> Extra:
    """An extra whose master is float32 where the parameter is narrower."""
    if parameter.dtype in (torch.float32, torch.float64):
        return Extra(name, parameter, parameter)
    return Extra(name, parameter, torch.nn.Parameter(parameter.detach().float()))
