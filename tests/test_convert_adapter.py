"""Adapters that PEFT itself saved, as deltas of adapters and back: every bit, in files and models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import write_bert, write_gpt2, write_llama

import deltakit as dk
from deltakit.adapters.initial import trained_values
from deltakit.errors import BaseMismatchError, ConfigError
from deltakit.formats.checkpoint import Checkpoint

pytest.importorskip("peft")
import peft
import torch
from adapters import quietly, save_trained
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

WEIGHTS = "adapter_model.safetensors"
TOKENS = torch.arange(6, 14)[None]
LLAMA = (write_llama, AutoModelForCausalLM)
BERT = (write_bert, AutoModelForSequenceClassification)
QV = ["q_proj", "v_proj"]
LIVE = "encoder.layer.1.attention.self.query"


class Case(NamedTuple):
    """A base, a kind of model of it, a type of PEFT with its settings, and the kind it becomes."""

    model: tuple[Any, Any]
    config: str
    settings: dict[str, Any]
    kind: str
    options: Mapping[str, Any] = MappingProxyType({})


HEAD = MappingProxyType({"num_labels": 3})
CASES = {
    "lora": Case(LLAMA, "LoraConfig", {"r": 4, "init_lora_weights": False}, "lora"),
    "patterns": Case(
        LLAMA,
        "LoraConfig",
        {
            "r": 4,
            "use_rslora": True,
            "alpha_pattern": {"v_proj": 3, "model.layers.1.self_attn.q_proj": 5},
            "rank_pattern": {"q_proj": 2},
            "init_lora_weights": False,
        },
        "lora",
    ),
    "head and prefix": Case(
        BERT,
        "LoraConfig",
        {
            "target_modules": ["query", "output.dense"],
            "task_type": "SEQ_CLS",
            "alpha_pattern": {f"bert.{LIVE}": 5},
        },
        "lora",
        HEAD,
    ),
    "conv1d": Case(
        (write_gpt2, AutoModelForCausalLM),
        "LoraConfig",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        "lora",
    ),
    "dora": Case(LLAMA, "LoraConfig", {"use_dora": True}, "dora"),
    "adalora": Case(
        LLAMA, "AdaLoraConfig", {"init_r": 6, "total_step": 10, "tinit": 1, "tfinal": 1}, "adalora"
    ),
    "ia3": Case(
        BERT,
        "IA3Config",
        {
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
            "task_type": "SEQ_CLS",
        },
        "ia3",
        HEAD,
    ),
    "loha": Case(LLAMA, "LoHaConfig", {"r": 3, "init_weights": False}, "loha"),
    "lokr": Case(LLAMA, "LoKrConfig", {"r": 3, "init_weights": False}, "lokr"),
    "oft": Case(LLAMA, "OFTConfig", {"oft_block_size": 4}, "oft"),
    "boft": Case(LLAMA, "BOFTConfig", {"boft_block_size": 4}, "boft"),
    "hra": Case(LLAMA, "HRAConfig", {"r": 4}, "hra"),
    "road": Case(LLAMA, "RoadConfig", {"group_size": 4}, "road"),
}


def save(case: Case, folder: Path) -> tuple[Path, Path]:
    """The base, and the adapter that PEFT saved of it."""
    write, kind = case.model
    base, adapter = write(folder / "base"), folder / "adapter"
    with quietly():
        config = getattr(peft, case.config)(**{"target_modules": QV, **case.settings})
    save_trained(base, kind, config, adapter, **case.options)
    return base, adapter


@torch.no_grad()
def logits(case: Case, base: Path, adapter: Path | dk.SparseDelta) -> torch.Tensor:
    """What the model computes with an adapter that PEFT loads, or with a delta applied."""
    torch.manual_seed(3)
    with quietly():
        model = case.model[1].from_pretrained(base, **case.options)
        if isinstance(adapter, Path):
            model = peft.PeftModel.from_pretrained(model, adapter)
        else:
            dk.apply(model, adapter)
        found: torch.Tensor = model.eval()(TOKENS).logits
        return found


@pytest.mark.parametrize("name", list(CASES))
def test_every_bit_comes_through(name: str, tmp_path: Path) -> None:
    """PEFT's file to a delta, its forward that of PEFT's model; back to PEFT's own bytes; and the
    delta of that is the same again."""
    case = CASES[name]
    base, adapter = save(case, tmp_path)
    report = dk.convert(adapter, tmp_path / "d.sdelta", base=base)
    assert report.from_format == ("peft-lora" if case.config == "LoraConfig" else "peft-adapter")
    delta = dk.load(tmp_path / "d.sdelta")
    assert delta.adapter is not None and delta.adapter.kind == case.kind
    theirs = load_file(adapter / WEIGHTS)
    ours = [*trained_values(delta).values(), *delta.extras.values()]
    assert sorted(a.tobytes() for a in ours) == sorted(a.tobytes() for a in theirs.values())

    expected = logits(case, base, adapter)
    assert torch.equal(logits(case, base, delta), expected)
    dk.convert(tmp_path / "d.sdelta", tmp_path / "back", to_format="peft-adapter", base=base)
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert torch.equal(logits(case, base, tmp_path / "back"), expected)
    dk.convert(tmp_path / "back", tmp_path / "e.sdelta", base=base)
    again = dk.load(tmp_path / "e.sdelta")
    assert again.equals(delta)


def test_the_base_is_recorded_and_checked(tmp_path: Path) -> None:
    base, adapter = save(CASES["lora"], tmp_path)
    dk.convert(adapter, tmp_path / "d.sdelta", base=base)
    delta = dk.load(tmp_path / "d.sdelta")
    assert delta.base is not None
    assert sorted(delta.base.tensors) == [
        f"model.layers.{n}.self_attn.{m}.weight" for n in (0, 1) for m in QV
    ]
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="not the base"):
        dk.convert(
            tmp_path / "d.sdelta", tmp_path / "o", to_format="peft-adapter", base=tmp_path / "other"
        )


def test_a_head_brings_its_labels_and_a_rule_for_names(tmp_path: Path) -> None:
    case = CASES["head and prefix"]
    base, adapter = save(case, tmp_path)
    dk.convert(adapter, tmp_path / "d.sdelta", base=base)
    delta = dk.load(tmp_path / "d.sdelta")
    assert list(delta.extras) == ["classifier.bias", "classifier.weight"]
    assert delta.config["id2label"] == {str(n): f"LABEL_{n}" for n in range(3)}
    assert delta.provenance["peft"] == {"names": {"on": "bert."}, "task_type": "SEQ_CLS"}
    assert delta.adapter is not None  # its patterns speak of the checkpoint's names
    assert delta.adapter.config["alpha_pattern"] == {LIVE.replace(".", r"\."): 5}
    assert {delta.adapter.split(name)[0] for name in delta.tensors} > {LIVE}
    dk.convert(tmp_path / "d.sdelta", tmp_path / "back", to_format="peft-adapter", base=base)
    told = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert told["modules_to_save"] == ["classifier"]
    assert told["task_type"] == "SEQ_CLS"
    assert told["base_model_name_or_path"] == str(base)


def test_biases_and_saved_embeddings_come_back(tmp_path: Path) -> None:
    """With `bias="all"` PEFT saves the biases of adapted layers under their `base_layer`."""
    settings = {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}
    case = Case(BERT, "LoraConfig", settings, "lora", HEAD)
    base, adapter = save(case, tmp_path)
    dk.convert(adapter, tmp_path / "d.sdelta", base=base)
    dk.convert(tmp_path / "d.sdelta", tmp_path / "back", to_format="peft-adapter", base=base)
    theirs, ours = load_file(adapter / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    wrapped = (".original_module.", ".modules_to_save.")  # the head, which it saves three times
    assert ours.keys() == {k for k in theirs if not any(w in k for w in wrapped)}
    assert all(ours[key].tobytes() == theirs[key].tobytes() for key in ours)
    expected = logits(case, base, adapter)
    assert torch.equal(logits(case, base, tmp_path / "back"), expected)
    assert torch.equal(logits(case, base, dk.load(tmp_path / "d.sdelta")), expected)


def masked(file: Path, share: float, fill: float = 0.0) -> dict[str, np.ndarray]:
    """Multiply a share of every tensor's elements by 0, as pruning does, or put `fill` there."""
    rng = np.random.default_rng(0)
    arrays = load_file(file)
    for array in arrays.values():
        gone = rng.random(array.shape) < share
        array[gone] = np.float32(fill) if fill else array[gone] * np.float32(0)
    save_file(arrays, file, {"format": "pt"})
    return arrays


