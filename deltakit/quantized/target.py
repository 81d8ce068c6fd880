"""Quantised weights as targets of training: entries of S instead of entries of W."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltakit.errors import ConfigError
from deltakit.quantized.addition import Addition, addition, addition_of
from deltakit.quantized.layers import dequantised
from deltakit.quantized.stand_in import StandIn
from deltakit.training.target import Target


@dataclass(eq=False)
class QuantisedTarget(Target):
    """A quantised layer's weight; `parameter` is its stand-in.

    Making one puts an empty addition beside the layer, which changes nothing; raises ConfigError
    while a delta is applied there. Entries are differences to codes that nobody changes, so their
    base is zero here; the delta's own base is the full-precision checkpoint.
    """

    def __post_init__(self) -> None:
        if addition_of(self.layer) is None or self.addition.whole is not self.parameter:
            addition(self.live_name, self.layer, "trained").whole = self.whole

    @property
    def whole(self) -> StandIn:
        """`parameter`, as what it is."""
        assert isinstance(self.parameter, StandIn)
        return self.parameter

    @property
    def layer(self) -> torch.nn.Module:
        """The quantised layer."""
        layer: torch.nn.Module = self.whole.layer
        return layer

    @property
    def addition(self) -> Addition:
        """Where the layer's forward reads the entries."""
        found = addition_of(self.layer)
        assert found is not None
        return found

    @property
    def flat(self) -> torch.Tensor:
        """There is none: the weights are codes."""
        raise ConfigError(
            f"tensor {self.live_name!r} is quantised, so its weights cannot be written densely"
        )

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        return self.addition.values.new_zeros(len(indices))

    def write(self, indices: torch.Tensor, values: torch.Tensor) -> None:
        """Write values of S, which stay float32."""
        self.addition.write(indices, values)

    def restore(self, indices: torch.Tensor, base: torch.Tensor) -> None:
        """Take entries out of S."""
        self.addition.remove(indices)

    def close(self) -> None:
        """Training is over; S stays."""
        self.addition.close()

    @torch.no_grad()
    def weights(self) -> torch.Tensor:
        """What the codes stand for with S added, dense: of one tensor at a time."""
        made = dequantised(self.layer).reshape(-1)
        at = self.addition.indices
        if len(at):
            made[at] = (made[at].float() + self.addition.values).to(made)
        return made
