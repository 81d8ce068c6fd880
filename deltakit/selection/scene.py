"""Where a selective method works: the tensors it may choose from, and passes over the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from deltakit.dtypes import Array
from deltakit.errors import BudgetError, ConfigError
from deltakit.quantized.stand_in import StandIn


class Candidate(Protocol):
    """A tensor that entries may be chosen from."""

    @property
    def number(self) -> int:
        """Its place in tensor order."""

    @property
    def name(self) -> str:
        """Its name in checkpoint coordinates."""

    @property
    def live_name(self) -> str:
        """Its name in the live model."""

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The live tensor, or what stands for a quantised one: gradients reach it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""

    def blocked(self) -> Array:
        """Flat indices that are taken or must not be chosen, int64, sorted."""

    def weights(self) -> torch.Tensor:
        """The live weights, flat, to be read only; of quantised tensors what the codes stand for."""


class Calibration(Protocol):
    """Passes over the training data for methods that look at it before training.

    A batch is whatever `loss` and `logits` take. All iteration is seeded, so it can be repeated.
    """

    def batches(self, seed: int) -> Iterator[Any]:
        """Training batches in an order drawn from `seed`, without end."""

    def examples(self, count: int) -> Iterator[Any]:
        """The first `count` training examples, one batch each; fewer where there are fewer."""

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The mean training loss of a batch, a scalar that backward runs from."""

    def logits(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Class scores [..., classes] of the places of a batch that count in the loss."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a method may look at when a run begins.

    targets: in tensor order. taken: entries in training already. total_steps: optimizer steps of
    the run, if known. marks: budget checkpoints. extras: parameters trained densely (heads).
    model, calibration: for methods that need passes over the data (`calibrated`). is_split: whether
    several processes hold parts of every tensor.
    """

    targets: Sequence[Candidate]
    taken: int = 0
    total_steps: int | None = None
    marks: Sequence[int] = ()
    extras: Sequence[torch.nn.Parameter] = ()
    model: torch.nn.Module | None = None
    calibration: Calibration | None = None
    is_split: bool = False

    def free(self) -> list[int]:
        """Entries per target that can still be chosen."""
        return [target.numel - len(target.blocked()) for target in self.targets]

    def left(self, budget: int) -> int:
        """Entries left to choose; BudgetError when the targets cannot hold them."""
        left, room = budget - self.taken, sum(self.free())
        if left < 0 or left > room:
            raise BudgetError(
                f"budget {budget} cannot be met: {self.taken} entries are taken already and "
                f"{room} more can be chosen from the targets"
            )
        return left

    def calibrated(self, who: str) -> tuple[torch.nn.Module, Calibration]:
        """Model and calibration; ConfigError naming the method where there are none, and for models
        of which each process holds a part."""
        if self.is_split:
            raise ConfigError(
                f"{who} looks at gradients before it chooses, which it cannot of a sharded model; "
                "choose in a run without fully_shard and train that support here (mask), or use ID3"
            )
        if self.model is None or self.calibration is None:
            raise ConfigError(
                f"{who} looks at training data before it chooses: pass calibration= "
                "(deltakit.Batches(batches, loss)) to SparseTuner, or use SparseTrainer"
            )
        return self.model, self.calibration

    def refuse_codes(self, what: str) -> None:
        """Raise ConfigError where one of the targets is quantised; what: cannot be done with it."""
        for target in self.targets:
            if isinstance(target.parameter, StandIn):
                raise ConfigError(
                    f"{what}, and {target.live_name!r} is quantised; leave such tensors out of "
                    "target, or load the base unquantised"
                )


@contextmanager
def measuring(scene: Scene, model: torch.nn.Module, *, extras: bool = False) -> Iterator[None]:
    """Let backward reach all targets (and extras), and leave the model exactly as it was found.

    Gradients, `requires_grad`, buffers, training mode, weights of targets and extras and the
    random generators are put back, so a measurement never shows in the run that follows it.
    """
    stand_ins = [t.parameter for t in scene.targets if isinstance(t.parameter, StandIn)]
    parameters = [*model.parameters(), *stand_ins]
    wanted = {id(t.parameter) for t in scene.targets}
    wanted |= {id(p) for p in scene.extras} if extras else set()
    grads = [(p, p.requires_grad, p.grad) for p in parameters]
    kept = [p for p in model.parameters() if extras and id(p) in wanted]
    weights = [(p, p.detach().clone()) for p in kept]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    modes = [(m, m.training) for m in model.modules()]
    devices = [p.device for p in parameters[:1] if p.device.type == "cuda"]
    with torch.random.fork_rng(devices=devices):
        try:
            for parameter in parameters:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in wanted)
            yield
        finally:
            with torch.no_grad():
                for tensor, before in [*weights, *buffers]:
                    tensor.copy_(before)
            for parameter, required, grad in grads:
                parameter.requires_grad_(required)
                parameter.grad = grad
            for module, mode in modes:
                module.training = mode