def test_a_sparsified_adapter_is_compact(tmp_path: Path) -> None:
    """Elements that are zero are no entries, whichever sign their product left them."""
    base, adapter = save(CASES["lora"], tmp_path)
    arrays = masked(adapter / WEIGHTS, 0.9)
    report = dk.convert(adapter, tmp_path / "d.sdelta", base=base)
    left = sum(int(np.count_nonzero(array)) for array in arrays.values())
    minus = sum(int((np.signbit(a) & (a == 0)).sum()) for a in arrays.values())
    assert report.entries == left and minus
    assert report.notes == (f"{minus:,} elements of -0.0 become 0.0",)
    delta = dk.load(tmp_path / "d.sdelta")
    assert torch.equal(logits(CASES["lora"], base, delta), logits(CASES["lora"], base, adapter))
    size = (tmp_path / "d.sdelta").stat().st_size
    dense = sum(array.nbytes for array in arrays.values())
    assert left * 4 < size and len(delta.tensors) == len(arrays) and dense > 8 * left


def test_factors_that_did_not_move_are_no_entries(tmp_path: Path) -> None:
    """IA3's start is 1, which takes fewer entries here than 0 would."""
    base, adapter = save(CASES["ia3"], tmp_path)
    arrays = masked(adapter / WEIGHTS, 0.8, fill=1.0)
    dk.convert(adapter, tmp_path / "d.sdelta", base=base)
    delta = dk.load(tmp_path / "d.sdelta")
    assert delta.adapter is not None and delta.adapter.initial == {"ia3_l": {"constant": 1.0}}
    gains = [a for key, a in arrays.items() if key.endswith("ia3_l")]
    assert delta.nnz == sum(int((a != 1).sum()) for a in gains)
    values = sorted(a.tobytes() for a in trained_values(delta).values())
    assert values == sorted(a.tobytes() for a in gains)


