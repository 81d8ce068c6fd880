"""Laws of weight patches: bit for bit, in order, and the digest follows every change."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_factory import read_safetensors
from safetensors.torch import load_file, save_file
from tiny_models import write_gpt2
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import deltakit as dk
from deltakit.dtypes import DTYPES, DType
from deltakit.errors import BaseMismatchError, ConfigError, CoordinateError, DeltaError
from deltakit.formats.seeded import philox_words
from deltakit.identity import sample_positions
from deltakit.patching import states
from deltakit.patching.chain import Link, Position, link_of
from deltakit.patching.digests import TensorKeys
from deltakit.patching.states import FlatTensor, differing, flat_tensors

EXAMPLE = Path(__file__).parents[1] / "examples" / "rl_weight_patches.py"
State = dict[str, torch.Tensor]


def random_words(kind: DType, count: int, seed: int) -> np.ndarray[Any, Any]:
    """Raw bits of any payload, NaNs and both zeros among them; 0 and 1 for bool."""
    high = 2 if kind.name == "bool" else 2 ** (8 * kind.itemsize)
    return np.random.default_rng(seed).integers(0, high, count, kind.words)


def as_torch(words: np.ndarray[Any, Any], kind: DType) -> torch.Tensor:
    signed = words.view(np.uint8 if kind.itemsize == 1 else f"<i{kind.itemsize}")
    return torch.from_numpy(signed.copy()).view(getattr(torch, kind.name))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(bits(t) == bits(other[n]) for n, t in one.items())


class Model(torch.nn.Module):
    """A matrix, a vector and a saved buffer of three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.w = torch.nn.Parameter(torch.randn(40, 30, generator=random).bfloat16())
        self.b = torch.nn.Parameter(torch.randn(30, generator=random))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


def train(model: Model, step: int) -> None:
    """Change some bits of everything; every second step changes a weight and back."""
    random = np.random.default_rng(step)
    with torch.no_grad():
        at = torch.from_numpy(random.choice(1200, 50, replace=False))
        model.w.view(-1).view(torch.int16)[at] ^= 3
        model.w.view(-1)[7] = float("nan") if step % 2 else -0.0
        model.b[step] = torch.tensor(-0.0 if step % 2 else 1.5)
        model.get_buffer("seen").add_(1)


def chain(steps: int, **options: Any) -> tuple[list[dk.SparseDelta], list[State], dk.PatchStream]:
    """Patches of a run, the states from the first to the last, and the stream that made them."""
    model = Model()
    stream = dk.PatchStream(model, **options)
    patches, states = [], [snapshot(model)]
    for step in range(steps):
        train(model, step)
        patches.append(stream.step(model))
        states.append(snapshot(model))
    return patches, states, stream


