"""Applied adapter deltas: the model computes what the trained one did, and is the base again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from attach_lab import (
    BERT,
    GPT2,
    LLAMA,
    T5,
    VIT,
    Family,
    outputs,
    parameters_with_flags,
    same_modules,
    train,
    weights,
)

import deltakit as dk
from deltakit.adapters.attach import attach
from deltakit.errors import BaseMismatchError, ConfigError, CoordinateError, DeltaError
from deltakit.formats.checkpoint import Checkpoint


def _trained(
    family: Family, folder: Path, kind: str = "lora", seed: int = 3, share: float = 0.3
) -> tuple[dk.SparseDelta, torch.Tensor]:
    """An adapter delta with the head of its model, and what the trained model computes."""
    model, inputs = family.load(folder)
    checkpoint = Checkpoint(folder)
    options = {"rank": 4} if kind in ("lora", "dora", "adalora", "loha", "lokr", "hra") else {}
    attached = attach(model, kind, options, seed=seed, base=checkpoint)
    delta = train(attached, checkpoint, share)
    head = {n: p for n, p in model.named_parameters() if attached.where.names[n] is None}
    with torch.no_grad():
        for parameter in head.values():
            parameter += seed
    extras = {name: p.detach().numpy().copy() for name, p in head.items()}
    delta = replace(delta, extras={**delta.extras, **extras})
    return delta, outputs(model, inputs)


def _entries(model: torch.nn.Module, folder: Path, names: Sequence[str]) -> dk.SparseDelta:
    """A plain delta with a third of the elements of some tensors of a checkpoint."""
    rng = np.random.default_rng(5)
    tensors = {}
    for name in names:
        info = Checkpoint(folder).info(name)
        numel = int(np.prod(info.shape))
        indices = np.sort(rng.choice(numel, numel // 3, replace=False))
        tensors[name] = dk.TensorDelta(
            name=name,
            shape=info.shape,
            dtype=info.dtype,
            mode="add",
            indices=indices,
            values=rng.standard_normal(len(indices)).astype(np.float32),
        )
    return dk.SparseDelta(tensors=tensors)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "lokr", "hra", "pfeiffer"])
def test_an_applied_adapter_computes_what_the_trained_one_did(kind: str, tmp_path: Path) -> None:
    delta, trained = _trained(BERT, tmp_path, kind)
    dk.save(delta, tmp_path / "a.sdelta")
    model, inputs = BERT.load(tmp_path)
    modules, base, plain = dict(model.named_modules()), weights(model), outputs(model, inputs)
    model.get_parameter("classifier.bias").requires_grad = False
    flags, owned = list(parameters_with_flags(model)), {id(p) for p in model.parameters()}
    for given in (delta, tmp_path / "a.sdelta"):
        handle = dk.apply(model, given)
        assert torch.equal(outputs(model, inputs), trained)
        assert [p.requires_grad for p in model.parameters() if id(p) in owned] == [
            f for _, f in flags
        ]
        assert not any(p.requires_grad for p in model.parameters() if id(p) not in owned)
        handle.revert()
        handle.revert()
        assert same_modules(model, modules)
        assert all(torch.equal(t, base[name]) for name, t in model.state_dict().items())
        assert torch.equal(outputs(model, inputs), plain)
        assert list(parameters_with_flags(model)) == flags


@pytest.mark.parametrize("family", [GPT2, LLAMA, T5, VIT], ids=lambda family: family.name)
def test_every_architecture(family: Family, tmp_path: Path) -> None:
    delta, trained = _trained(family, tmp_path)
    model, inputs = family.load(tmp_path)
    plain = outputs(model, inputs)
    with dk.applied(model, delta):
        assert torch.equal(outputs(model, inputs), trained)
    assert torch.equal(outputs(model, inputs), plain)


def _changed(model: torch.nn.Module, name: str, change: torch.Tensor) -> None:
    with torch.no_grad():
        model.get_parameter(name).add_(change)


@pytest.mark.parametrize("kind", ["lora", "adalora", "loha", "lokr"])
def test_weights_scale_what_is_added_and_adapters_add_up(kind: str, tmp_path: Path) -> None:
    """Beside the same change as peft itself computes it, folded into a plain copy."""
    options = {"share": 1.0}
    first, second = (_trained(BERT, tmp_path, kind, seed, **options)[0] for seed in (3, 4))
    first, second = (replace(delta, extras={}) for delta in (first, second))
    model, inputs = BERT.load(tmp_path)
    folded, _ = BERT.load(tmp_path)
    for delta, weight in ((first, 0.5), (second, -2.0)):
        with dk.applied(model, delta):
            changes = {
                name: layer.get_delta_weight("default").detach().clone()
                for name, layer in model.named_modules()
                if hasattr(layer, "get_delta_weight")
            }
        assert changes
        for name, change in changes.items():
            _changed(folded, f"{name}.weight", weight * change)
    handle = dk.apply(model, [first, second], [0.5, -2.0])
    torch.testing.assert_close(outputs(model, inputs), outputs(folded, inputs))
    handle.set_weights([0, 0])
    plain, _ = BERT.load(tmp_path)
    assert torch.equal(outputs(model, inputs), outputs(plain, inputs))
    handle.revert()


def test_the_state_depends_only_on_what_is_applied(tmp_path: Path) -> None:
    deltas = [replace(_trained(BERT, tmp_path, seed=seed)[0], extras={}) for seed in (1, 2, 3)]
    one, two, three = deltas
    model, inputs = BERT.load(tmp_path)
    modules = dict(model.named_modules())

    def fresh(*deltas: dk.SparseDelta, weights: Sequence[float] | None = None) -> torch.Tensor:
        other, _ = BERT.load(tmp_path)
        dk.apply(other, list(deltas), weights)
        return outputs(other, inputs)

    first = dk.apply(model, one)
    second = dk.apply(model, [two, three], [1, 0.5])
    assert torch.equal(outputs(model, inputs), fresh(one, two, three, weights=[1, 1, 0.5]))
    second.swap(1, one, weight=1)
    assert torch.equal(outputs(model, inputs), fresh(one, two, one))
    first.swap(0, three)
    assert torch.equal(outputs(model, inputs), fresh(three, two, one))
    first.set_weights([-1])
    first.revert()
    assert torch.equal(outputs(model, inputs), fresh(two, one))
    second.revert()
    assert same_modules(model, modules)


def test_entries_stand_under_an_adapter(tmp_path: Path) -> None:
    """In any order, and in the very weights at which the adapter stands."""
    adapter = replace(_trained(BERT, tmp_path)[0], extras={})
    model, inputs = BERT.load(tmp_path)
    base, modules = weights(model), dict(model.named_modules())
    query = "encoder.layer.0.attention.self.query.weight"
    entries = _entries(model, tmp_path, [query, "pooler.dense.weight"])
    with dk.applied(model, entries):
        merged = weights(model)
    other, _ = BERT.load(tmp_path)
    other.load_state_dict(merged)
    dk.apply(other, adapter, allow_base_mismatch=True)
    expected = outputs(other, inputs)
    for order in ([adapter, entries], [entries, adapter]):
        handles = [dk.apply(model, delta) for delta in order]
        assert torch.equal(outputs(model, inputs), expected)
        wrapped = model.get_parameter(f"bert.{query.removesuffix('.weight')}.base_layer.weight")
        assert torch.equal(wrapped, merged[f"bert.{query}"])
        for handle in handles:  # the first applied leaves first
            handle.revert()
        assert same_modules(model, modules)
        assert all(torch.equal(t, base[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_what_rescales_weights_does_not_stand_over_entries(kind: str, tmp_path: Path) -> None:
    adapter = replace(_trained(BERT, tmp_path, kind)[0], extras={})
    model, inputs = BERT.load(tmp_path)
    handle = dk.apply(
        model, _entries(model, tmp_path, ["encoder.layer.0.attention.self.value.bias"])
    )
    before, modules = outputs(model, inputs), dict(model.named_modules())
    with pytest.raises(ConfigError, match="it would rescale those too"):
        dk.apply(model, adapter)
    assert torch.equal(outputs(model, inputs), before)
    assert same_modules(model, modules)
    handle.revert()
    handle = dk.apply(model, [adapter, _entries(model, tmp_path, ["pooler.dense.weight"])])
    with pytest.raises(ConfigError, match=r"applies with weight 1 alone, found 0\.5"):
        handle.set_weights([0.5, 1])
    handle.set_weights([1, 0])
    handle.revert()
    assert same_modules(model, modules)


def test_refusals_leave_what_is_applied(tmp_path: Path) -> None:
    one, trained = _trained(BERT, tmp_path)
    scaling = replace(_trained(BERT, tmp_path, "ia3")[0], extras={})
    other = replace(_trained(LLAMA, tmp_path / "llama")[0], extras={})
    model, inputs = BERT.load(tmp_path)
    handle = dk.apply(model, one)
    assert one.adapter is not None
    for wrong in (replace(one.adapter, seed=9), replace(one.adapter, config={"r": 4})):
        with pytest.raises(BaseMismatchError, match="check value"):
            handle.swap(0, replace(one, adapter=wrong))
    with pytest.raises(ConfigError, match="where 'lora' stands"):
        dk.apply(model, scaling)
    with pytest.raises(CoordinateError, match="the model has no"):
        dk.apply(model, other)
    assert torch.equal(outputs(model, inputs), trained)
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.0.attention.self.query.base_layer.weight")[
            0, 0
        ] += 1
    with pytest.raises(BaseMismatchError, match="another base"):
        dk.apply(model, replace(one, extras={}))
    dk.apply(model, replace(one, extras={}), allow_base_mismatch=True).revert()
    handle.revert()


def test_without_a_checkpoint_the_model_itself_is_the_base() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    inputs = torch.randn(3, 6)
    attached = attach(model, "dora", {"rank": 2}, target="1", seed=1, base=None)
    delta = train(attached)
    trained = model(inputs)
    attached.detach()
    with dk.applied(model, delta):
        assert torch.equal(model(inputs), trained)
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    with pytest.raises(BaseMismatchError, match="check value"):
        dk.apply(model, delta)


def test_a_bank_refuses_adapters_in_one_line(tmp_path: Path) -> None:
    delta, _ = _trained(BERT, tmp_path)
    dk.save(delta, tmp_path / "a.sdelta")
    model, _ = BERT.load(tmp_path)
    for given in (delta, tmp_path / "a.sdelta"):
        with pytest.raises(DeltaError, match=r"DeltaBank.*'lora'.*dk\.apply"):
            dk.DeltaBank(model, {"task": given})


def test_a_bank_switches_beside_an_adapter(tmp_path: Path) -> None:
    delta = replace(_trained(BERT, tmp_path)[0], extras={})
    model, inputs = BERT.load(tmp_path)
    name = "encoder.layer.1.attention.self.value.weight"
    task = _entries(model, tmp_path, [name])
    with dk.applied(model, [task, delta]):
        expected = outputs(model, inputs)
    bank = dk.DeltaBank(model, {"task": task})
    with dk.applied(model, delta):
        alone = outputs(model, inputs)
        bank.activate("task")
        assert torch.equal(outputs(model, inputs), expected)
        bank.deactivate()
        assert torch.equal(outputs(model, inputs), alone)