def test_a_value_that_no_sum_with_one_gives_starts_from_zero(tmp_path: Path) -> None:
    base, adapter = save(CASES["ia3"], tmp_path)
    arrays = masked(adapter / WEIGHTS, 0.8, fill=1.0)
    key = next(k for k in sorted(arrays) if k.endswith("ia3_l"))
    arrays[key].reshape(-1)[0] = 1e-20  # 1 + (1e-20 - 1) is 0
    save_file(arrays, adapter / WEIGHTS)
    dk.convert(adapter, tmp_path / "d.sdelta", base=base)
    delta = dk.load(tmp_path / "d.sdelta")
    assert delta.adapter is not None and delta.adapter.initial == {"ia3_l": {"constant": 0.0}}
    assert any(np.float32(1e-20) in a for a in trained_values(delta).values())


def test_pruned_ranks_of_adalora_stand_as_zeros(tmp_path: Path) -> None:
    """PEFT saves the ranks that are left alone, and divides by the number there was."""
    case = CASES["adalora"]
    base = case.model[0](tmp_path / "base")
    with quietly():
        torch.manual_seed(1)
        config = peft.AdaLoraConfig(**{"target_modules": QV, **case.settings})
        adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        masks = {}
        for name, parameter in adapted.base_model.model.named_parameters():
            if "lora_E" in name:
                masks[name] = [True, False, True, True, False, False]
                parameter.data[[1, 4, 5]] = 0
        adapted.peft_config["default"].rank_pattern = masks
        adapted.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {a.shape for k, a in saved.items() if k.endswith("lora_E")} == {(3, 1)}
    dk.convert(tmp_path / "adapter", tmp_path / "d.sdelta", base=base)
    delta = dk.load(tmp_path / "d.sdelta")
    assert delta.nnz == sum(array.size for array in saved.values())
    assert {t.shape for n, t in delta.tensors.items() if n.endswith("lora_E")} == {(6, 1)}
    expected = logits(case, base, tmp_path / "adapter")
    assert torch.allclose(logits(case, base, delta), expected, rtol=0, atol=1e-6)
    dk.convert(tmp_path / "d.sdelta", tmp_path / "back", to_format="peft-adapter", base=base)
    assert torch.equal(logits(case, base, tmp_path / "back"), logits(case, base, delta))