def snapshot(model: torch.nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 64, 333])
@pytest.mark.parametrize("where", ["host", "device"])
def test_what_differs_is_what_a_dense_comparison_finds(
    monkeypatch: pytest.MonkeyPatch, name: str, count: int, where: str
) -> None:
    monkeypatch.setattr(states, "CHUNK", 64)
    kind = DTYPES[name]
    old, new = random_words(kind, count, 1), random_words(kind, count, 2)
    same = np.random.default_rng(3).random(count) < 0.8
    new[same] = old[same]
    sides = [FlatTensor("t", (count,), kind, words) for words in (old.copy(), new)]
    if where == "device":  # what is elsewhere than on the host is a tensor of torch's integers
        width = torch.uint8 if kind.itemsize == 1 else getattr(torch, f"int{8 * kind.itemsize}")
        tensors = [as_torch(words, kind).view(width) for words in (old, new)]
        sides = [FlatTensor("t", (count,), kind, words) for words in tensors]
    indices, before, after = differing(*sides)
    assert indices.dtype == np.int64
    assert indices.tolist() == np.flatnonzero(old != new).tolist()
    assert before.dtype == after.dtype == kind.words
    assert before.tolist() == old[indices].tolist()
    assert after.tolist() == new[indices].tolist()
    copy = sides[0].copied(on_host=where == "host")
    copy.put(indices, after)
    assert not len(differing(copy, sides[1])[0])
    assert sides[0].gather(indices).tolist() == before.tolist(), "a copy has its own memory"
    assert copy.digest_term() == sides[1].digest_term()


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64", "uint8", "bool"])
def test_the_digest_is_the_sum_that_its_description_says(name: str) -> None:
    kind, count = DTYPES[name], 70_001
    words = random_words(kind, count, 5)
    narrow = words.view(np.uint16) if kind.itemsize > 1 else words
    blocks = -(-len(narrow) // 2**16)
    shared = philox_words(0, "", 2**16, "state digest").tolist()
    own, *keys = philox_words(0, "t", 1 + blocks, f"state digest {name} {count}").tolist()
    total = own
    for number, word in enumerate(narrow.tolist()):
        total += (keys[number // 2**16] | 1) * shared[number % 2**16] * word
    found = dk.state_digest({"t": as_torch(words, kind)})
    assert found == f"{total % 2**64:016x}"


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64", "bool"])
def test_a_change_moves_the_digest_to_that_of_the_changed_state(name: str) -> None:
    kind, shape = DTYPES[name], (300, 701)
    old = random_words(kind, 300 * 701, 1)
    at = np.sort(np.random.default_rng(2).choice(len(old), 70_000, replace=False))
    new = old.copy()
    new[at] = random_words(kind, len(at), 3)
    keys = TensorKeys("t", shape, kind)
    assert (keys.whole(old) + keys.change(at, old[at], new[at]) - keys.whole(new)) % 2**64 == 0


def test_the_digest_tells_states_apart() -> None:
    base = torch.arange(1, 9, dtype=torch.bfloat16)
    states = [{"t": base}, {"u": base}, {"t": base.view(2, 4)}, {"t": base.view(torch.int16)}]
    states += [{"t": base, "e": torch.empty(0)}, {"t": base[[1, 0, 2, 3, 4, 5, 6, 7]]}]
    for bit in range(16):
        flipped = base.clone()
        flipped.view(torch.int16)[3] ^= (1 << bit) - (1 << 16 if bit == 15 else 0)
        states.append({"t": flipped})
    assert len({dk.state_digest(state) for state in states}) == len(states)


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


def write_mixtral(folder: Path) -> Path:
    """A decoder whose experts the library fuses when it loads them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("write", [write_gpt2, write_mixtral])
def test_a_model_is_patched_in_the_coordinates_of_its_checkpoint(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    folder = write(tmp_path / "base")
    trained, server = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    stream = dk.PatchStream(trained)
    for step in range(2):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.view(-1)[step :: 5 + step] += 0.25
        patch = stream.step(trained)
        assert set(patch.tensors) <= set(load_file(folder / "model.safetensors"))
        dk.apply(server, patch)
        assert same_bits(server.state_dict(), trained.state_dict())
        assert dk.chain_position(server, verify=True) == stream.position
    trained.save_pretrained(tmp_path / "trained")
    assert dk.state_digest(tmp_path / "trained") == stream.position.digest


def test_tied_tensors_count_once_even_where_a_copy_has_lost_the_tie() -> None:
    tied = {"embed": torch.randn(6, 4), "head": torch.zeros(0)}
    tied["head"] = tied["embed"]
    copy = {name: tensor.clone() for name, tensor in tied.items()}
    tied["embed"][2, 1] = 5.0
    for pair in ((copy, tied), (tied, copy)):
        assert list(dk.diff(*pair).tensors) == ["embed"]
    copy["head"][0, 0] = 9.0
    with pytest.raises(CoordinateError, match="share their memory in one state and differ"):
        dk.diff(copy, tied)


def test_names_lead_to_the_checkpoint() -> None:
    before, after = {"module.w": torch.zeros(9), "b": torch.zeros(2)}, {}
    after = {name: tensor + 1 for name, tensor in before.items()}
    names = {"module.w": "w"}
    assert list(dk.diff(before, after, names=names).tensors) == ["b", "w"]
    stream = dk.PatchStream(before, names=names)
    assert list(stream.step(after).tensors) == ["b", "w"]
    with pytest.raises(CoordinateError, match="two tensors of the state are called 'b'"):
        dk.diff(before, after, names={"module.w": "b"})


def test_states_that_do_not_match_are_refused(tmp_path: Path) -> None:
    state = {"w": torch.zeros(4, 3), "b": torch.zeros(2)}
    stream = dk.PatchStream(state)
    with pytest.raises(CoordinateError, match="second state lacks tensor 'b'"):
        stream.step({"w": state["w"]})
    with pytest.raises(CoordinateError, match="first state lacks tensor 'more'"):
        stream.step(state | {"more": torch.zeros(1)})
    with pytest.raises(CoordinateError, match=r"\[4, 3\] in the first state and \[3, 4\]"):
        stream.step(state | {"w": torch.zeros(3, 4)})
    with pytest.raises(DeltaError, match="float32 in the first state and bfloat16 in the second"):
        stream.step(state | {"w": torch.zeros(4, 3, dtype=torch.bfloat16)})
    with pytest.raises(CoordinateError, match="meta device"):
        stream.step(state | {"w": torch.zeros(4, 3, device="meta")})
    assert stream.position == Position(0, dk.state_digest(state))
    with pytest.raises(ConfigError, match="step -1 cannot be"):
        dk.PatchStream(state, start=-1)
    with pytest.raises(ConfigError, match="step -2 cannot be"):
        dk.diff(state, state, step=-2)
    with pytest.raises(ConfigError, match="are for diffs of files"):
        dk.diff(state, state, out=tmp_path / "x.sdelta")  # type: ignore[call-overload]
    assert not list(tmp_path.iterdir())


def test_a_state_on_disk_is_the_other_side_of_a_live_one(tmp_path: Path) -> None:
    model = Model()
    save_file(snapshot(model), tmp_path / "base.safetensors")
    train(model, 0)
    live = dk.diff(tmp_path / "base.safetensors", model)
    save_file(snapshot(model), tmp_path / "tuned.safetensors")
    files = dk.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    assert live.nnz == files.nnz
    assert all(t.equals(files.tensors[name]) for name, t in live.tensors.items())
    assert live.base is not None and files.base is not None
    assert dict(live.base.tensors) == dict(files.base.tensors)


def test_host_tensors_are_compared_where_they_are() -> None:
    tensor = torch.zeros(8, dtype=torch.bfloat16)
    flat = flat_tensors({"t": tensor})["t"]
    tensor[3] = 1
    assert np.flatnonzero(flat.words).tolist() == [3]


def test_the_example_runs(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path / "patches")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "bit for bit, at step 20" in done.stdout
    assert "refused: the model is at step 20" in done.stdout
    assert len(list((tmp_path / "patches").glob("*.sdelta"))) == 20
