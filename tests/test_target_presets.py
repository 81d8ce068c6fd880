"""Target presets: the very tensors, listed by hand, for every architecture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import deltakit as dk
from deltakit.errors import ConfigError
from deltakit.live.coordinates import checkpoint_names
from deltakit.selection.allocation import allocate
from deltakit.targets.patterns import matching
from deltakit.targets.preset_names import TARGET_PRESETS
from deltakit.targets.presets import preset_tensors
from deltakit.targets.roles import roles
from deltakit.training.targets import choose_targets

SMALL: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 12,
}
BERT, DEBERTA = "bert.encoder.layer.0.", "deberta.encoder.layer.0."
OPT, LLAMA, PHI = "model.decoder.layers.0.", "model.layers.0.", "model.layers.0."
ENCODER, DECODER = "encoder.block.0.layer.", "decoder.block.0.layer."
T5_ATTENTIONS = [
    f"{ENCODER}0.SelfAttention.",
    f"{DECODER}0.SelfAttention.",
    f"{DECODER}1.EncDecAttention.",
]
T5_MLP = [f"{at}.DenseReluDense.{w}" for at in (f"{ENCODER}1", f"{DECODER}2") for w in ("wi", "wo")]
ENDS = ("weight", "bias")


def _each(prefix: str, *names: str, ends: tuple[str, ...] = ("weight",)) -> list[str]:
    return [f"{prefix}{name}.{end}" for name in names for end in ends]


MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=4,
            ffn_dim=12,
            word_embed_proj_dim=4,
            max_position_embeddings=8,
        ),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2)),
    "bert": (BertForSequenceClassification, BertConfig(**SMALL, max_position_embeddings=8)),
    "deberta-v2": (
        DebertaV2ForSequenceClassification,
        DebertaV2Config(
            **SMALL,
            max_position_embeddings=8,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            share_att_key=False,
        ),
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=20, d_model=8, d_kv=2, d_ff=12, num_layers=1, num_heads=4),
    ),
    "vit": (
        ViTForImageClassification,
        ViTConfig(
            **{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=4, patch_size=2
        ),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=4),
    ),
}
EXPECTED: dict[str, dict[str, list[str]]] = {
    "opt": {
        "attention-qv": _each(f"{OPT}self_attn.", "q_proj", "v_proj"),
        "attention-qkv": _each(f"{OPT}self_attn.", "q_proj", "k_proj", "v_proj"),
        "attention": _each(f"{OPT}self_attn.", "q_proj", "k_proj", "v_proj", "out_proj"),
        "mlp": _each(OPT, "fc1", "fc2"),
        "all-linear": _each(f"{OPT}self_attn.", "q_proj", "k_proj", "v_proj", "out_proj")
        + _each(OPT, "fc1", "fc2")
        + _each("model.decoder.", "project_in", "project_out"),
        "bias": _each(f"{OPT}self_attn.", "q_proj", "k_proj", "v_proj", "out_proj", ends=("bias",))
        + _each(OPT, "fc1", "fc2", ends=("bias",)),
        "norm": _each(OPT, "self_attn_layer_norm", "final_layer_norm", ends=ENDS)
        + _each("model.decoder.", "final_layer_norm", ends=ENDS),
        "embeddings": _each("model.decoder.", "embed_tokens", "embed_positions"),
    },
    "llama": {
        "attention-qv": _each(f"{LLAMA}self_attn.", "q_proj", "v_proj"),
        "attention-qkv": _each(f"{LLAMA}self_attn.", "q_proj", "k_proj", "v_proj"),
        "attention": _each(f"{LLAMA}self_attn.", "q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": _each(f"{LLAMA}mlp.", "gate_proj", "up_proj", "down_proj"),
        "all-linear": _each(f"{LLAMA}self_attn.", "q_proj", "k_proj", "v_proj", "o_proj")
        + _each(f"{LLAMA}mlp.", "gate_proj", "up_proj", "down_proj"),
        "bias": [],
        "norm": _each(
            "model.", "layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"
        ),
        "embeddings": ["model.embed_tokens.weight"],
    },
    "bert": {
        "attention-qv": _each(f"{BERT}attention.self.", "query", "value"),
        "attention-qkv": _each(f"{BERT}attention.self.", "query", "key", "value"),
        "attention": _each(f"{BERT}attention.", "self.query", "self.key", "self.value")
        + _each(f"{BERT}attention.", "output.dense"),
        "mlp": _each(BERT, "intermediate.dense", "output.dense"),
        "all-linear": _each(f"{BERT}attention.", "self.query", "self.key", "self.value")
        + _each(BERT, "attention.output.dense", "intermediate.dense", "output.dense")
        + ["bert.pooler.dense.weight"],
        "bias": _each(
            f"{BERT}attention.",
            *("self.query", "self.key", "self.value", "output.dense"),
            ends=("bias",),
        )
        + _each(BERT, "intermediate.dense", "output.dense", ends=("bias",))
        + ["bert.pooler.dense.bias", "classifier.bias"],
        "norm": _each(BERT, "attention.output.LayerNorm", "output.LayerNorm", ends=ENDS)
        + _each("bert.embeddings.", "LayerNorm", ends=ENDS),
        "embeddings": _each(
            "bert.embeddings.", "word_embeddings", "position_embeddings", "token_type_embeddings"
        ),
    },
    "deberta-v2": {
        "attention-qv": _each(f"{DEBERTA}attention.self.", "query_proj", "value_proj"),
        "attention-qkv": _each(f"{DEBERTA}attention.self.", "query_proj", "key_proj", "value_proj"),
        "attention": _each(f"{DEBERTA}attention.self.", "query_proj", "key_proj", "value_proj")
        + _each(f"{DEBERTA}attention.", "output.dense"),
        "mlp": _each(DEBERTA, "intermediate.dense", "output.dense"),
        "all-linear": _each(f"{DEBERTA}attention.self.", "query_proj", "key_proj", "value_proj")
        + _each(f"{DEBERTA}attention.self.", "pos_key_proj", "pos_query_proj")
        + _each(DEBERTA, "attention.output.dense", "intermediate.dense", "output.dense"),
        "bias": _each(
            f"{DEBERTA}attention.",
            *("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
            *("self.pos_key_proj", "self.pos_query_proj"),
            ends=("bias",),
        )
        + _each(DEBERTA, "intermediate.dense", "output.dense", ends=("bias",))
        + ["pooler.dense.bias", "classifier.bias"],
        "norm": _each(DEBERTA, "attention.output.LayerNorm", "output.LayerNorm", ends=ENDS)
        + _each("deberta.embeddings.", "LayerNorm", ends=ENDS),
        "embeddings": _each(
            "deberta.",
            *("embeddings.word_embeddings", "embeddings.position_embeddings"),
            "encoder.rel_embeddings",
        ),
    },
    "t5": {
        "attention-qv": [n for at in T5_ATTENTIONS for n in _each(at, "q", "v")],
        "attention-qkv": [n for at in T5_ATTENTIONS for n in _each(at, "q", "k", "v")],
        "attention": [n for at in T5_ATTENTIONS for n in _each(at, "q", "k", "v", "o")],
        "mlp": _each("", *T5_MLP),
        "all-linear": [n for at in T5_ATTENTIONS for n in _each(at, "q", "k", "v", "o")]
        + _each("", *T5_MLP),
        "bias": [],
        "norm": _each(ENCODER, "0.layer_norm", "1.layer_norm")
        + _each(DECODER, "0.layer_norm", "1.layer_norm", "2.layer_norm")
        + ["encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"],
        "embeddings": ["shared.weight"]
        + [f"{at}relative_attention_bias.weight" for at in T5_ATTENTIONS[:2]],
    },
    "vit": {
        "attention-qv": _each("vit.layers.0.attention.", "q_proj", "v_proj"),
        "attention-qkv": _each("vit.layers.0.attention.", "q_proj", "k_proj", "v_proj"),
        "attention": _each("vit.layers.0.attention.", "q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": _each("vit.layers.0.mlp.", "fc1", "fc2"),
        "all-linear": _each("vit.layers.0.attention.", "q_proj", "k_proj", "v_proj", "o_proj")
        + _each("vit.layers.0.mlp.", "fc1", "fc2"),
        "bias": _each(
            "vit.layers.0.attention.", "q_proj", "k_proj", "v_proj", "o_proj", ends=("bias",)
        )
        + _each("vit.layers.0.mlp.", "fc1", "fc2", ends=("bias",))
        + ["vit.embeddings.patch_embeddings.projection.bias", "classifier.bias"],
        "norm": _each("vit.layers.0.", "layernorm_before", "layernorm_after", ends=ENDS)
        + _each("vit.", "layernorm", ends=ENDS),
        "embeddings": [
            "vit.embeddings.cls_token",
            "vit.embeddings.position_embeddings",
            "vit.embeddings.patch_embeddings.projection.weight",
        ],
    },
    "gpt2": {
        "attention-qv": ["transformer.h.0.attn.c_attn.weight"],
        "attention-qkv": ["transformer.h.0.attn.c_attn.weight"],
        "attention": _each("transformer.h.0.attn.", "c_attn", "c_proj"),
        "mlp": _each("transformer.h.0.mlp.", "c_fc", "c_proj"),
        "all-linear": _each("transformer.h.0.attn.", "c_attn", "c_proj")
        + _each("transformer.h.0.mlp.", "c_fc", "c_proj"),
        "bias": _each("transformer.h.0.attn.", "c_attn", "c_proj", ends=("bias",))
        + _each("transformer.h.0.mlp.", "c_fc", "c_proj", ends=("bias",)),
        "norm": _each("transformer.", "h.0.ln_1", "h.0.ln_2", "ln_f", ends=ENDS),
        "embeddings": ["transformer.wte.weight", "transformer.wpe.weight"],
    },
}


def _model(name: str) -> PreTrainedModel:
    kind, config = MODELS[name]
    torch.manual_seed(0)
    return kind(config)


@pytest.mark.parametrize("name", MODELS)
def test_presets_take_the_tensors_listed(name: str) -> None:
    model = _model(name)
    names = checkpoint_names(model, None)
    for preset in TARGET_PRESETS:
        expected = EXPECTED[name][preset]
        assert sorted(preset_tensors(preset, model)) == sorted(expected), preset
        if expected:
            assert matching(preset, names, "target", model).keys() == set(expected)
        else:
            with pytest.raises(ConfigError, match=f"{preset!r} matches no tensor"):
                matching(preset, names, "target", model)


@pytest.mark.parametrize("name", MODELS)
def test_linear_weights_biases_norms_and_embeddings_make_up_the_model(name: str) -> None:
    """Every parameter is in one of them, or belongs to a head."""
    model = _model(name)
    whole = [
        n for p in ("all-linear", "bias", "norm", "embeddings") for n in preset_tensors(p, model)
    ]
    heads = [n for n, role in roles(model).items() if role.kind == "head"]
    assert sorted(whole + heads) == sorted(n for n, _ in model.named_parameters())
    assert all(n.startswith(("classifier", "pooler", "lm_head")) for n in heads)


def _changed(
    model: nn.Module, target: str, exclude: str | list[str] = ()
) -> dict[str, torch.Tensor]:
    """What moves when every entry that a target allows is trained, by parameter."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    targets, _ = choose_targets(model, checkpoint_names(model, None), target, exclude, ())
    budget = sum(t.numel - len(t.blocked()) for t in targets)
    tuner = dk.SparseTuner(
        model, dk.RandomMask(budget=budget), lr=1e-2, target=target, exclude=exclude
    )
    tokens = torch.arange(16).reshape(2, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()
    tuner.step()
    return {n: p.detach() != before[n] for n, p in model.named_parameters()}


def test_queries_and_values_of_a_fused_transposed_weight_alone() -> None:
    """GPT-2: columns of c_attn [in, 3 in]; the key's are never touched."""
    name = "transformer.h.0.attn.c_attn.weight"
    moved = _changed(_model("gpt2").eval(), "attention-qv")
    assert [n for n, mask in moved.items() if mask.any()] == [name]
    assert moved[name][:, :8].all() and moved[name][:, 16:].all()
    assert not moved[name][:, 8:16].any()
    moved = _changed(_model("gpt2").eval(), "attention", ["attention-qv"])
    assert not moved[name][:, :8].any() and not moved[name][:, 16:].any()
    assert moved[name][:, 8:16].any() and moved["transformer.h.0.attn.c_proj.weight"].any()


def test_queries_and_values_of_a_fused_weight_with_grouped_queries() -> None:
    """Phi-3: rows of qkv_proj, 4 heads of queries and 2 of keys and values, 2 wide."""
    model = Phi3ForCausalLM(Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0)).eval()
    moved = _changed(model, "attention-qv")["model.layers.0.self_attn.qkv_proj.weight"]
    assert moved.any(1).tolist() == [True] * 8 + [False] * 4 + [True] * 4
    assert preset_tensors("mlp", model).keys() == set(
        _each(f"{PHI}mlp.", "gate_up_proj", "down_proj")
    )


