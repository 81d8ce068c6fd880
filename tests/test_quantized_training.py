"""Training beside quantised weights: exact, as the dense reference does, codes left alone."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_bases import (
    HOWS,
    LAYERS,
    batch,
    codes,
    dense,
    loss,
    plain,
    quantized,
    train,
    write_net,
)
from torch.utils.checkpoint import checkpoint

import deltakit as dk
from deltakit.errors import BaseMismatchError, ConfigError
from deltakit.quantized.addition import addition_of
from deltakit.quantized.layers import dequantised, quantised_layers
from deltakit.quantized.target import QuantisedTarget
from deltakit.training import fixed_support
from deltakit.training.engine import Engine

BUDGET = 600
METHODS = {
    "id3": dk.ID3(budget=BUDGET, steps=3),
    "id3, |w|": dk.ID3(budget=BUDGET, steps=3, exp=1.0),
    "random": dk.RandomMask(budget=BUDGET),
    "snip": dk.Static(budget=BUDGET, heuristic="snip"),
    "pafi": dk.Static(budget=BUDGET, heuristic="magnitude-smallest"),
    "fisher": dk.Static(budget=BUDGET, heuristic="fisher"),
    "n:m": dk.NMMask(budget=BUDGET, pick="largest"),
    "repeat": dk.Repeat(budget=BUDGET, every=2),
    "repeat, resting": dk.Repeat(budget=BUDGET, every=2, restore=False),
    "drop-and-grow": dk.DropAndGrow(budget=BUDGET, every=2),
}


@pytest.fixture(params=["sampled", "submatrix", "dense"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to the gradients of entries in turn; layers this small would never be tapped."""
    way: str = request.param
    monkeypatch.setattr(fixed_support.FixedSupport.__init__, "__defaults__", (lambda *_: way, None))
    return way


def tuner(model: torch.nn.Module, method: Any, **options: Any) -> dk.SparseTuner:
    given = {"lr": 1e-2, "target": LAYERS, "total_steps": 6, **options}
    return dk.SparseTuner(
        model, method, calibration=dk.Batches([batch(90), batch(91)], loss, _logits), **given
    )


