"""LoRA adapters of peft made sparse: whole, they merge as peft does; cut, they keep the largest."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_models import write_bert, write_gpt2, write_llama, write_resnet

import deltakit as dk
from deltakit.errors import BudgetError, ConfigError, FormatError
from deltakit.formats.bridges import sparsify
from deltakit.formats.bridges.bridge import Energy
from deltakit.formats.bridges.sparsify import DenseChange, sparsified

pytest.importorskip("peft")
import torch
from adapters import State, load_plain, save_trained
from peft import LoraConfig
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification


class Case(NamedTuple):
    """A base, a kind of model of it, and the settings of an adapter."""

    write: Any
    kind: Any
    settings: dict[str, Any]
    options: Mapping[str, Any] = MappingProxyType({})


HEAD = {"num_labels": 3}
CASES = {
    "linear": Case(write_llama, AutoModelForCausalLM, {"target_modules": ["q_proj", "down_proj"]}),
    "patterns": Case(
        write_llama,
        AutoModelForCausalLM,
        {
            "target_modules": ["q_proj", "up_proj"],
            "use_rslora": True,
            "alpha_pattern": {"up_proj": 3, "layers.1.self_attn.q_proj": 5},
            "rank_pattern": {"q_proj": 2},
        },
    ),
    "embedding": Case(write_llama, AutoModelForCausalLM, {"target_modules": ["embed_tokens"]}),
    "conv1d": Case(
        write_gpt2,
        AutoModelForCausalLM,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "convolution": Case(write_resnet, AutoModel, {"target_modules": ["convolution"]}),
    "head and biases": Case(
        write_bert,
        AutoModelForSequenceClassification,
        {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
        HEAD,
    ),
    "biases of the factors": Case(
        write_bert,
        AutoModelForSequenceClassification,
        {"target_modules": ["query"], "lora_bias": True, "task_type": "SEQ_CLS"},
        HEAD,
    ),
}


def save(case: Case, folder: Path, **settings: Any) -> tuple[Path, Path, State]:
    """The base, the adapter and the weights that peft merges them to."""
    base, adapter = case.write(folder / "base"), folder / "adapter"
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **case.settings, **settings)
    merged = save_trained(base, case.kind, config, adapter, **case.options)
    return base, adapter, merged


@pytest.mark.parametrize("name", list(CASES))
def test_whole_it_merges_as_peft_does(name: str, tmp_path: Path) -> None:
    """At density 1 nothing is lost; the product may be rounded otherwise than in torch."""
    base, adapter, theirs = save(CASES[name], tmp_path)
    report = dk.convert(adapter, tmp_path / "d.sdelta", base=base, density=1.0)
    assert report.from_format == "peft-lora"
    assert report.retained == 1.0
    dk.merge(base, [tmp_path / "d.sdelta"], tmp_path / "merged")
    mine = load_plain(tmp_path / "merged", CASES[name].kind, **CASES[name].options)
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.allclose(mine[key], tensor, rtol=0, atol=1e-6), key
    before = load_plain(base, CASES[name].kind, **CASES[name].options)
    moved = [k for k in theirs if not torch.allclose(theirs[k], before[k], rtol=0, atol=1e-3)]
    assert moved  # the adapter was not one of nothing


def test_cut_it_keeps_the_largest(tmp_path: Path) -> None:
    base, adapter, theirs = save(CASES["linear"], tmp_path)
    before = load_plain(base, AutoModelForCausalLM)
    changes = {k: (theirs[k] - before[k]).abs().flatten() for k in theirs}
    everything = torch.cat([c for _, c in sorted(changes.items())])
    report = dk.convert(adapter, tmp_path / "d.sdelta", base=base, budget=100)
    delta = dk.load(tmp_path / "d.sdelta")
    assert report.entries == delta.nnz == 100
    kept = np.concatenate([np.abs(t.values) for t in delta.tensors.values()])
    assert np.allclose(
        np.sort(kept)[::-1], everything.sort(descending=True).values[:100], atol=1e-6
    )

    energy = float((everything.double() ** 2).sum())
    assert report.retained == pytest.approx(
        float((kept.astype(float) ** 2).sum()) / energy, rel=1e-4
    )
    for name, found in report.energy.items():
        assert found.whole == pytest.approx(float((changes[name].double() ** 2).sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("asked", "count"),
    [({"budget": "1k"}, 1000), ({"budget": "1%"}, 0), ({"density": 0.25}, 384)],
)
def test_budgets(asked: dict[str, Any], count: int, tmp_path: Path) -> None:
    """q_proj (2 x 16 x 16) and down_proj (2 x 16 x 32) have 1,536 weights together."""
    base, adapter, _ = save(CASES["linear"], tmp_path)
    total = sum(tensor.numel() for tensor in load_plain(base, AutoModelForCausalLM).values())
    report = dk.convert(adapter, tmp_path / "d.sdelta", base=base, **asked)
    assert report.entries == (count or total // 100)


def test_without_a_base_the_modules_are_the_names(tmp_path: Path) -> None:
    base, adapter, _ = save(CASES["linear"], tmp_path)
    dk.convert(adapter, tmp_path / "d.sdelta", base=base, budget=200)
    report = dk.convert(adapter, tmp_path / "e.sdelta", budget=200)
    assert any("no base was given" in note for note in report.notes)
    one, other = dk.load(tmp_path / "d.sdelta"), dk.load(tmp_path / "e.sdelta")
    assert all(tensor.equals(other.tensors[name]) for name, tensor in one.tensors.items())


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({}, ConfigError, "say how many entries to keep"),
        ({"budget": 5, "density": 0.5}, ConfigError, "say how many entries to keep"),
        ({"density": 0.0}, BudgetError, "is no share"),
        ({"density": math.nan}, BudgetError, "is no share"),
    ],
)
def test_a_budget_is_needed(
    asked: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    base, adapter, _ = save(CASES["linear"], tmp_path)
    with pytest.raises(error, match=message):
        dk.convert(adapter, tmp_path / "d.sdelta", base=base, form="weights", **asked)


SETTINGS = {
    "DoRA": ({"use_dora": True}, "use_dora: DoRA scales the columns"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "'pissa' changes the base before training"),
    "tokens": ({"trainable_token_indices": [1]}, "trained token rows are not supported"),
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_what_is_no_sum_is_refused(name: str, tmp_path: Path) -> None:
    settings, message = SETTINGS[name]
    base, adapter, _ = save(CASES["linear"], tmp_path)
    edit_config(adapter, **settings)
    with pytest.raises(FormatError, match=message):
        dk.convert(adapter, tmp_path / "d.sdelta", base=base, budget=10)


def test_a_dora_adapter_of_peft_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = save(CASES["linear"], tmp_path, use_dora=True)
    edit_config(adapter, use_dora=False)  # the factors tell it all the same
    with pytest.raises(FormatError, match="DoRA scales the columns"):
        dk.convert(adapter, tmp_path / "d.sdelta", base=base, budget=10)


def test_a_square_layer_under_a_doubtful_setting(tmp_path: Path) -> None:
    """GPT-2 has square Conv1D layers; peft's setting is that of the layer it adapted last."""
    base, adapter, _ = save(CASES["conv1d"], tmp_path)
    edit_config(adapter, fan_in_fan_out=False)
    with pytest.raises(FormatError, match=r"'transformer.h.0.attn.c_proj' is square"):
        dk.convert(adapter, tmp_path / "d.sdelta", base=base, budget=10)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def with_nan(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed[0, 0] = np.nan
    return changed


ATTACKS = {
    "other rank": ("lora_A.weight", lambda a: a[:-1], "do not fit"),
    "other width": ("lora_A.weight", lambda a: a[:, :-1], "is this the base"),
    "a vector": ("lora_B.weight", lambda a: a[0], "do not fit"),
    "not finite": ("lora_A.weight", with_nan, "its change is not finite"),
    "one factor": ("lora_B.weight", None, "no pair of factors"),
}


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_hostile_factors_are_refused(attack: str, tmp_path: Path) -> None:
    ending, change, message = ATTACKS[attack]
    base, adapter, _ = save(CASES["linear"], tmp_path)
    file = adapter / "adapter_model.safetensors"
    arrays = load_file(file)
    key = next(k for k in sorted(arrays) if k.endswith(ending))
    if change is None:
        del arrays[key]
    else:
        arrays[key] = np.ascontiguousarray(change(arrays[key]))
    save_file(arrays, file)
    with pytest.raises(FormatError, match=message):
        dk.convert(adapter, tmp_path / "d.sdelta", base=base, budget=10)
    assert not (tmp_path / "d.sdelta").exists()


def test_a_broken_configuration_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = save(CASES["linear"], tmp_path)
    edit_config(adapter, lora_alpha="8")
    with pytest.raises(FormatError, match="give no scaling"):
        dk.convert(adapter, tmp_path / "d.sdelta", base=base, budget=10)
    edit_config(adapter, lora_alpha=8, alpha_pattern={"(": 1})
    with pytest.raises(FormatError, match=r"alpha_pattern: .* in a pattern"):
        dk.convert(adapter, tmp_path / "d.sdelta", base=base, budget=10)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "peft_type": "SHIRA"}')
    with pytest.raises(FormatError, match="is of no known format"):
        dk.convert(adapter, tmp_path / "d.sdelta", base=base, budget=10)