def test_a_weight_fused_head_by_head() -> None:
    """DeBERTa v1: the model's own split of in_proj into queries, keys and values."""
    config = DebertaConfig(**SMALL, relative_attention=True, pos_att_type=["c2p"])
    model = DebertaForSequenceClassification(config)
    name = f"{DEBERTA}attention.self.in_proj.weight"
    part = preset_tensors("attention-qv", model)[name]
    chunks = torch.arange(24).chunk(4 * 3)
    kept = sorted(int(i) for n, chunk in enumerate(chunks) if n % 3 != 1 for i in chunk)
    assert part is not None and np.flatnonzero(part).tolist() == kept
    assert f"{DEBERTA}attention.self.q_bias" in preset_tensors("bias", model)


def test_torchs_own_attention_and_orders_that_are_not_known() -> None:
    model = nn.Module()
    model.attention = nn.MultiheadAttention(8, 2)
    part = preset_tensors("attention-qv", model)["attention.in_proj_weight"]
    assert part is not None and np.flatnonzero(part).tolist() == [*range(8), *range(16, 24)]
    strange = nn.Module()
    strange.attention = nn.Module()
    strange.attention.query_key_value = nn.Linear(8, 24)
    assert list(preset_tensors("attention", strange)) == ["attention.query_key_value.weight"]
    with pytest.raises(ConfigError, match="in an order that is not known"):
        preset_tensors("attention-qv", strange)


def test_presets_mix_with_patterns() -> None:
    model = _model("gpt2")
    names = checkpoint_names(model, None)
    fused = "transformer.h.0.attn.c_attn.weight"
    assert matching(["attention-qv", "*c_attn*"], names, "t", model)[fused] is None
    assert matching("attention-qv", names, "t", model)[fused] is not None
    targets, extras = choose_targets(model, names, None, ["embeddings", "norm"], "bias")
    assert [t.live_name for t in targets] == sorted(EXPECTED["gpt2"]["all-linear"])
    assert sorted(extras) == sorted(EXPECTED["gpt2"]["bias"])
    with pytest.raises(ConfigError, match=r"'atention' matches no tensor.*presets: attention-qv"):
        matching("atention", names, "target pattern", model)


def test_allocations_by_preset() -> None:
    model = _model("llama")
    targets, _ = choose_targets(model, checkpoint_names(model, None), "all-linear", (), ())
    free = [t.numel for t in targets]
    made = allocate("attention=0.25,mlp=0.75", targets, free, 100, model)
    assert made is not None
    counts = np.bincount(made, minlength=len(targets))
    inside = [t.live_name in EXPECTED["llama"]["attention"] for t in targets]
    assert counts[inside].sum() == 25