def _logits(model: Any, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    out: torch.Tensor = model(given[0])
    return out


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", METHODS)
def test_training_is_that_of_the_dense_reference(how: str, name: str) -> None:
    model = quantized(how)
    runs = [tuner(each, METHODS[name]) for each in (model, dense(model, plain()))]
    before = codes(model)
    for run in runs:
        train(run, 6)
    ours, theirs = (run.delta() for run in runs)
    assert ours.nnz == theirs.nnz >= BUDGET
    assert list(ours.tensors) == list(theirs.tensors)
    for tensor in theirs.tensors.values():
        mine = ours.tensors[tensor.name]
        np.testing.assert_array_equal(mine.indices, tensor.indices)
        np.testing.assert_allclose(mine.values, tensor.values, atol=2e-4)
        assert mine.order is tensor.order is None or (mine.order == tensor.order).all()
    after = codes(model)
    assert all(torch.equal(after[key], bits) for key, bits in before.items())


def test_gradients_are_those_of_the_dense_reference(path: str) -> None:
    model = quantized()
    runs = [tuner(each, METHODS["random"]) for each in (model, dense(model, plain()))]
    for run in runs:
        train(run, 2)
        torch.autograd.backward(loss(run.model, batch(7)))
        run.engine.finish_gradients()
    mine, theirs = (run.engine.entries.gradient for run in runs)
    assert set(runs[0].gradient_paths.values()) == {path}
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("how", HOWS)
def test_forward_adds_the_entries_to_the_dequantised_weights(how: str) -> None:
    model = quantized(how)
    run = tuner(model, METHODS["id3"])
    train(run, 3)
    summed = dense(model, plain())
    state = {n: p for n, p in model.named_parameters() if n not in LAYERS}
    summed.load_state_dict(state, strict=False)
    for name, layer in quantised_layers(model).items():
        found = addition_of(layer)
        assert found is not None
        with torch.no_grad():
            summed.get_parameter(name).view(-1)[found.indices] += found.values
    tokens, _ = batch(3)
    torch.testing.assert_close(model.train()(tokens), summed(tokens), atol=1e-5, rtol=1e-4)
    inputs = torch.randn(3, 32, requires_grad=True)
    with torch.enable_grad():
        mine = torch.autograd.grad(model.body(inputs).square().sum(), inputs)[0]
        theirs = torch.autograd.grad(summed.body(inputs).square().sum(), inputs)[0]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_dense_gradients_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    consume = Engine._consume

    def watched(engine: Engine, target: Any) -> None:
        targets = engine.entries.targets
        seen.append(
            (target.live_name, [t.live_name for t in targets if t.parameter.grad is not None])
        )
        consume(engine, target)

    monkeypatch.setattr(Engine, "_consume", watched)
    run = tuner(quantized(), METHODS["id3"])
    torch.autograd.backward(loss(run.model, batch()))
    assert sorted(name for name, _ in seen) == sorted(LAYERS)
    assert all(alive == [name] for name, alive in seen)
    for target in run.engine.entries.targets:
        assert isinstance(target, QuantisedTarget)
        assert target.parameter.grad is None
        assert target.parameter.untyped_storage().nbytes() == 4
        assert target.shape == tuple(dequantised(target.layer).shape)


def test_budget_checkpoints_are_met_exactly() -> None:
    counts = []
    run = tuner(quantized(), dk.ID3(budget=500, steps=4), budget_checkpoints=[130, 333])
    train(run, 5, lambda: counts.append(run.unmasked))
    assert counts == sorted(counts)
    assert {130, 333, 500} <= set(counts)
    assert run.delta().nnz == 500


@pytest.mark.parametrize("name", ["id3", "random", "repeat, resting", "drop-and-grow"])
def test_a_resumed_run_has_the_same_bits(name: str, path: str) -> None:
    whole = tuner(quantized("nf4-double"), METHODS[name])
    train(whole, 3)
    saved = io.BytesIO()
    torch.save(whole.state_dict(), saved)
    train(whole, 3, start=3)
    saved.seek(0)
    resumed = tuner(quantized("nf4-double"), METHODS[name])
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    train(resumed, 3, start=3)
    tokens, _ = batch(4)
    assert torch.equal(whole.model.eval()(tokens), resumed.model.eval()(tokens))
    pairs = zip(whole.delta().tensors.values(), resumed.delta().tensors.values(), strict=True)
    for one, other in pairs:
        assert one.indices.tobytes() == other.indices.tobytes()
        assert one.values.tobytes() == other.values.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_delta_belongs_to_the_full_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_net(tmp_path / "base.safetensors", dtype)
    run = tuner(quantized(dtype=dtype), METHODS["random"], base=base, target=[*LAYERS, "up.bias"])
    train(run, 4)
    delta = run.delta()
    kind = str(dtype).removeprefix("torch.")
    assert {t.trained_dtype for t in delta.tensors.values()} == {kind}
    assert delta.provenance["quantization"] == {
        "kind": "nf4",
        "double_quantization": False,
        "compute_dtype": kind,
    }
    dk.merge(base, [delta], tmp_path / "merged.safetensors")  # checks the base, sample and support
    assert delta.base is not None
    assert all(known.support for known in delta.base.tensors.values())
    merged, before = (_weights(tmp_path / f"{n}.safetensors") for n in ("merged", "base"))
    for tensor in delta.tensors.values():
        flat = before[tensor.name].reshape(-1).clone()
        at = torch.from_numpy(tensor.indices)
        flat[at] = (flat[at].float() + torch.from_numpy(tensor.values)).to(dtype)
        assert torch.equal(merged[tensor.name].reshape(-1), flat)
    other = plain(dtype)
    with torch.no_grad():
        other.up.weight.mul_(2)
    torch.manual_seed(0)
    wrong = tmp_path / "wrong.safetensors"
    from safetensors.torch import save_file

    save_file(other.state_dict(), wrong)
    with pytest.raises(BaseMismatchError, match=r"up\.weight"):
        dk.merge(wrong, [delta], tmp_path / "never.safetensors")


def _weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_going_on_from_a_delta_and_keeping_clear_of_one(tmp_path: Path) -> None:
    base = write_net(tmp_path / "base.safetensors")
    first = tuner(quantized(), METHODS["random"], base=base)
    train(first, 2)
    earlier = first.delta()
    more = tuner(quantized(), dk.RandomMask(budget=900, seed=4), base=base, init_delta=earlier)
    tokens, _ = batch()
    assert torch.equal(first.model.eval()(tokens), more.model.eval()(tokens))
    train(more, 1)
    assert more.delta().nnz == 900
    apart = tuner(quantized(), dk.RandomMask(budget=900, seed=4), base=base, avoid=[earlier])
    for name, tensor in apart.delta().tensors.items():
        assert not np.isin(tensor.indices, earlier.tensors[name].indices).any()


def test_accumulation_sums_over_passes() -> None:
    whole = tuner(quantized(), METHODS["id3"])
    parts = tuner(quantized(), METHODS["id3"], accumulation_steps=2)
    (tokens, labels) = batch()
    for _ in range(4):
        torch.autograd.backward(loss(whole.model, (tokens, labels)))
        for half in (slice(0, 3), slice(3, 6)):
            torch.autograd.backward(loss(parts.model, (tokens[half], labels[half])) / 2)
        whole.step(), parts.step()
    for one, other in zip(
        whole.delta().tensors.values(), parts.delta().tensors.values(), strict=True
    ):
        np.testing.assert_array_equal(one.indices, other.indices)
        np.testing.assert_allclose(one.values, other.values, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["id3", "random"])
def test_checkpointed_activations(name: str, reentrant: bool, path: str) -> None:
    deltas = []
    for checkpointed in (False, True):
        model = quantized()
        if checkpointed:
            body = model.body
            model.body = lambda hidden, body=body: checkpoint(  # type: ignore[method-assign]
                body, hidden.requires_grad_(), use_reentrant=reentrant
            )
        run = tuner(model, METHODS[name])
        train(run, 4)
        deltas.append(run.delta())
    for one, other in zip(*(delta.tensors.values() for delta in deltas), strict=True):
        assert one.values.tobytes() == other.values.tobytes()


def test_autocast_leaves_biases_in_their_dtype(path: str) -> None:
    for how in ("nf4", "int8"):
        model = quantized(how)
        run = tuner(model, METHODS["random"], target=None)
        for step in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                found = loss(model.train(), batch(step))
            torch.autograd.backward(found)
            run.step()
        assert {p.dtype for n, p in model.named_parameters() if n not in LAYERS} == {torch.float32}
        assert run.delta().nnz == BUDGET


def test_closing_keeps_entries_and_copies_have_them() -> None:
    model = quantized()
    run = tuner(model, METHODS["random"])
    train(run, 3)
    tokens, _ = batch()
    trained = model.eval()(tokens)
    assert torch.equal(copy.deepcopy(model)(tokens), trained)
    run.close()
    assert torch.equal(model(tokens), trained)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in LAYERS)
    with pytest.raises(
        ConfigError, match=r"'down.weight' is quantised and holds entries of an ear"
    ):
        tuner(model, METHODS["random"])


def test_a_sweep_leaves_no_trace() -> None:
    model = quantized()
    tokens, _ = batch()
    before = model.eval()(tokens)
    found = dk.find_lr(
        lambda rate, steps: tuner(model, METHODS["id3"], lr=rate, total_steps=steps),
        dk.Batches([batch(1), batch(2)], loss),
        total_steps=6,
        steps=3,
    )
    assert found.rate > 0
    assert torch.equal(model.eval()(tokens), before)
    assert all(addition_of(layer) is None for layer in quantised_layers(model).values())


def test_what_writes_all_weights_is_refused() -> None:
    for name in ("lt-sft", "diff-pruning", "child-tuning-f"):
        from deltakit.selection import METHODS as REGISTERED

        with pytest.raises(ConfigError, match=r"a dense phase writes all weights .*is quantised"):
            tuner(quantized(), REGISTERED[name](budget=50, dense_steps=1))
    with pytest.raises(ConfigError, match=r"grasp follows .*is quantised"):
        tuner(quantized(), dk.Static(budget=50, heuristic="grasp"))
    with pytest.raises(ConfigError, match=r"'up.weight' is quantised and cannot be an extra"):
        tuner(quantized(), METHODS["id3"], extras="up.weight")
