"""While the support is fixed, layers compute the gradients of their entries and no others.

Each tapped layer turns its input and its output's gradient into the gradient of a compact leaf,
the tensor's carrier. Autograd does the rest: layers called twice, accumulation, checkpointing and
compilation need no care. The weight still requires a gradient, and any use of it elsewhere (a
functional decoder tied to the embedding) reaches the engine's dense hook, so the sum is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deltakit.training.entries import Entries, Target
from deltakit.training.gradient_path import GradientPath, embedding_path, product_path
from deltakit.training.tapped_layer import can_tap, tap, untap

Choice = Callable[[torch.nn.Module, Target], GradientPath]


def cheapest(layer: torch.nn.Module, target: Target) -> GradientPath:
    """By the cost model of `training.gradient_path`."""
    height, width = target.parameter.shape
    nnz = len(target.indices)
    if isinstance(layer, torch.nn.Embedding):
        return embedding_path((height, width), nnz)
    positions = target.indices // width, target.indices % width
    rows, columns = (len(torch.unique(at)) for at in positions)
    bits = torch.finfo(target.parameter.dtype).bits
    return product_path((height, width), nnz, rows, columns, bits=bits)


class FixedSupport:
    """Taps on the layers of a model that hold `entries`, as they are now, until `close`.

    paths: by tensor name, where its entries' gradients come from: "sampled" products, the
    "submatrix" of occupied rows and columns, or the "dense" gradient through the engine's hook.
    choose: picks among them for the layers that can be tapped.
    """

    def __init__(self, model: torch.nn.Module, entries: Entries, choose: Choice = cheapest) -> None:
        self.paths: dict[str, GradientPath] = {}
        self._layers: list[torch.nn.Module] = []
        self._hooks: list[Any] = []
        owners: dict[int, list[torch.nn.Module]] = {}
        for module in model.modules():
            if can_tap(module):
                owners.setdefault(id(module.weight), []).append(module)
        for target in entries.targets:
            if len(target.indices):
                layers = owners.get(id(target.parameter), [])
                path = choose(layers[-1], target) if layers else "dense"
                self.paths[target.name] = path
                if path != "dense":
                    self._tap(entries, target, layers, path)

    def close(self) -> None:
        """Give every layer its own forward back."""
        for layer in self._layers:
            untap(layer)
        for hook in self._hooks:
            hook.remove()
        self._layers, self._hooks = [], []

    def _tap(
        self,
        entries: Entries,
        target: Target,
        layers: Sequence[torch.nn.Module],
        path: GradientPath,
    ) -> None:
        indices, order = torch.sort(target.indices)
        slots = target.slots[order.to(target.slots.device)]
        carrier = torch.nn.Parameter(indices.new_zeros(len(indices), dtype=entries.base.dtype))

        def receive(_: torch.Tensor) -> None:
            assert carrier.grad is not None
            entries.gradient.index_add_(0, slots, carrier.grad.to(entries.base))
            carrier.grad = None

        register: Any = carrier.register_post_accumulate_grad_hook  # untyped in torch
        self._hooks.append(register(receive))
        for layer in layers:
            tap(layer, path, indices, carrier)
            self._layers.append(layer)
