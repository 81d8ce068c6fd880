"""Deltas on quantised live models: entries beside the codes, and the codes alone when they leave."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_bases import HOWS, LAYERS, batch, codes, quantized, train, write_net

import deltakit as dk
from deltakit.errors import BaseMismatchError, ConfigError
from deltakit.quantized.addition import addition_of
from deltakit.quantized.layers import quantised_layers


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_net(tmp_path / "base.safetensors")


def trained(base: Path, how: str = "nf4", seed: int = 0) -> tuple[torch.nn.Module, dk.SparseDelta]:
    model = quantized(how)
    method = dk.RandomMask(budget=500, seed=seed)
    tuner = dk.SparseTuner(model, method, lr=1e-2, base=base, total_steps=4)
    train(tuner, 4)
    return model.eval(), tuner.delta()


@pytest.mark.parametrize("how", HOWS)
def test_an_applied_delta_is_the_trained_model(base: Path, how: str, tmp_path: Path) -> None:
    model, delta = trained(base, how)
    dk.save(delta, tmp_path / "d.sdelta")
    tokens, _ = batch(5)
    fresh = quantized(how).eval()
    before, bits = fresh(tokens), codes(fresh)
    handle = dk.apply(fresh, tmp_path / "d.sdelta", base=base)
    assert torch.equal(fresh(tokens), model(tokens))
    assert torch.equal(copy.deepcopy(fresh)(tokens), model(tokens))
    assert not torch.equal(fresh(tokens), before)
    handle.revert()
    assert torch.equal(fresh(tokens), before)
    assert all(torch.equal(found, bits[name]) for name, found in codes(fresh).items())
    assert all(addition_of(layer) is None for layer in quantised_layers(fresh).values())


def test_weights_and_several_deltas_sum_as_merging_does(base: Path) -> None:
    (_, one), (_, two) = trained(base), trained(base, seed=1)
    model = quantized().eval()
    handle = dk.apply(model, [one, two], [0.5, -2.0], base=base)
    summed = {}
    for name, layer in quantised_layers(model).items():
        dense = np.zeros(int(np.prod(one.tensors[name].shape)), np.float32)
        for weight, delta in ((0.5, one), (-2.0, two)):
            tensor = delta.tensors[name]
            dense[tensor.indices] += np.float32(weight) * tensor.values
        found = addition_of(layer)
        assert found is not None
        summed[name] = torch.from_numpy(dense)
        at = found.indices
        assert torch.equal(found.values, summed[name][at])
        assert len(at) == np.count_nonzero(dense)
    tokens, _ = batch(5)
    handle.set_weights([0.0, 1.0])
    with dk.applied(quantized().eval(), two, base=base) as alone:
        assert torch.equal(model(tokens), alone._locator.model(tokens))


def test_a_bank_switches_tasks(base: Path) -> None:
    model, one = trained(base)
    other, two = trained(base, seed=1)
    tokens, _ = batch(5)
    live = quantized().eval()
    before = live(tokens)
    bank = dk.DeltaBank(live, {"one": one, "two": two}, base=base)
    for task, expected in (("one", model), ("two", other), ("one", model)):
        bank.activate(task)
        assert torch.equal(live(tokens), expected(tokens))
    bank.deactivate()
    assert torch.equal(live(tokens), before)
    with bank.batched(["one", None, "two", "one", "two", None]):
        mixed = live(tokens)
    rows = torch.stack([model(tokens)[0], before[1], other(tokens)[2], model(tokens)[3]])
    torch.testing.assert_close(mixed[:4], rows, atol=1e-5, rtol=1e-4)


def test_what_belongs_elsewhere_is_refused(base: Path, tmp_path: Path) -> None:
    _, delta = trained(base)
    other = write_net(tmp_path / "other.safetensors", torch.bfloat16)
    with pytest.raises(BaseMismatchError, match="belongs to another base"):
        dk.apply(quantized(), delta, base=other)
    whole = dk.SparseDelta(tensors={}, extras={"up.weight": np.zeros((96, 32), np.float32)})
    with pytest.raises(ConfigError, match=r"'up.weight' is a whole tensor, and quantised"):
        dk.apply(quantized(), whole)
    model = quantized()
    dk.apply(model, delta, base=base)
    with pytest.raises(ConfigError, match="holds entries of an applied delta; revert it"):
        dk.SparseTuner(model, dk.RandomMask(budget=10), base=base)
    indices, words = np.arange(3), np.ones(3, np.float32)
    tensor = dk.TensorDelta(
        name="up.weight",
        shape=(96, 32),
        dtype="float32",
        mode="set",
        indices=indices,
        values=words,
    )
    with pytest.raises(ConfigError, match="set mode without base values"):
        dk.apply(quantized(), dk.SparseDelta(tensors={"up.weight": tensor}))


def test_set_mode_adds_its_difference() -> None:
    before, after = np.float32([0.5, 1.0]), np.float32([0.75, 0.0])
    tensor = dk.TensorDelta(
        name="up.weight",
        shape=(96, 32),
        dtype="float32",
        mode="set",
        indices=np.array([4, 70]),
        values=after,
        base_values=before,
    )
    model = quantized()
    dk.apply(model, dk.SparseDelta(tensors={"up.weight": tensor}))
    found = addition_of(quantised_layers(model)[LAYERS[0]])
    assert found is not None
    assert found.indices.tolist() == [4, 70]
    assert found.values.tolist() == [0.25, -1.0]
