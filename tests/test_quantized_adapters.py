"""Adapters on quantised bases: sparsified like any, from any start, LoftQ's included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_quantized_layers import _loss
from tiny_models import write_bert, write_llama

import deltakit as dk
from deltakit.adapters.attach import attach
from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.quantized.layers import dequantised, quantised_layers
from deltakit.quantized.loftq import factors, loftq
from deltakit.quantized.replacing import quantize_model
from deltakit.quantized.scheme import Quantization


def load(folder: Path, kind: str = "nf4") -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return quantize_model(model, Quantization(kind=kind))


def attached(model: Any, folder: Path, **options: Any) -> Any:
    given = {"rank": 4, **options}
    target = "attention-qv"
    return attach(model, "lora", given, target=target, seed=3, base=Checkpoint(folder))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("start", ["seed", "loftq"])
def test_sparsified_lora_trains_on_codes_and_comes_back(
    kind: str, start: str, tmp_path: Path
) -> None:
    base = write_llama(tmp_path / "base")
    model = load(base, kind)
    adapter = attached(model, base)
    if start == "loftq":
        adapter = loftq(adapter, Checkpoint(base))
    untouched = {n: p.detach().clone() for n, p in adapter.parameters.items()}
    method = dk.ID3(budget=90, steps=2)
    tuner = dk.SparseTuner(model, method, lr=1e-2, adapter=adapter, base=base)
    for _ in range(4):
        torch.autograd.backward(_loss("llama", model.train()))
        tuner.step()
    delta = tuner.delta()
    assert delta.nnz == 90
    assert delta.provenance["quantization"]["kind"] == kind
    for name, before in untouched.items():
        moved = (adapter.parameters[name] != before).reshape(-1).nonzero().view(-1).tolist()
        assert set(moved) <= set(delta.tensors[name].indices.tolist())
    dk.save(delta, tmp_path / "d.sdelta")
    fresh = load(base, kind).eval()
    with torch.no_grad():
        before = _loss("llama", fresh)
        handle = dk.apply(fresh, tmp_path / "d.sdelta", base=base)
        assert torch.equal(_loss("llama", fresh), _loss("llama", model.eval()))
        handle.revert()
        assert torch.equal(_loss("llama", fresh), before)


def test_loftq_starts_nearer_to_the_full_weights_and_merges_what_was_learnt(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    model = load(base)
    adapter = loftq(attached(model, base), Checkpoint(base))
    full = transformers.AutoModelForCausalLM.from_pretrained(base)
    layers = quantised_layers(model)
    for module, tensor in adapter.modules.items():
        live = adapter.where.live[tensor]
        codes = dequantised(layers[live])
        scaling = 2.0  # alpha is twice the rank unless given
        scaling = next(
            iter(model.get_submodule(live.removesuffix(".base_layer.weight")).scaling.values())
        )
        down, up = (adapter.parameters[f"{module}.lora_{x}.weight"].detach() for x in "AB")
        weight = full.get_parameter(tensor).detach()
        near = torch.linalg.norm(weight - codes - scaling * up @ down)
        assert near < 0.8 * torch.linalg.norm(weight - codes)
        best = torch.linalg.svdvals(weight - codes)[4:].norm()
        torch.testing.assert_close(near, best, rtol=1e-3, atol=1e-5)
    tuner = dk.SparseTuner(model, dk.RandomMask(budget=60), lr=1e-2, adapter=adapter, base=base)
    untrained = tuner.delta()
    dk.merge(base, [untrained], tmp_path / "same")
    merged = Checkpoint(tmp_path / "same")
    for name in Checkpoint(base).tensors:
        assert merged.read(name).tobytes() == Checkpoint(base).read(name).tobytes()
    torch.autograd.backward(_loss("llama", model.train()))
    tuner.step()
    dk.merge(base, [tuner.delta()], tmp_path / "moved")
    moved = Checkpoint(tmp_path / "moved")
    for tensor in adapter.modules.values():
        assert not np.array_equal(moved.read(tensor), Checkpoint(base).read(tensor))


def test_factors_of_a_low_rank_matrix_give_it_back() -> None:
    torch.manual_seed(0)
    lost = torch.randn(12, 3) @ torch.randn(3, 9)
    for rank in (3, 5, 20):
        down, up = factors(lost, rank, 0.5)
        assert (down.shape, up.shape) == ((rank, 9), (12, rank))
        torch.testing.assert_close(0.5 * up @ down, lost, atol=1e-4, rtol=1e-4)


def test_loftq_needs_codes(tmp_path: Path) -> None:
    base = write_bert(tmp_path / "base")
    model = transformers.AutoModel.from_pretrained(base)
    with pytest.raises(ConfigError, match="is not quantised; leave it out of target"):
        loftq(attached(model, base), Checkpoint(base))
