"""Small models for mixed batches, deltas of all their tensors, and rows run one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import deltakit as dk

WORDS = 40
TASKS = ("a", "b", "c")
ROWS = ("a", "b", None, "a", "c")

_HEADS: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA = {**_HEADS, "num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": WORDS}
_BART = {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
}

MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertForSequenceClassification(
        BertConfig(**_HEADS, intermediate_size=32, vocab_size=WORDS)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=WORDS, bos_token_id=1, eos_token_id=2)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_LLAMA, num_local_experts=4)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**_HEADS, ffn_dim=32, vocab_size=WORDS, word_embed_proj_dim=16)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(**_BART, d_model=16, vocab_size=WORDS, scale_embedding=True)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            vocab_size=WORDS,
            decoder_start_token_id=0,
        )
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(**_HEADS, intermediate_size=32, image_size=8, patch_size=4, num_channels=1)
    ),
}
ENCODER_DECODERS = ("bart", "t5")
GENERATING = ("gpt2", "llama", "opt", "bart", "t5")


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A random model whose norms and biases are not the ones and zeros that hide mistakes."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().to(dtype)
    if name == "mixtral":  # torch's grouped product knows no float64
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def delta_of(
    model: torch.nn.Module,
    seed: int,
    density: float = 0.05,
    mode: str = "add",
    tensors: Sequence[str] | None = None,
    size: float = 0.3,
) -> dk.SparseDelta:
    """Random entries of all parameters, or of those named, one at least of each."""
    draw = np.random.default_rng(seed)
    found = {}
    for name, parameter in model.named_parameters():
        if tensors is not None and name not in tensors:
            continue
        count = max(1, int(density * parameter.numel()))
        dtype = str(parameter.dtype).removeprefix("torch.")
        values = draw.normal(0, size, count)
        found[name] = dk.TensorDelta(
            name=name,
            shape=tuple(parameter.shape),
            dtype=dtype,
            mode=mode,  # type: ignore[arg-type]
            indices=np.sort(draw.choice(parameter.numel(), count, replace=False)),
            values=values.astype(dtype) if mode == "set" else values,
        )
    return dk.SparseDelta(tensors=found)


def deltas_of(model: torch.nn.Module, **options: Any) -> dict[str, dk.SparseDelta]:
    """A delta per task."""
    return {task: delta_of(model, seed, **options) for seed, task in enumerate(TASKS)}


def inputs_of(name: str, rows: int = len(ROWS), dtype: torch.dtype = torch.float64) -> Any:
    """A batch of random ids, left-padded in its second row, or of random images."""
    draw = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 1, 8, 8, generator=draw).to(dtype)}
    ids = torch.randint(3, WORDS, (rows, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def as_task(
    model: Any, deltas: Mapping[str, dk.SparseDelta], task: str | None
) -> AbstractContextManager[object]:
    """The model as one task has it, for the length of a with block."""
    return nullcontext() if task is None else dk.applied(model, deltas[task])


def one_by_one(
    model: Any,
    deltas: Mapping[str, dk.SparseDelta],
    tasks: Sequence[str | None],
    inputs: dict[str, torch.Tensor],
    run: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """What each row gives alone, with its delta applied to the model."""
    outputs = []
    for row, task in enumerate(tasks):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        with torch.no_grad(), as_task(model, deltas, task):
            outputs.append(run(model, **alone))
    return torch.cat(outputs)
