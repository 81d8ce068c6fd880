"""What is trained live merges into the files it was loaded from, whatever the architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

import deltakit as dk
from deltakit.errors import BaseMismatchError, CoordinateError

SMALL: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2}
ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "bert, tied decoder": (
        BertForMaskedLM,
        BertConfig(**SMALL, num_attention_heads=2, intermediate_size=24),
    ),
    "gpt2, Conv1D and tied": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2),
    ),
    "llama, grouped queries": (
        LlamaForCausalLM,
        LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24),
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig(**SMALL, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16),
    ),
}


def _train(model: PreTrainedModel, tuner: dk.SparseTuner, steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(0, 60, (4, 8), generator=generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        tuner.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_live_bits_equal_merged_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, config = ARCHITECTURES[name]
    torch.manual_seed(0)
    kind(config).to(dtype).save_pretrained(tmp_path / "base", max_shard_size="10KB")
    live = kind.from_pretrained(tmp_path / "base")
    live.eval()  # no dropout, so that nothing but training changes between runs
    tuner = dk.SparseTuner(live, dk.ID3(budget=150, steps=3), lr=1e-2)
    _train(live, tuner)
    delta = tuner.delta()
    assert delta.nnz == 150 and not delta.extras
    dk.save(delta, tmp_path / "d.sdelta")
    dk.merge(tmp_path / "base", [tmp_path / "d.sdelta"], tmp_path / "merged")
    merged = kind.from_pretrained(tmp_path / "merged")
    applied = kind.from_pretrained(tmp_path / "base")
    handle = dk.apply(applied, delta)
    for (parameter, a), (_, b), (_, c) in zip(
        live.named_parameters(), merged.named_parameters(), applied.named_parameters(), strict=True
    ):
        assert torch.equal(a, b) and torch.equal(a, c), parameter
    handle.revert()
    untouched = kind.from_pretrained(tmp_path / "base").state_dict()
    assert all(torch.equal(t, untouched[n]) for n, t in applied.state_dict().items())


def test_applying_is_refused_on_the_wrong_model_and_leaves_it_alone(tmp_path: Path) -> None:
    kind, config = ARCHITECTURES["llama, grouped queries"]
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


def test_weighted_deltas_apply_together_as_they_merge(tmp_path: Path) -> None:
    kind, config = ARCHITECTURES["opt"]
    torch.manual_seed(0)
    kind(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    deltas = []
    for seed in (1, 2):
        model = kind.from_pretrained(tmp_path / "base").eval()
        tuner = dk.SparseTuner(model, dk.RandomMask(budget=3000, seed=seed), lr=1e-2)
        _train(model, tuner)
        deltas.append(tuner.delta())
    dk.merge(tmp_path / "base", deltas, tmp_path / "merged", weights=[0.7, -1.3])
    merged = kind.from_pretrained(tmp_path / "merged").state_dict()
    live = kind.from_pretrained(tmp_path / "base")
    with dk.applied(live, deltas, [0.7, -1.3]):
        assert all(torch.equal(t, merged[n]) for n, t in live.state_dict().items())
