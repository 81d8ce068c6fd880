"""Entries beside a quantised layer: a forward hook that makes its y = W x into y = W x + S x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils.hooks import RemovableHandle

from deltakit.errors import ConfigError
from deltakit.quantized.product import Pattern, add_product
from deltakit.quantized.stand_in import StandIn
from deltakit.training.gradient_path import GradientPath
from deltakit.training.tapped_layer import Carried, compressed, occupied
from deltakit.training.taps import DenseTap, SampledTap, SubmatrixTap

Use = Literal["applied", "trained"]


class Addition:
    """S of one layer, float32, in the layer's own coordinates [out, in].

    indices: flat, int64 [nnz], sorted; values: float32 [nnz]. whole: in training, the leaf whose
    dense gradient backward computes while it requires one and no entries are tapped.
    """

    def __init__(self, layer: Any, use: Use) -> None:
        self.use = use
        self.shape = (int(layer.out_features), int(layer.in_features))
        device = layer.weight.device
        self.indices = torch.zeros(0, dtype=torch.int64, device=device)
        self.values = torch.zeros(0, device=device)
        self.whole: StandIn | None = None
        self._pattern: Pattern | None = None
        self._tap: tuple[Any, ...] | None = None
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._hook: RemovableHandle = layer.register_forward_hook(self, with_kwargs=True)

    def __call__(
        self,
        layer: torch.nn.Module,
        inputs: tuple[Any, ...],
        named: Mapping[str, Any],
        output: torch.Tensor,
    ) -> torch.Tensor:
        """The layer's output with the entries' part, and gradients for who asks for them."""
        (x,) = (*inputs, *named.values())
        if self._pattern is not None:
            output = add_product(output, x, self.values, self._pattern)
        if self._tap is not None:
            tap, carrier, pattern = self._tap
        elif self.whole is not None and self.whole.requires_grad:
            tap, carrier, pattern = DenseTap, self.whole, ()
        else:
            return output
        # Autocast may have narrowed the output; products need both in one dtype.
        return tap.apply(output, x.to(output.dtype), carrier, None, *pattern)  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """Copies, pickled ones too, have the entries and are not in training."""
        return {**vars(self), "whole": None, "_tap": None, "_last": None}

    def write(self, indices: torch.Tensor, values: torch.Tensor) -> None:
        """Give entries these values: flat, int64 [n], in any order; others stay."""
        if self._last is None or self._last[0] is not indices:
            together = torch.unique(torch.cat([self.indices, indices]))
            if len(together) > len(self.indices):
                old, kept = self.values, torch.searchsorted(together, self.indices)
                self.become(together, old.new_zeros(len(together)).index_copy_(0, kept, old))
            self._last = indices, torch.searchsorted(self.indices, indices)
        self.values.index_copy_(0, self._last[1], values.to(self.values))

    def remove(self, indices: torch.Tensor) -> None:
        """Take entries out."""
        stay = ~torch.isin(self.indices, indices)
        self.become(self.indices[stay], self.values[stay])

    def become(self, indices: torch.Tensor, values: torch.Tensor) -> None:
        """Hold these entries, sorted, and no others."""
        self.indices, self.values, self._last = indices, values, None
        self._pattern = Pattern.of(indices, self.shape) if len(indices) else None

    def tap(self, path: GradientPath, entries: Carried) -> None:
        """Let backward give a carrier the gradients of entries; see `tapped_layer.tap`."""
        assert self.whole is not None
        indices, carrier = entries
        none = indices[:0]
        if path == "submatrix":
            pattern: Sequence[Any] = (none, *occupied(indices, self.whole), False)
            self._tap = SubmatrixTap, carrier, pattern
        else:
            self._tap = SampledTap, carrier, (none, *compressed(indices, self.whole), False)

    def untap(self) -> None:
        """Leave the gradients to `whole` again."""
        self._tap = None

    def close(self) -> None:
        """End training; entries stay, and without any the layer is as it was."""
        self.whole = self._tap = self._last = None
        if not len(self.indices):
            self._hook.remove()


def addition_of(layer: torch.nn.Module) -> Addition | None:
    """What stands beside a layer."""
    return next((h for h in layer._forward_hooks.values() if isinstance(h, Addition)), None)


def addition(name: str, layer: torch.nn.Module, use: Use) -> Addition:
    """What stands beside a layer for one use, put there where nothing is.

    name: of the weight. Raises ConfigError while entries of the other use stand there.
    """
    found = addition_of(layer)
    if found is not None and (found.use == use == "applied"):
        return found
    if found is not None:
        if len(found.indices):
            told = {"applied": "an applied delta; revert it", "trained": "an earlier training run"}
            raise ConfigError(
                f"tensor {name!r} is quantised and holds entries of {told[found.use]}, or load the "
                "base anew"
            )
        found.close()
    return Addition(layer, use)
