"""Tiny models of several architectures to attach adapters to, and deltas of trained ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)

from deltakit import SparseDelta, TensorDelta
from deltakit.adapters.attach import Attached
from deltakit.formats.checkpoint import Checkpoint
from deltakit.live.arrays import to_numpy

Inputs = dict[str, torch.Tensor]
TOKENS = torch.tensor([[5, 6, 7, 8], [9, 5, 10, 6]])


_LOADED: dict[str, Any] = {}  # architecture -> its model; checkpoints of one are all alike


@dataclass(frozen=True)
class Family:
    """One architecture: writes its checkpoint, loads it, and gives it something to read."""

    name: str
    write: Callable[[Path], Path]
    kind: Any
    inputs: Inputs

    def load(self, folder: Path) -> tuple[torch.nn.Module, Inputs]:
        """The model in evaluation mode, with its checkpoint written to a folder first."""
        if not any(folder.glob("*.safetensors")):
            self.write(folder)
        if self.name not in _LOADED:
            torch.manual_seed(7)  # of a head that the checkpoint lacks
            _LOADED[self.name] = self.kind.from_pretrained(folder).eval()
        model = copy.deepcopy(_LOADED[self.name])
        model.name_or_path = str(folder)
        return model, self.inputs


def write_opt(folder: Path) -> Path:
    """A decoder with learned positions and a tied output layer."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=32,
        pad_token_id=1,
    )
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


FAMILIES = [
    Family(
        "bert",
        tiny_models.write_bert,
        AutoModelForSequenceClassification,
        {"input_ids": TOKENS},
    ),
    Family("gpt2", tiny_models.write_gpt2, AutoModelForCausalLM, {"input_ids": TOKENS}),
    Family("llama", tiny_models.write_llama, AutoModelForCausalLM, {"input_ids": TOKENS}),
    Family(
        "t5",
        tiny_models.write_t5,
        AutoModelForSeq2SeqLM,
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :2]},
    ),
    Family("opt", write_opt, AutoModelForCausalLM, {"input_ids": TOKENS}),
    Family(
        "vit",
        tiny_models.write_vit,
        AutoModelForImageClassification,
        {"pixel_values": torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)},
    ),
]
BERT, GPT2, LLAMA, T5, OPT, VIT = FAMILIES


@torch.no_grad()
def outputs(model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    """The logits."""
    logits = model(**inputs).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def train(
    attached: Attached, checkpoint: Checkpoint | None = None, share: float = 0.3
) -> SparseDelta:
    """Move a share of every tensor's elements, as training would, and give the delta of it."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in attached.parameters.values():
            chosen = torch.rand(parameter.shape) < share
            parameter += torch.where(chosen, torch.randn(parameter.shape) * 0.1, 0).to(
                parameter.dtype
            )
    return delta_of(attached, checkpoint)


def delta_of(attached: Attached, checkpoint: Checkpoint | None = None) -> SparseDelta:
    """What an attached adapter holds now, by its difference to the initial values."""
    tensors = {}
    for name, parameter in attached.parameters.items():
        before, now = attached.initial[name].reshape(-1), to_numpy(parameter).reshape(-1)
        indices = np.flatnonzero(before != now)
        tensors[name] = TensorDelta(
            name=name,
            shape=tuple(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            mode="add",
            indices=indices,
            values=now[indices] - before[indices],
        )
    base = None if checkpoint is None else attached.identity(checkpoint)
    return SparseDelta(tensors=tensors, extras=attached.stored, base=base, adapter=attached.adapter)


def same_modules(model: torch.nn.Module, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether a model consists of these very modules, by name."""
    now = dict(model.named_modules())
    return now.keys() == modules.keys() and all(now[name] is modules[name] for name in now)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def parameters_with_flags(model: torch.nn.Module) -> Iterator[tuple[str, bool]]:
    """Names of parameters, and whether they require gradients."""
    for name, parameter in model.named_parameters():
        yield name, parameter.requires_grad
