"""Two states of a model, compared bit for bit, and the digest that follows every change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from patch_lab import Model, as_torch, random_words, same_bits, snapshot, train
from safetensors.torch import load_file, save_file
from tiny_models import write_gpt2
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import deltakit as dk
from deltakit.dtypes import DTYPES
from deltakit.errors import ConfigError, CoordinateError, DeltaError
from deltakit.formats.seeded import philox_words
from deltakit.patching import states
from deltakit.patching.chain import Position
from deltakit.patching.digests import TensorKeys
from deltakit.patching.states import FlatTensor, differing, flat_tensors


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
