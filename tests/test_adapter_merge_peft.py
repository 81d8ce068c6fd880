"""A merged model is the one with the adapter attached, and the one that peft merges."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attach_lab import BERT, GPT2, OPT, T5, Family, outputs, train
from peft.tuners.tuners_utils import BaseTunerLayer

from deltakit import SparseDelta, apply, merge
from deltakit.adapters.attach import attach
from deltakit.formats.checkpoint import Checkpoint

# First block at other ranks than the rest, so that patterns are seen to be read.
_PATTERNS: dict[str, Any] = {
    "rank_pattern": {r"0\..*": 2, r"h\.0\..*": 2},
    "alpha_pattern": {r"1\..*": 12, r"h\.1\..*": 12},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 6, **_PATTERNS},
    "rslora": {"rank": 4, "alpha": 6, "use_rslora": True, **_PATTERNS},
    "dora": {"rank": 4, "alpha": 6, **_PATTERNS},
    "adalora": {"rank": 4, "alpha": 6},
    "ia3": {},
    "loha": {"rank": 4, "alpha": 6, **_PATTERNS},
    "lokr": {"rank": 2, "alpha": 6},
    "lokr in factors": {"rank": 2, "decompose_both": True, **_PATTERNS},
}
CASES = [(name, BERT) for name in OPTIONS]
CASES += [("lora", family) for family in (T5, OPT)]
CASES += [(name, GPT2) for name in ("lora", "dora", "adalora", "ia3")]


def loaded(family: Family, folder: Path) -> Any:
    """The model of a checkpoint, a head that it lacks being the family's own."""
    torch.manual_seed(7)
    return family.kind.from_pretrained(folder).eval()


def trained(name: str, family: Family, folder: Path, seed: int = 3) -> tuple[Any, Any, SparseDelta]:
    """A model with a trained adapter in it, what it reads, and the adapter's delta."""
    model, inputs = family.load(folder)
    kind = name.split()[0] if name != "rslora" else "lora"
    checkpoint = Checkpoint(folder)
    attached = attach(model, kind, OPTIONS[name], seed=seed, base=checkpoint)
    return model, inputs, train(attached, checkpoint)


@pytest.mark.parametrize(("name", "family"), CASES, ids=[f"{n}-{f.name}" for n, f in CASES])
def test_the_merged_model_is_the_one_that_peft_merges(
    tmp_path: Path, name: str, family: Family
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    model, inputs, delta = trained(name, family, base)
    attached = outputs(model, inputs)
    merge(base, delta, tmp_path / "out")
    folded, plain = loaded(family, tmp_path / "out"), loaded(family, base)
    assert torch.allclose(outputs(folded, inputs), attached, rtol=1e-4, atol=1e-5)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    moved = 0
    for path, layer in layers:
        layer.merge()
        ours, before = (m.get_submodule(path).state_dict() for m in (folded, plain))
        for tensor, theirs in layer.get_base_layer().state_dict().items():
            assert torch.allclose(ours[tensor], theirs, rtol=1e-5, atol=1e-6), (path, tensor)
        moved += not torch.equal(ours["weight"], before["weight"])
    assert moved


def test_adapters_side_by_side_merge_at_once(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    deltas = [trained(name, BERT, base, seed)[2] for name, seed in (("lora", 3), ("rslora", 4))]
    merge(base, deltas, tmp_path / "out")
    folded, (live, inputs) = loaded(BERT, tmp_path / "out"), BERT.load(base)
    for delta in deltas:
        apply(live, delta)
    assert torch.allclose(outputs(folded, inputs), outputs(live, inputs), rtol=1e-4, atol=1e-5)


def test_a_head_and_its_configuration_go_into_the_merged_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    _, inputs, delta = trained("lora", BERT, base)
    head = {
        "classifier.weight": torch.ones(3, 16).numpy(),
        "classifier.bias": torch.zeros(3).numpy(),
    }
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    merge(base, replace(delta, extras=head, config=labels), tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == labels["id2label"]
    )
    folded = loaded(BERT, tmp_path / "out")
    assert outputs(folded, inputs).shape == (2, 3)
    assert torch.equal(folded.classifier.weight, torch.ones(3, 16))