def test_memory_grows_with_one_tensor_and_the_budget() -> None:
    """48 tensors of 4 MB: the pool and one dense tensor stay far below the 192 MB of all."""
    shape, factors = (1024, 1024), np.random.default_rng(0).standard_normal((1024, 3), np.float32)
    dense = [
        DenseChange(f"{n:02}", shape, "float32", lambda n=n: factors @ (factors * n).T)
        for n in range(48)
    ]
    tracemalloc.start()
    tensors, _ = sparsified(dense, 50_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(tensor.nnz for tensor in tensors.values()) == 50_000
    assert peak < 40e6


@given(
    changes=st.lists(
        st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0]), max_size=12), max_size=5
    ),
    count=st.integers(0, 40),
)
def test_sparsified_is_a_sort(changes: list[list[float]], count: int) -> None:
    """Against a naive sort by (size, tensor, index), with ties the rule and zeros left out."""
    arrays = [np.array(values, np.float32) for values in changes]
    dense = [
        DenseChange(str(n), array.shape, "float32", lambda array=array: array)
        for n, array in enumerate(arrays)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsify, "_CHUNK", 5)  # so that tensors take several
        tensors, energy = sparsify.sparsified(dense, count)
    ranked = sorted(
        (-abs(float(value)), number, index)
        for number, array in enumerate(arrays)
        for index, value in enumerate(array)
        if value
    )
    expected = sorted((number, index) for _, number, index in ranked[:count])
    found = [(int(name), int(i)) for name, t in tensors.items() for i in t.indices]
    assert found == expected
    for name, tensor in tensors.items():
        assert np.array_equal(tensor.values, arrays[int(name)][tensor.indices])
    for number, array in enumerate(arrays):
        kept = tensors[str(number)].values if str(number) in tensors else np.zeros(0)
        squares = [float((part.astype(float) ** 2).sum()) for part in (array, kept)]
        assert energy[str(number)] == Energy(*squares)  # exact for these values
