"""Laws of weight patches: bit for bit, in order, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_factory import read_safetensors
from patch_lab import Model, chain, same_bits, snapshot, train
from safetensors.torch import save_file

import deltakit as dk
from deltakit.errors import BaseMismatchError, ConfigError, DeltaError
from deltakit.identity import sample_positions
from deltakit.patching.chain import Link, Position, link_of


@pytest.mark.parametrize("keep_base", [False, True])
def test_a_stream_gives_each_step_and_its_digest(tmp_path: Path, keep_base: bool) -> None:
    patches, states, stream = chain(4, keep_base=keep_base)
    for step, patch in enumerate(patches):
        before, after = states[step], states[step + 1]
        link = link_of(patch)
        assert link == Link(
            Position(step, dk.state_digest(before)), Position(step + 1, dk.state_digest(after))
        )
        assert patch.equals(dk.diff(before, after, step=step, keep_base=keep_base))
        assert all((t.base_values is not None) == keep_base for t in patch.tensors.values())
        dk.save(patch, tmp_path / "patch.sdelta")
        assert dk.load(tmp_path / "patch.sdelta").equals(patch)
    assert stream.position == Position(4, dk.state_digest(states[4]))
    save_file(states[4], tmp_path / "state.safetensors")
    assert dk.state_digest(tmp_path / "state.safetensors") == stream.position.digest


def test_a_step_that_changes_nothing_is_a_patch_too() -> None:
    model = Model()
    stream = dk.PatchStream(model)
    patch = stream.step(model)
    assert patch.nnz == 0
    assert stream.position == Position(1, dk.state_digest(model))
    dk.apply(model, patch)
    assert dk.chain_position(model) == stream.position


def test_a_model_that_follows_is_the_trainer_bit_for_bit() -> None:
    patches, states, _ = chain(5)
    server = Model()
    assert dk.chain_position(server) is None
    for step, patch in enumerate(patches, 1):
        dk.apply(server, patch)
        assert same_bits(server.state_dict(), states[step])
        position = dk.chain_position(server, verify=True)
        assert position == Position(step, dk.state_digest(states[step]))


def test_a_patch_out_of_turn_is_refused_and_changes_nothing() -> None:
    patches, states, _ = chain(4)
    server = Model()
    with pytest.raises(BaseMismatchError, match=r"starts from step 2 .* load the weights of that"):
        dk.apply(server, patches[2])
    dk.apply(server, patches[0])
    dk.apply(server, patches[1])
    with pytest.raises(
        BaseMismatchError,
        match=r"at step 2: expected a patch from step 2, found "
        r"one from step 3 to 4; apply those from step 2 to 3 first",
    ):
        dk.apply(server, patches[3])
    with pytest.raises(BaseMismatchError, match="from step 1 to 2, which is applied already"):
        dk.apply(server, patches[1])
    assert same_bits(server.state_dict(), states[2])
    fresh = Model()
    fresh.load_state_dict(states[2])
    with pytest.raises(BaseMismatchError, match="applied already"):
        dk.apply(fresh, patches[1])


def test_a_patch_of_another_run_is_refused() -> None:
    patches, _, _ = chain(2)
    server = Model()
    dk.apply(server, patches[0])
    other = Model()
    train(other, 5)
    stream = dk.PatchStream(other, start=1)
    train(other, 6)
    with pytest.raises(BaseMismatchError, match="belong to different runs"):
        dk.apply(server, stream.step(other))


def test_a_model_with_other_weights_is_told_so() -> None:
    patches, states, _ = chain(2)
    server = Model()
    dk.apply(server, patches[0])
    with torch.no_grad():
        server.w.view(-1)[7] = 3.0  # an entry of the next patch
    with pytest.raises(BaseMismatchError, match="have been changed since step 1"):
        dk.apply(server, patches[1])
    server.load_state_dict(states[1])
    looked_at = np.union1d(patches[1].tensors["w"].indices, sample_positions("w", (40, 30)))
    untouched = int(np.setdiff1d(np.arange(1200), looked_at)[0])
    with torch.no_grad():
        server.w.view(-1)[untouched] = 3.0
    dk.apply(server, patches[1])  # only all weights together can show this
    with pytest.raises(BaseMismatchError, match="should be at step 2"):
        dk.chain_position(server, verify=True)


def test_a_mismatch_that_is_allowed_loses_the_position() -> None:
    patches, states, _ = chain(3)
    server = Model()
    dk.apply(server, patches[0])
    dk.apply(server, patches[2], allow_base_mismatch=True)
    assert dk.chain_position(server) is None
    server.load_state_dict(states[1])
    dk.apply(server, patches[1])
    assert dk.chain_position(server) == Position(2, dk.state_digest(states[2]))


def test_a_patch_that_lost_entries_is_refused() -> None:
    (patch,), _, _ = chain(1, keep_base=True)
    server = Model()
    before = snapshot(server)
    with pytest.raises(BaseMismatchError, match="or the patch have been changed"):
        dk.apply(server, dk.truncate(patch, patch.nnz - 1))
    assert same_bits(server.state_dict(), before)


def test_models_of_another_size_or_dtype_are_told_so() -> None:
    (patch,), _, _ = chain(1)
    larger = Model()
    larger.register_buffer("more", torch.zeros(3))
    with pytest.raises(
        BaseMismatchError, match="the model has 1234 weights, the patched state 1231"
    ):
        dk.apply(larger, patch)
    server = Model()
    dk.apply(server, patch).revert()
    server.w.data = server.w.data.float()
    with pytest.raises(BaseMismatchError, match="'w' is float32 in the model and bfloat16"):
        dk.apply(server, patch)


def test_reverting_goes_back_in_the_chain() -> None:
    patches, states, _ = chain(2)
    server = Model()
    dk.apply(server, patches[0])
    with dk.applied(server, patches[1]):
        assert dk.chain_position(server, verify=True) == Position(2, dk.state_digest(states[2]))
    assert dk.chain_position(server, verify=True) == Position(1, dk.state_digest(states[1]))
    dk.apply(server, patches[1])
    assert same_bits(server.state_dict(), states[2])


def test_patches_and_other_deltas_keep_apart() -> None:
    patches, states, _ = chain(2)
    server = Model()
    first = dk.apply(server, patches[0])
    second = dk.apply(server, patches[1])
    with pytest.raises(BaseMismatchError, match=r"at step 2 .* revert later patches first"):
        first.revert()
    with pytest.raises(ConfigError, match="keeps weight 1"):
        second.set_weights([0.5])
    after = {name: tensor.clone() for name, tensor in states[2].items()}
    after["b"] += 1
    adapter = dk.apply(server, dk.diff(states[2], after))
    for move in (second.revert, lambda: dk.apply(server, patches[1])):
        with pytest.raises(ConfigError, match="other deltas are applied to the model"):
            move()
    assert same_bits(server.state_dict(), after)
    adapter.revert()
    second.revert()
    first.revert()
    first.revert()  # nothing is left to take back
    assert same_bits(server.state_dict(), states[0])
    assert dk.chain_position(server, verify=True) == Position(0, dk.state_digest(states[0]))


def test_a_restarted_trainer_goes_on_with_the_chain() -> None:
    patches, states, stream = chain(2)
    model = Model()
    model.load_state_dict(states[1])
    again = dk.PatchStream(model, start=1)
    train(model, 1)
    assert again.step(model).equals(patches[1])
    assert again.position == stream.position


@pytest.mark.parametrize("keep_base", [False, True])
def test_composed_patches_do_what_they_do_in_turn(keep_base: bool) -> None:
    patches, states, stream = chain(4, keep_base=keep_base)
    whole = dk.compose(patches)
    assert link_of(whole) == Link(Position(0, dk.state_digest(states[0])), stream.position)
    server, listed = Model(), Model()
    dk.apply(server, whole)
    dk.apply(listed, patches)
    assert same_bits(server.state_dict(), states[4])
    assert same_bits(listed.state_dict(), states[4])
    assert dk.chain_position(server, verify=True) == stream.position
    nested = dk.compose([dk.compose(patches[:2]), dk.compose(patches[2:])])
    assert all(t.equals(whole.tensors[n]) for n, t in nested.tensors.items())
    assert nested.base == whole.base
    direct = dk.diff(states[0], states[4], step=0)
    if keep_base:  # entries that came back to their bits are dropped
        assert all(t.equals(direct.tensors[n]) for n, t in whole.tensors.items())
        assert whole.base == direct.base
    else:
        assert whole.nnz > direct.nnz


def test_only_consecutive_patches_are_composed() -> None:
    patches, states, _ = chain(3)
    with pytest.raises(BaseMismatchError, match=r"leads to step 1 .* starts from step 2"):
        dk.compose([patches[0], patches[2]])
    with pytest.raises(DeltaError, match="no patch to compose"):
        dk.compose([])
    with pytest.raises(DeltaError, match="records no chain"):
        dk.compose([dk.diff(states[0], states[1])])
    with pytest.raises(ConfigError, match="not together with other deltas"):
        dk.apply(Model(), [patches[0], dk.diff(states[0], states[1])])
    with pytest.raises(ConfigError, match="weight 1"):
        dk.apply(Model(), patches[0], weights=[0.5])


@pytest.mark.parametrize(
    "record",
    [
        3,
        {"before": [0, "0" * 16]},
        {"before": [0], "after": [1]},
        {"before": [-1, "0" * 16], "after": [0, "0" * 16]},
        {"before": [0, "xyz"], "after": [1, "0" * 16]},
    ],
)
def test_a_malformed_chain_is_refused(record: Any) -> None:
    delta = dk.SparseDelta(tensors={}, provenance={"chain": record})
    with pytest.raises(DeltaError, match="expected before and after"):
        dk.apply(Model(), delta)


def test_files_are_patched_in_order_too(tmp_path: Path) -> None:
    patches, states, _ = chain(3)
    base, merged = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    save_file(states[0], base)
    with pytest.raises(BaseMismatchError, match="is not the base of the delta"):
        dk.merge(base, patches[1], merged)
    dk.merge(base, dk.compose(patches), merged)
    save_file(states[3], tmp_path / "expected.safetensors")
    assert read_safetensors(merged) == read_safetensors(tmp_path / "expected.safetensors")
    from_files = dk.diff(base, merged, step=0)
    assert from_files.equals(dk.diff(states[0], states[3], step=0))