def test_without_a_base_the_modules_keep_their_names(tmp_path: Path) -> None:
    base, adapter = save(CASES["lora"], tmp_path)
    report = dk.convert(adapter, tmp_path / "d.sdelta")
    assert report.notes == ("no base was given: modules are taken to have the same names in it",)
    dk.convert(adapter, tmp_path / "e.sdelta", base=base)
    one, other = dk.load(tmp_path / "d.sdelta"), dk.load(tmp_path / "e.sdelta")
    assert all(tensor.equals(other.tensors[name]) for name, tensor in one.tensors.items())
    assert one.adapter == other.adapter and one.base is not None and not one.base.tensors


def test_a_lora_becomes_weights_where_that_is_asked(tmp_path: Path) -> None:
    base, adapter = save(CASES["lora"], tmp_path)
    kept = dk.convert(adapter, tmp_path / "a.sdelta", base=base, form="adapter")
    plain = dk.convert(adapter, tmp_path / "b.sdelta", base=base, form="weights", budget=50)
    implied = dk.convert(adapter, tmp_path / "c.sdelta", base=base, budget=50)
    assert dk.load(tmp_path / "a.sdelta").adapter is not None and kept.retained is None
    assert dk.load(tmp_path / "b.sdelta").adapter is None and plain.entries == 50
    assert (tmp_path / "b.sdelta").read_bytes() == (tmp_path / "c.sdelta").read_bytes()
    assert implied.retained == plain.retained
    with pytest.raises(ConfigError, match="is for the change of the weights"):
        dk.convert(adapter, tmp_path / "d.sdelta", base=base, form="adapter", budget=50)
    with pytest.raises(ConfigError, match="has one form only"):
        dk.convert(tmp_path / "b.sdelta", tmp_path / "d", to_format="peft-shira", form="weights")


def test_adapters_and_entries_are_not_mixed_up(tmp_path: Path) -> None:
    base, adapter = save(CASES["lora"], tmp_path)
    dk.convert(adapter, tmp_path / "a.sdelta", base=base)
    dk.convert(adapter, tmp_path / "w.sdelta", base=base, budget=50)
    for name in ("peft-shira", "coo-safetensors", "weightscope"):
        with pytest.raises(ConfigError, match=r"is one of an adapter \(lora\); --to peft-adapter"):
            dk.convert(tmp_path / "a.sdelta", tmp_path / "o", to_format=name, base=base)
    for name in ("peft-adapter", "adapter-modules"):
        with pytest.raises(ConfigError, match="holds adapters and the delta holds entries"):
            dk.convert(tmp_path / "w.sdelta", tmp_path / "o", to_format=name, base=base)
    assert not (tmp_path / "o").exists()


def test_the_conversion_needs_no_torch_model(tmp_path: Path) -> None:
    """A merged delta equals the PEFT adapter merged by PEFT, up to the rounding of a product."""
    case = CASES["lora"]
    base, adapter = save(case, tmp_path)
    dk.convert(adapter, tmp_path / "d.sdelta", base=base)
    dk.merge(base, [tmp_path / "d.sdelta"], tmp_path / "merged")
    with quietly():
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        theirs = model.merge_and_unload().state_dict()
    merged, plain = Checkpoint(tmp_path / "merged"), Checkpoint(base)
    for name in merged.names:
        values = merged.read(name).view(np.float32)
        assert np.allclose(values, theirs[name].numpy().reshape(-1), rtol=0, atol=1e-6)
    moved = [n for n in merged.names if not np.array_equal(merged.read(n), plain.read(n))]
    assert len(moved) == 4
