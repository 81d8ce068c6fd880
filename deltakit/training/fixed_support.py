"""While the support is fixed, layers compute the gradients of their entries and no others.

Each tapped layer turns its input and its output's gradient into the gradient of a compact leaf,
the tensor's carrier. Autograd does the rest: layers called twice, accumulation, checkpointing and
compilation need no care. The weight still requires a gradient, and any use of it elsewhere (a
functional decoder tied to the embedding) reaches the engine's dense hook, so the sum is exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.hooks import RemovableHandle

from deltakit.gradient_hooks import after_accumulation
from deltakit.parallel.sharded_averaging import ShardedAveraging
from deltakit.quantized.addition import Addition
from deltakit.quantized.target import QuantisedTarget
from deltakit.training.entries import Entries
from deltakit.training.gradient_path import GradientPath, embedding_path, product_path
from deltakit.training.tapped_layer import Carried, can_tap, tap, untap
from deltakit.training.target import Target

Choice = Callable[[torch.nn.Module, Target], GradientPath]


def cheapest(layer: torch.nn.Module, target: Target) -> GradientPath:
    """By the cost model of `training.gradient_path`."""
    height, width = target.parameter.shape
    nnz = len(target.indices)
    if isinstance(layer, torch.nn.Embedding):
        return embedding_path((height, width), nnz)
    positions = target.indices // width, target.indices % width
    rows, columns = (len(torch.unique(at)) for at in positions)
    bits, on_cpu = torch.finfo(target.parameter.dtype).bits, target.parameter.device.type == "cpu"
    return product_path((height, width), nnz, rows, columns, bits=bits, on_cpu=on_cpu)


def bias_is_sparse(target: Target) -> bool:
    """Whether gathering the entries of a vector costs less than summing all of it."""
    return target.parameter.ndim == 1 and 16 * len(target.indices) <= target.numel


class FixedSupport:
    """Taps on the layers of a model that hold `entries`, as they are now, until `close`.

    paths: by tensor name, where its entries' gradients come from: "sampled" products, the
    "submatrix" of occupied rows and columns, or the "dense" gradient through the engine's hook.
    choose: picks among them for the layers that can be tapped. sharded: how the entries of each
    process, of which this one has its own, are told of and their gradients handed to it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        entries: Entries,
        choose: Choice = cheapest,
        sharded: ShardedAveraging | None = None,
    ) -> None:
        self._entries, self._sharded = entries, sharded
        self._layers: list[torch.nn.Module] = []
        self._additions: list[Addition] = []
        self._hooks: list[RemovableHandle] = []
        owners: dict[int, list[torch.nn.Module]] = {}
        for module in model.modules():
            if can_tap(module):
                owners.setdefault(id(module.weight), []).append(module)
        everywhere = sharded.everywhere if sharded else lambda target: target
        trained = [t for t in map(everywhere, entries.targets) if len(t.indices)]
        biases = {id(t.parameter): t for t in trained if bias_is_sparse(t)}
        tapped: dict[int, Carried] = {}  # biases that a layer's tap carries already
        self.paths: dict[str, GradientPath] = {target.name: "dense" for target in trained}
        for target in trained:
            if isinstance(target, QuantisedTarget):
                self._tap_addition(target, choose(target.layer, target))
                continue
            layers = owners.get(id(target.parameter))
            path = choose(layers[-1], target) if layers else "dense"
            if not layers or path == "dense":
                continue
            self.paths[target.name] = path
            carried = self._carried(target)
            for layer in layers:
                bias = biases.get(id(layer._parameters.get("bias")))
                if bias is not None and id(bias) not in tapped:
                    tapped[id(bias)] = self._carried(bias)
                    self.paths[bias.name] = "sampled"
                tap(layer, path, carried, None if bias is None else tapped[id(bias)])
                self._layers.append(layer)

    def close(self) -> None:
        """Give every layer its own forward back."""
        for layer in self._layers:
            untap(layer)
        for addition in self._additions:
            addition.untap()
        for hook in self._hooks:
            hook.remove()
        self._layers, self._additions, self._hooks = [], [], []

    def _tap_addition(self, target: QuantisedTarget, path: GradientPath) -> None:
        self.paths[target.name] = path
        if path != "dense":
            target.addition.tap(path, self._carried(target))
            self._additions.append(target.addition)

    def _carried(self, target: Target) -> Carried:
        """A target's indices, sorted, and a carrier whose gradient reaches the entries'."""
        base = self._entries.base
        indices, order = torch.sort(target.indices)
        carrier = torch.nn.Parameter(indices.new_zeros(len(indices), dtype=base.dtype))
        take = self._sharded.taking(target) if self._sharded else self._taking(target, order)

        def receive(_: torch.Tensor) -> None:
            assert carrier.grad is not None
            take(carrier.grad.to(base))
            carrier.grad = None

        self._hooks.append(after_accumulation(carrier, receive))
        return indices, carrier

    def _taking(self, target: Target, order: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """What adds the gradient of a target's entries, [nnz] in this order, to all of theirs."""
        slots = target.slots[order.to(target.slots.device)]

        def take(gradient: torch.Tensor) -> None:
            self._entries.gradient.index_add_(0, slots, gradient)

        return take
