"""Applied deltas: every state is the merge of what is applied, and nothing applied is the base."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from live_models import SHAPES, is_equal, make_model, random_delta, weights_of
from safetensors.torch import load_file, save_file

import deltakit as dk
from deltakit.errors import BaseMismatchError, ConfigError, CoordinateError, DeltaError

Weights = dict[str, torch.Tensor]


def _merged(
    base: Weights, deltas: list[dk.SparseDelta], weights: list[float], folder: Path
) -> Weights:
    """What merging files gives."""
    save_file(base, folder / "base.safetensors")
    if not deltas:
        return base
    dk.merge(
        folder / "base.safetensors", deltas, folder / "out.safetensors", weights=weights, force=True
    )
    return load_file(folder / "out.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_sequence_of_changes_is_the_merge_of_what_is_applied(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make_model(dtype)
    base = weights_of(model)
    deltas = [random_delta(model, seed, "set" if seed == 3 else "add") for seed in range(5)]
    choice = random.Random(0)
    handles: list[dk.live.apply.Handle] = []
    for _ in range(40):
        action = choice.choice(["apply", "apply", "weigh", "swap", "revert"])
        if action == "apply" and len(handles) < 3:
            chosen = choice.sample(deltas, choice.choice([1, 2]))
            weights = [choice.choice([0.5, -1.25, 2.0]) for _ in chosen]
            handles.append(dk.apply(model, chosen, weights))
        elif handles:
            handle = choice.choice(handles)
            if action == "weigh":
                handle.set_weights([choice.uniform(-2, 2) for _ in handle.weights])
            elif action == "swap":
                handle.swap(choice.randrange(len(handle.weights)), choice.choice(deltas))
            elif action == "revert":
                handle.revert()
                handles.remove(handle)
        applied = [pair for h in handles for pair in zip(h.deltas, h.weights, strict=True)]
        expected = _merged(base, [d for d, _ in applied], [w for _, w in applied], tmp_path)
        assert is_equal(model, expected)
    for handle in handles:
        handle.revert()
        handle.revert()  # a second one does nothing
    assert is_equal(model, base)


def test_reweighting_one_delta_leaves_entries_of_the_others_alone() -> None:
    model = make_model()
    first, second = random_delta(model, 1), random_delta(model, 2)
    handle = dk.apply(model, [first, second])
    before = weights_of(model)
    handle.set_weights([1.0, 0.25])
    for name, tensor in model.state_dict().items():
        if name not in SHAPES:
            assert torch.equal(tensor, before[name])
            continue
        changed = (tensor != before[name]).reshape(-1).nonzero().reshape(-1).numpy()
        assert np.isin(changed, second.tensors[name].indices).all()
    assert handle.weights == [1.0, 0.25] and handle.deltas == [first, second]


def test_a_delta_is_known_to_fit_beside_another_that_covers_all_of_it() -> None:
    model = make_model()
    first, second = random_delta(model, 1), random_delta(model, 2)
    handle = dk.apply(model, first)
    dk.apply(model, second).revert()  # its base is not what the model holds now, but is under it
    with pytest.raises(BaseMismatchError, match="another base"):
        dk.apply(model, random_delta(make_model(seed=1), 2))
    handle.revert()


def test_refusals_leave_the_model_as_it_is() -> None:
    model = make_model()
    good = random_delta(model, 1)
    handle = dk.apply(model, good)
    before = weights_of(model)
    other = random_delta(make_model(seed=1), 2)
    with pytest.raises(BaseMismatchError):
        handle.swap(0, other)
    with pytest.raises(ConfigError, match="no delta 1 to swap"):
        handle.swap(1, good)
    with pytest.raises(ConfigError, match="2 weights for 1 deltas"):
        handle.set_weights([1, 2])
    with pytest.raises(ConfigError, match="not finite"):
        handle.set_weights([float("nan")])
    head = dk.SparseDelta(tensors={}, extras={"1.bias": np.zeros(20, np.float32)})
    with pytest.raises(DeltaError, match="a whole extra in one delta"):
        dk.apply(model, head)
    assert is_equal(model, before)


def test_extras_replace_whole_tensors_whatever_the_weight() -> None:
    model = make_model()
    base = weights_of(model)
    heads = [np.full(20, value, np.float32) for value in (1, 2)]
    first, second = (dk.SparseDelta(tensors={}, extras={"1.bias": head}) for head in heads)
    handle = dk.apply(model, first, [0.5])
    assert (model[1].bias == 1).all()
    with pytest.raises(DeltaError, match=r"extra '1.bias' differs"):
        dk.apply(model, second)
    handle.swap(0, second)
    assert (model[1].bias == 2).all()
    handle.revert()
    assert is_equal(model, base)


def test_files_are_applied_as_deltas_are(tmp_path: Path) -> None:
    model = make_model()
    delta = random_delta(model, 1)
    dk.save(delta, tmp_path / "d.sdelta")
    with dk.applied(model, delta):
        expected = weights_of(model)
    with dk.applied(model, tmp_path / "d.sdelta"):
        assert is_equal(model, expected)


def test_a_model_loaded_in_a_narrower_dtype_is_checked_through_its_checkpoint(
    tmp_path: Path,
) -> None:
    wide = make_model(torch.float32)
    save_file(weights_of(wide), tmp_path / "base.safetensors")
    delta = random_delta(wide, 1)
    narrow = make_model(torch.float32).to(torch.bfloat16)
    before = weights_of(narrow)
    with pytest.raises(BaseMismatchError):
        dk.apply(narrow, delta)
    save_file(before, tmp_path / "narrow.safetensors")
    dk.merge(
        tmp_path / "narrow.safetensors",
        delta,
        tmp_path / "out.safetensors",
        allow_base_mismatch=True,
    )
    merged = load_file(tmp_path / "out.safetensors")
    with dk.applied(narrow, delta, base=tmp_path / "base.safetensors"):
        assert is_equal(narrow, merged)
    assert is_equal(narrow, before)
    with torch.no_grad():
        narrow[0].weight[0, 0] += 1  # neither the checkpoint's values nor the delta's base
    with pytest.raises(BaseMismatchError):
        dk.apply(narrow, delta, base=tmp_path / "base.safetensors")


def test_a_dtype_changed_under_an_applied_delta_is_told() -> None:
    model = make_model()
    handle = dk.apply(model, random_delta(model, 1))
    model.to(torch.float16)
    with pytest.raises(CoordinateError, match=r"was bfloat16 .* is float16 now"):
        handle.revert()


def test_tensors_that_are_not_contiguous_are_refused() -> None:
    model = make_model()
    delta = random_delta(model, 1)
    model[0].weight.data = model[0].weight.data.t().contiguous().t()
    assert tuple(model[0].weight.shape) == SHAPES["0.weight"]
    with pytest.raises(CoordinateError, match=r"'0\.weight' is not contiguous"):
        dk.apply(model, delta)
