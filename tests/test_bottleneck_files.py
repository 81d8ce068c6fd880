"""Bottleneck adapters in files: back into models, and into models without deltakit."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from attach_lab import delta_of
from bottleneck_lab import FAMILIES, IDS, SIZES, Family, outputs

import deltakit as dk
from deltakit.adapters.attach import attach, reattach
from deltakit.conversion import convert
from deltakit.delta import SparseDelta
from deltakit.errors import BaseMismatchError, CoordinateError
from deltakit.formats.checkpoint import Checkpoint

PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
RECIPE = PAGE.partition("```python\n")[2].partition("\n```")[0]
KINDS = ["houlsby", "pfeiffer", "parallel"]
by_name = {family.name: family for family in FAMILIES}
CASES = [(name, "parallel") for name in by_name] + [("bert", "houlsby"), ("vit", "pfeiffer")]
every_kind = pytest.mark.parametrize("kind", KINDS)


def trained(
    model: Any, kind: str, folder: Path, **options: Any
) -> tuple[SparseDelta, torch.Tensor]:
    """A delta of an adapter of which some entries moved, and what the model gives with it."""
    checkpoint = Checkpoint(folder)
    options = {"bottleneck": 3, "initial": 0.3, **options}
    attached = attach(model, kind, options, seed=5, base=checkpoint)
    state = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attached.parameters.values():
            some = torch.rand(parameter.shape, generator=state) < 0.4
            parameter += some * torch.randn(parameter.shape, generator=state)
    delta, given = delta_of(attached, checkpoint), outputs(model)
    attached.detach()
    return delta, given


@pytest.mark.parametrize("name, kind", CASES)
def test_a_file_gives_the_trained_bits_back(name: str, kind: str, tmp_path: Path) -> None:
    """By the checkpoint's names of modules, which are not the model's in a ViT."""
    model = by_name[name].load(tmp_path / "base")
    delta, given = trained(model, kind, tmp_path / "base")
    plain = outputs(model)
    dk.save(delta, tmp_path / "a.sdelta")
    read = dk.load(tmp_path / "a.sdelta")
    stored = {tensor.partition(".adapter.")[0] for tensor in read.tensors}
    assert all(f"{module}.weight" in Checkpoint(tmp_path / "base").tensors for module in stored)
    again = by_name[name].load(tmp_path / "base")
    reattach(again, read, base=Checkpoint(tmp_path / "base"))
    assert torch.equal(outputs(again), given) and not torch.equal(given, plain)


def test_a_wrong_seed_or_model_is_refused(tmp_path: Path) -> None:
    model = by_name["bert"].load(tmp_path)
    delta, _ = trained(model, "pfeiffer", tmp_path)
    assert delta.adapter is not None
    for wrong in ({"seed": 6}, {"config": {**delta.adapter.config, "activation": "tanh"}}):
        other = replace(delta, adapter=replace(delta.adapter, **wrong))
        with pytest.raises(BaseMismatchError, match="check value"):
            reattach(model, other)
    with pytest.raises(CoordinateError):
        reattach(by_name["gpt2"].model(), delta)
    assert not any(module._forward_hooks for module in model.modules())


def _loaded(model: Any, folder: Path) -> Any:
    """A model with the adapters of a folder, put there by the page's Python alone."""
    assert not re.search(r"import deltakit|from deltakit", RECIPE)
    (folder / "recipe.py").write_text(RECIPE)
    runpy.run_path(str(folder / "recipe.py"))["load_bottlenecks"](model, folder)
    return model


@pytest.mark.parametrize("name, kind", [case for case in CASES if case[0] != "vit"])
def test_the_page_s_python_computes_the_same_bits(name: str, kind: str, tmp_path: Path) -> None:
    family = by_name[name]
    model = family.load(tmp_path / "base")
    activation = "gelu_tanh" if kind == "houlsby" else "swish"
    delta, given = trained(model, kind, tmp_path / "base", activation=activation, scaling=0.5)
    dk.save(delta, tmp_path / "a.sdelta")
    convert(tmp_path / "a.sdelta", tmp_path / "modules", to_format="adapter-modules")
    assert json.loads((tmp_path / "modules" / "adapter.json").read_text())["kind"] == kind
    plain = family.load(tmp_path / "base").requires_grad_(requires_grad=False)
    assert torch.equal(outputs(_loaded(plain, tmp_path / "modules")), given)


def test_the_page_s_python_finds_a_base_model_in_one_with_a_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = tf.BertForSequenceClassification(tf.BertConfig(**SIZES)).eval()
    whole.bert.save_pretrained(tmp_path / "base")
    inner = tf.BertModel.from_pretrained(tmp_path / "base").eval()
    delta, _ = trained(inner, "parallel", tmp_path / "base")
    dk.save(delta, tmp_path / "a.sdelta")
    convert(tmp_path / "a.sdelta", tmp_path / "modules", to_format="adapter-modules")
    reattach(inner, delta, base=Checkpoint(tmp_path / "base"))
    whole.requires_grad_(requires_grad=False)
    _loaded(whole, tmp_path / "modules")
    given, expected = (each(input_ids=IDS)[0] for each in (whole.bert, inner))
    assert torch.equal(given, expected)


def _albert() -> Any:
    return tf.AlbertModel(tf.AlbertConfig(**SIZES, embedding_size=4))


def _bart() -> Any:
    sizes = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("ffn_dim", 12), ("attention_heads", 2))
    }
    return tf.BartModel(
        tf.BartConfig(vocab_size=30, d_model=8, max_position_embeddings=16, **sizes)
    )


def _roberta() -> Any:
    return tf.RobertaModel(tf.RobertaConfig(**SIZES))


@pytest.mark.parametrize("make", [_albert, _bart, _roberta])
@every_kind
def test_the_like_of_known_models_take_adapters(make: Any, kind: str, tmp_path: Path) -> None:
    family = Family("other", make, {}, {})
    model = family.load(tmp_path).requires_grad_(requires_grad=False)
    plain = outputs(model)
    delta, given = trained(model, kind, tmp_path)
    assert delta.nnz and not torch.equal(given, plain)
    assert torch.equal(outputs(model), plain)
