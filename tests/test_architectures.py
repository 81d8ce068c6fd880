"""What is trained live merges into the files it was loaded from, whatever the architecture."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import deltakit as dk
from deltakit.errors import BaseMismatchError, CoordinateError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify

Make = Callable[[random.Random], tuple[type[PreTrainedModel], Any]]


def _sizes(choice: random.Random, **more: Any) -> dict[str, Any]:
    heads = choice.choice([2, 4])
    return {
        "vocab_size": 60,
        "hidden_size": heads * choice.choice([4, 8]),
        "num_hidden_layers": choice.choice([1, 2]),
        "num_attention_heads": heads,
        "intermediate_size": choice.choice([20, 24]),
        **more,
    }


def _opt(choice: random.Random) -> tuple[type[PreTrainedModel], Any]:
    sizes = _sizes(choice)
    sizes["ffn_dim"] = sizes.pop("intermediate_size")
    return OPTForCausalLM, OPTConfig(**sizes, word_embed_proj_dim=sizes["hidden_size"])


def _gpt2(choice: random.Random) -> tuple[type[PreTrainedModel], Any]:
    sizes = _sizes(choice)
    return GPT2LMHeadModel, GPT2Config(
        vocab_size=60,
        n_positions=32,
        n_embd=sizes["hidden_size"],
        n_layer=sizes["num_hidden_layers"],
        n_head=sizes["num_attention_heads"],
    )


def _t5(choice: random.Random) -> tuple[type[PreTrainedModel], Any]:
    return T5ForConditionalGeneration, T5Config(
        vocab_size=60,
        d_model=choice.choice([8, 16]),
        d_kv=choice.choice([4, 8]),
        d_ff=24,
        num_layers=choice.choice([1, 2]),
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=choice.choice([True, False]),
    )


def _vit(choice: random.Random) -> tuple[type[PreTrainedModel], Any]:
    sizes = _sizes(choice, image_size=8, patch_size=choice.choice([2, 4]), num_labels=5)
    del sizes["vocab_size"]
    return ViTForImageClassification, ViTConfig(**sizes)


ARCHITECTURES: dict[str, Make] = {
    "bert, tied decoder": lambda c: (BertForMaskedLM, BertConfig(**_sizes(c))),
    "deberta, own prefix": lambda c: (
        DebertaV2ForMaskedLM,
        DebertaV2Config(**_sizes(c, relative_attention=True, pos_att_type=["p2c", "c2p"])),
    ),
    "gpt2, Conv1D and tied": _gpt2,
    "llama, grouped queries": lambda c: (
        LlamaForCausalLM,
        LlamaConfig(**_sizes(c, num_key_value_heads=c.choice([1, 2]))),
    ),
    "mamba, state space": lambda c: (
        MambaForCausalLM,
        MambaConfig(
            vocab_size=60, hidden_size=16, state_size=c.choice([4, 8]), num_hidden_layers=2
        ),
    ),
    "mixtral, fused experts": lambda c: (
        MixtralForCausalLM,
        MixtralConfig(**_sizes(c, num_key_value_heads=2, num_local_experts=c.choice([2, 3]))),
    ),
    "opt": _opt,
    "t5, shared embeddings": _t5,
    "vit, renamed modules": _vit,
}


def _loss(model: PreTrainedModel, generator: torch.Generator) -> torch.Tensor:
    if isinstance(model, ViTForImageClassification):
        pixels = torch.rand(4, 3, 8, 8, generator=generator).to(model.dtype)
        return torch.as_tensor(model(pixel_values=pixels, labels=torch.arange(4)).loss)
    tokens = torch.randint(0, 60, (4, 8), generator=generator)
    return torch.as_tensor(model(input_ids=tokens, labels=tokens).loss)


def _train(model: PreTrainedModel, tuner: dk.SparseTuner, steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        _loss(model, generator).backward()
        tuner.step()


def _saved(name: str, folder: Path, dtype: torch.dtype, seed: int = 0) -> type[PreTrainedModel]:
    kind, config = ARCHITECTURES[name](random.Random(f"{name} {seed} {dtype}"))
    torch.manual_seed(seed)
    kind(config).to(dtype).save_pretrained(folder, max_shard_size="10KB")
    return kind


def _equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_live_bits_equal_merged_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind = _saved(name, tmp_path / "base", dtype)
    live = kind.from_pretrained(tmp_path / "base")
    live.eval()  # no dropout, so that nothing but training changes between runs
    tuner = dk.SparseTuner(live, dk.ID3(budget=150, steps=3), lr=1e-2)
    _train(live, tuner)
    delta = tuner.delta()
    assert delta.nnz == 150 and not delta.extras
    dk.save(delta, tmp_path / "d.sdelta")
    dk.merge(tmp_path / "base", [tmp_path / "d.sdelta"], tmp_path / "merged")
    assert _equal(live, kind.from_pretrained(tmp_path / "merged"))
    again = kind.from_pretrained(tmp_path / "base")
    handle = dk.apply(again, delta)
    assert _equal(live, again)
    handle.revert()
    assert _equal(again, kind.from_pretrained(tmp_path / "base"))


def _random_delta(base: Checkpoint, seed: int) -> dk.SparseDelta:
    """Entries in every tensor of a checkpoint, whatever the model calls them."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, info in base.tensors.items():
        count = min(info.numel, int(rng.integers(1, 30)))
        tensors[name] = dk.TensorDelta(
            name=name,
            shape=info.shape,
            dtype=info.dtype,
            mode="add",
            indices=np.sort(rng.choice(info.numel, count, replace=False)),
            values=rng.standard_normal(count) * 0.1,
        )
    identity = identify(base, {n: t.indices for n, t in tensors.items()})
    return dk.SparseDelta(tensors=tensors, base=identity)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_file_deltas_give_the_live_model_the_merged_bits(
    name: str, seed: int, tmp_path: Path
) -> None:
    kind = _saved(name, tmp_path / "base", torch.bfloat16, seed)
    base = Checkpoint(tmp_path / "base")
    deltas = [_random_delta(base, seed), _random_delta(base, seed + 10)]
    dk.merge(tmp_path / "base", deltas, tmp_path / "merged", weights=[0.7, -1.3])
    live = kind.from_pretrained(tmp_path / "base")
    with dk.applied(live, deltas, [0.7, -1.3]):
        assert _equal(live, kind.from_pretrained(tmp_path / "merged"))
    assert _equal(live, kind.from_pretrained(tmp_path / "base"))


