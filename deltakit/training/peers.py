"""Peers to compare with: full fine-tuning, the head alone, and adapters of the `peft` library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from deltakit.errors import BudgetError, ConfigError
from deltakit.registry import Registry


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that a peer works on. layers: the linear layers among the targets, by name."""

    model: torch.nn.Module
    budget: int
    seed: int
    layers: Mapping[str, Any]


# Makes weights trainable, and tells how to get those of the result beside the head, once trained;
# None: all of the model.
Result = Callable[[], dict[str, torch.Tensor]]
Prepare = Callable[[Subject], "Result | None"]
PEERS: Registry[Prepare] = Registry("peer")
RATES = {"full": 2e-4, "lora": 5e-3, "shira": 1e-2}  # for small models; the head has `head_lr`
LINEAR = (torch.nn.Linear, Conv1D)


@PEERS.register("full", "all weights, densely")
def full(subject: Subject) -> None:
    """Leave every weight trainable; the result is a whole checkpoint."""
    subject.model.requires_grad_(requires_grad=True)


@PEERS.register("head", "what the base lacks, alone")
def head(subject: Subject) -> Result:
    """Freeze all; the head is made trainable for every peer alike."""
    subject.model.requires_grad_(requires_grad=False)
    return dict


@PEERS.register("lora", "low-rank adapters of peft on the same targets", "LoRA, Hu et al. 2022")
def lora(subject: Subject) -> Result:
    """LoRA without dropout at alpha = 2 r, of the largest rank that the budget allows."""
    rank, names = largest_rank(subject, LINEAR)
    options = {"lora_alpha": 2 * rank, "fan_in_fan_out": _transposed(subject)}
    return _injected(subject.model, _peft().LoraConfig(r=rank, target_modules=names, **options))


@PEERS.register("shira", "random sparse adapters of peft", "SHiRA, Bhardwaj et al. 2024")
def shira(subject: Subject) -> Result:
    """SHiRA with random masks, of the largest rank that the budget allows."""
    rank, names = largest_rank(subject, (torch.nn.Linear,))
    config = _peft().ShiraConfig(r=rank, random_seed=subject.seed, target_modules=names)
    return _injected(subject.model, config)


def largest_rank(subject: Subject, kinds: tuple[Any, ...]) -> tuple[int, list[str]]:
    """The rank whose number of weights is nearest to the budget and not above it, and the layers.

    An adapter of rank r has r * (rows + columns) weights per layer, never more than the smallest
    layer itself. kinds: classes of layers that it can be put on. Raises BudgetError where even rank
    1 is above, ConfigError without layers.
    """
    shapes = {n: m.weight.shape for n, m in subject.layers.items() if isinstance(m, kinds)}
    smallest = sum(rows + columns for rows, columns in shapes.values())
    if not smallest:
        raise ConfigError("adapters need linear layers among the targets, found none")
    if subject.budget < smallest:
        raise BudgetError(
            f"adapters of rank 1 on the {len(shapes)} targeted layers have {smallest:,} "
            f"weights, above the budget of {subject.budget:,}; raise it or narrow the target"
        )
    sensible = min(rows * columns // (rows + columns) for rows, columns in shapes.values())
    return min(subject.budget // smallest, max(1, sensible)), list(shapes)


def _transposed(subject: Subject) -> bool:
    """Whether the layers keep their weights as GPT-2 does, [in, out]."""
    return not any(isinstance(layer, torch.nn.Linear) for layer in subject.layers.values())


def _peft() -> Any:
    if find_spec("peft") is None:
        raise ConfigError(
            "lora and shira need peft, which is not installed; pip install 'deltakit-sparse[peers]'"
        )
    import peft

    return peft


def _injected(model: torch.nn.Module, config: Any) -> Result:
    """Put adapters into a model, whose own class stays, and freeze the rest."""
    peft = _peft()
    peft.inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # as peft.get_peft_model has it for models in half precision
            parameter.data = parameter.data.float()
    return lambda: dict(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
