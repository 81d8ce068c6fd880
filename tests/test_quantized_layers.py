"""Quantising a model's layers: which, how, and that nothing else of it changes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes import functional
from quantized_bases import HOWS, LAYERS, batch, codes, dense, plain, quantized
from tiny_models import write_bert, write_gpt2, write_llama, write_t5

import deltakit as dk
from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.live.coordinates import coordinates
from deltakit.quantized.layers import quantised_layers, quantization_of
from deltakit.quantized.replacing import quantize_model
from deltakit.quantized.scheme import Quantization


def write_opt(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=2,
        ffn_dim=32,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    return folder


# Writer, class to load, number of quantised layers, and parts of names that stay.
SHAPES: dict[str, tuple[Any, str, int, tuple[str, ...]]] = {
    "bert": (write_bert, "AutoModelForSequenceClassification", 13, ("classifier",)),
    "llama": (write_llama, "AutoModelForCausalLM", 14, ("lm_head",)),
    "opt": (write_opt, "AutoModelForCausalLM", 12, ("lm_head",)),
    "t5": (write_t5, "AutoModelForSeq2SeqLM", 28, ("lm_head", "wo")),
    "gpt2": (write_gpt2, "AutoModelForCausalLM", 8, ("lm_head",)),
}


def load(name: str, folder: Path) -> Any:
    writer, kind, *_ = SHAPES[name]
    writer(folder)
    return getattr(transformers, kind).from_pretrained(folder)


@pytest.mark.parametrize("name", SHAPES)
def test_linear_layers_but_heads_become_codes(name: str, tmp_path: Path) -> None:
    model = load(name, tmp_path)
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    quantize_model(model, Quantization(kind="nf4"))
    found = quantised_layers(model)
    assert len(found) == SHAPES[name][2]
    stay = SHAPES[name][3]
    assert not any(part in stay for path in found for part in path.split("."))
    for path, parameter in model.named_parameters():
        if path not in found:
            assert torch.equal(parameter, original[path])
    for path, layer in found.items():
        weight = original[path].t() if name == "gpt2" else original[path]
        expected, _ = functional.quantize_4bit(weight.contiguous(), quant_type="nf4")
        assert torch.equal(layer.weight.data, expected)


@pytest.mark.parametrize("name", SHAPES)
def test_a_delta_is_trained_merged_and_applied_in_checkpoint_coordinates(
    name: str, tmp_path: Path
) -> None:
    """GPT-2's weights are held transposed by the checkpoint."""
    model = load(name, tmp_path / "base")
    quantize_model(model, Quantization(kind="nf4"))
    tuner = dk.SparseTuner(model, dk.RandomMask(budget=400), lr=1e-2, target="all-linear")
    for _ in range(2):
        torch.autograd.backward(_loss(name, model.train()))
        tuner.step()
    delta = tuner.delta()
    base = Checkpoint(tmp_path / "base")
    for tensor in delta.tensors.values():
        assert tensor.shape == base.info(tensor.name).shape
    dk.merge(tmp_path / "base", [delta], tmp_path / "merged")
    again = SHAPES[name][1]
    fresh = getattr(transformers, again).from_pretrained(tmp_path / "base")
    fresh.load_state_dict(
        {n: p for n, p in model.state_dict().items() if "classifier" in n}, strict=False
    )
    quantize_model(fresh, Quantization(kind="nf4"))
    with torch.no_grad():
        before = _loss(name, fresh.eval())
        with dk.applied(fresh, delta):
            assert torch.equal(_loss(name, fresh), _loss(name, model.eval()))
            assert _loss(name, fresh) != before
        assert torch.equal(_loss(name, fresh), before)
    merged = getattr(transformers, again).from_pretrained(tmp_path / "merged")
    live, where = dict(merged.named_parameters()), coordinates(merged, base)
    untouched = getattr(transformers, again).from_pretrained(tmp_path / "base")
    for path, parameter in untouched.named_parameters():
        tensor = delta.tensors.get(where.names[path] or "")
        moved = (live[path] != parameter).sum().item()
        assert "classifier" in path or moved == (
            0 if tensor is None else (tensor.values != 0).sum()
        )


def _loss(name: str, model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, 24, (3, 8), generator=generator)
    labels = torch.tensor([0, 1, 1]) if name == "bert" else tokens
    found: torch.Tensor = model(input_ids=tokens, labels=labels).loss
    return found


@pytest.mark.parametrize("how", HOWS)
def test_layers_multiply_by_what_their_codes_stand_for(how: str) -> None:
    model = quantized(how).train()
    tokens, _ = batch()
    torch.testing.assert_close(model(tokens), dense(model, plain())(tokens), atol=1e-5, rtol=1e-4)
    found = quantization_of(model)
    assert found is not None
    assert (found.kind, found.double) == (HOWS[how].kind, HOWS[how].double)


def test_other_compute_dtypes_leave_biases_as_they_are() -> None:
    model = plain()
    quantize_model(model, Quantization(kind="nf4", compute_dtype="bfloat16"))
    before = codes(model)
    tokens, _ = batch()
    narrow = model(tokens)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, quantized()(tokens), atol=3e-2, rtol=3e-2)
    assert all(torch.equal(bits, before[name]) for name, bits in codes(model).items())


def test_skipped_and_new_weights_stay() -> None:
    model = quantize_model(plain(), HOWS["nf4"], skip="up", new=["down.weight"])
    assert list(quantised_layers(model)) == ["twice.weight"]
    assert quantization_of(plain()) is None
    assert set(quantised_layers(quantized())) == set(LAYERS)


def test_mistakes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="has no linear layer of float32 or 16 bits"):
        quantize_model(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), HOWS["nf4"])
    with pytest.raises(ConfigError, match="has no linear layer"):
        quantize_model(plain(torch.float64), HOWS["nf4"])
    with pytest.raises(ConfigError, match="unknown quantisation 'nf5'"):
        Quantization(kind="nf5")
    with pytest.raises(ConfigError, match="int8 has neither"):
        Quantization(kind="int8", double=True)
    with pytest.raises(ConfigError, match="double_quantization needs a quantised base"):
        Quantization.of(None, double=True, compute_dtype=None)
    monkeypatch.delitem(sys.modules, "deltakit.quantized.library")
    for name in ("bitsandbytes", "bitsandbytes.nn", "bitsandbytes.autograd._functions"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"need bitsandbytes: pip install 'deltakit-sparse\[8bit"):
        quantize_model(plain(), HOWS["nf4"])