def test_training_goes_on_from_a_delta_of_fused_experts(tmp_path: Path) -> None:
    kind = _saved("mixtral, fused experts", tmp_path / "base", torch.float32)
    first = kind.from_pretrained(tmp_path / "base").eval()
    experts = "*experts*"
    tuner = dk.SparseTuner(first, dk.RandomMask(budget=60, seed=1), lr=1e-2, target=experts)
    _train(first, tuner)
    earlier = tuner.delta()
    assert all("experts." in name and ".w" in name for name in earlier.tensors)
    second = kind.from_pretrained(tmp_path / "base").eval()
    tuner = dk.SparseTuner(
        second,
        dk.RandomMask(budget=100, seed=2),
        lr=1e-2,
        target=experts,
        init_delta=earlier,
    )
    _train(second, tuner)
    delta = tuner.delta()
    assert delta.nnz == 100
    for name, tensor in earlier.tensors.items():
        assert np.isin(tensor.indices, delta.tensors[name].indices).all()
    dk.merge(tmp_path / "base", delta, tmp_path / "merged")
    assert _equal(second, kind.from_pretrained(tmp_path / "merged"))
    third = kind.from_pretrained(tmp_path / "base").eval()
    avoiding = dk.SparseTuner(
        third, dk.RandomMask(budget=100, seed=2), lr=1e-2, target=experts, avoid=[earlier]
    )
    _train(third, avoiding)
    apart = avoiding.delta()
    for name, tensor in earlier.tensors.items():
        if name in apart.tensors:
            assert not np.isin(tensor.indices, apart.tensors[name].indices).any()


def test_applying_is_refused_on_the_wrong_model_and_leaves_it_alone(tmp_path: Path) -> None:
    kind, config = ARCHITECTURES["llama, grouped queries"](random.Random(0))
    torch.manual_seed(0)
    model = kind(config)
    tuner = dk.SparseTuner(model, dk.ID3(budget=150, steps=3), lr=1e-2)
    _train(model, tuner)
    delta = tuner.delta()
    other = kind(config)  # other random weights
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(BaseMismatchError, match="the delta belongs to another base"):
        dk.apply(other, delta)
    with pytest.raises(CoordinateError, match="the model has no tensor 'lm_head"):
        dk.apply(torch.nn.Linear(2, 2), delta)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
    dk.apply(other, delta, allow_base_mismatch=True).revert()
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
