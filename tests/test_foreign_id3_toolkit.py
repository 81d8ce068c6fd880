"""Summaries of the selective PEFT toolkit, written by the toolkit itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import Attack, save_as
from safetensors.torch import save_file
from selective_optimizers.load_store import (
    SelectivePeftSummary,
    load_weights_from_summary,
    write_summary_to_disk,
)
from selective_optimizers.wrap import get_selective_optimizer
from tiny_models import write_bert, write_gpt2, write_llama, write_resnet, write_t5, write_vit
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    ResNetForImageClassification,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

import deltakit as dk
from deltakit.conversion import convert
from deltakit.errors import ConfigError, CoordinateError, DeltakitError, FormatError
from deltakit.formats.bridges import recognise
from deltakit.formats.checkpoint import Checkpoint

BUDGET, STEPS = 120, 3


def text(labels: int | None = None) -> dict[str, torch.Tensor]:
    """A batch of token ids, with what to predict."""
    ids = torch.randint(6, 24, (4, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids if labels is None else ids[:, 0] % labels}


def images(labels: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(4, 3, 8, 8, generator=generator),
        "labels": torch.arange(4) % labels,
    }


def trained(model: Any, batch: dict[str, torch.Tensor], lr: float = 1e-2) -> SelectivePeftSummary:
    """A few steps of the toolkit's ID3, the head trained densely, as its examples do."""
    torch.manual_seed(0)
    model.train()
    named = dict(model.named_parameters())
    head = [p for name, p in named.items() if name.startswith(("classifier", "score"))]
    body = [p for p in named.values() if not any(p is h for h in head)]
    groups: list[dict[str, Any]] = [{"params": body}]
    if head:
        groups.append({"params": head, "choose_all": True})
    chosen = BUDGET + sum(p.numel() for p in head)
    optimizer = get_selective_optimizer(torch.optim.AdamW, "id3")(
        params=groups, lr=lr, budget=chosen, max_steps=STEPS, exp=0.0, verify=False
    )
    for _ in range(STEPS):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return optimizer.get_summary(model)


def write(path: Path, summary: SelectivePeftSummary, version: str) -> Path:
    """The summary as version 0.4 saves it, and as 0.2 did: a tuple, the budget a 0-d tensor."""
    if version == "0.4":
        assert write_summary_to_disk(str(path), summary)
        return path
    parts = (summary.values, summary.pointers, summary.shapes, summary.bn_metadata)
    return save_as(path, (*parts, torch.tensor(summary.budget_used)))


MODELS: dict[str, tuple[Callable[[Path], Path], Any, dict[str, torch.Tensor]]] = {
    "bert, a new head": (write_bert, BertForSequenceClassification, text(3)),
    "llama": (write_llama, LlamaForCausalLM, text()),
    "gpt2, tied": (write_gpt2, GPT2LMHeadModel, text()),
    "t5, shared": (write_t5, T5ForConditionalGeneration, text()),
    "vit, renamed, a new head": (
        lambda folder: write_vit(folder, channels=3),
        ViTForImageClassification,
        images(3),
    ),
    "resnet, batch norms": (write_resnet, ResNetForImageClassification, images(3)),
}


@pytest.mark.parametrize("version", ["0.4", "0.2"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_equal_before_and_after(tmp_path: Path, kind: str, version: str) -> None:
    """The trained model, and the base merged with the converted summary and loaded again: equal
    in every bit, batch statistics included."""
    make, cls, batch = MODELS[kind]
    base = make(tmp_path / "base")
    labels = {"num_labels": 3} if "head" in kind or "resnet" in kind else {}
    torch.manual_seed(0)
    model = cls.from_pretrained(base, **labels)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    summary = trained(model, batch)
    moved = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    assert len(moved) > 2
    path = write(tmp_path / "summary.pt", summary, version)

    assert recognise(path) == (
        "id3-toolkit",
        f"summary of the selective PEFT toolkit, version {version}",
    )
    report = convert(path, tmp_path / "out.sdelta", base=base)
    delta = dk.load(tmp_path / "out.sdelta")
    assert f"parameters are named in the order of {cls.__name__}" in report.notes
    assert {t.mode for t in delta.tensors.values()} == {"set"}
    assert delta.nnz == BUDGET
    dk.merge(base, delta, tmp_path / "merged")
    again = cls.from_pretrained(tmp_path / "merged")
    found = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_the_toolkits_own_loader_agrees(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(base)
    path = write(tmp_path / "summary.pt", summary := trained(model, text()), "0.4")
    theirs = LlamaForCausalLM.from_pretrained(base)
    load_weights_from_summary(theirs, summary)
    convert(path, tmp_path / "out.sdelta", base=base)
    ours = LlamaForCausalLM.from_pretrained(base)
    dk.apply(ours, dk.load(tmp_path / "out.sdelta"))
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("stored", "run", "mode"),
    [(torch.float32, torch.bfloat16, "set"), (torch.bfloat16, torch.float32, "add")],
)
def test_a_run_in_another_precision(
    tmp_path: Path, stored: torch.dtype, run: torch.dtype, mode: str
) -> None:
    """Merging in the trained dtype gives the trained bits."""
    base = write_llama(tmp_path / "base")
    LlamaForCausalLM.from_pretrained(base, dtype=stored).save_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype=run)
    path = write(tmp_path / "summary.pt", trained(model, text(), lr=1e-4), "0.4")
    convert(path, tmp_path / "out.sdelta", base=base)
    delta = dk.load(tmp_path / "out.sdelta")
    assert {t.mode for t in delta.tensors.values()} == {mode}
    dk.merge(base, delta, tmp_path / "merged", dtype="trained")
    merged = Checkpoint(tmp_path / "merged")
    for name, parameter in model.named_parameters():
        if name in delta.tensors:
            assert merged.read(name).tobytes() == raw(parameter), name


def test_weights_that_no_difference_gives_back_are_rounded(tmp_path: Path) -> None:
    """-w/3 of a bfloat16 w, in float32: the difference -4w/3 has too few bits for it."""
    base = write_llama(tmp_path / "base")
    LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    summary = summary_of(model)
    for parameter, values in zip(model.parameters(), summary.values, strict=True):
        values.copy_(parameter.data.view(-1)[:2] / -3)
    load_weights_from_summary(model, summary)
    path = write(tmp_path / "summary.pt", summary, "0.4")
    report = convert(path, tmp_path / "out.sdelta", base=base)
    assert any("were rounded to the base's dtype" in note for note in report.notes)
    dk.merge(base, dk.load(tmp_path / "out.sdelta"), tmp_path / "merged")
    merged = Checkpoint(tmp_path / "merged")
    for name, parameter in model.named_parameters():
        assert merged.read(name).tobytes() == raw(parameter.bfloat16()), name


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def summary_of(model: nn.Module, entries: int = 2) -> SelectivePeftSummary:
    """A summary of the first `entries` entries of each parameter, by the layout."""
    values, pointers, shapes = [], [], []
    for parameter in model.parameters():
        chosen = torch.zeros(parameter.shape, dtype=torch.bool)
        chosen.view(-1)[:entries] = True
        values.append(parameter.data[chosen] + 1)
        pointers.append(chosen.nonzero())
        shapes.append(parameter.shape)
    return SelectivePeftSummary(values, pointers, shapes, [], sum(len(v) for v in values))


def test_frozen_parameters_keep_their_places(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    summary = summary_of(LlamaForCausalLM.from_pretrained(base))
    for number in range(0, len(summary.values), 2):
        summary.values[number] = summary.pointers[number] = summary.shapes[number] = None
    names = [n for n, _ in LlamaForCausalLM.from_pretrained(base).named_parameters()]
    report = convert(write(tmp_path / "s.pt", summary, "0.4"), tmp_path / "out.sdelta", base=base)
    assert sorted(dk.load(tmp_path / "out.sdelta").tensors) == sorted(names[1::2])
    assert any("claims" in note and "holds" in note for note in report.notes)


def test_a_head_known_in_part_is_refused(tmp_path: Path) -> None:
    """Unless the base is the model as it began, head and all."""
    base = write_bert(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(base, num_labels=3)
    path = write(tmp_path / "s.pt", summary_of(model), "0.4")
    with pytest.raises(
        FormatError, match=r"the base lacks 'classifier\.weight'.*saved with its head"
    ):
        convert(path, tmp_path / "out.sdelta", base=base)
    model.save_pretrained(tmp_path / "whole")
    convert(path, tmp_path / "out.sdelta", base=tmp_path / "whole")
    assert "classifier.weight" in dk.load(tmp_path / "out.sdelta").tensors


def test_a_model_that_no_class_fits_is_refused(tmp_path: Path) -> None:
    base = write_bert(tmp_path / "base")
    path = write(tmp_path / "s.pt", summary_of(nn.Linear(3, 4)), "0.4")
    with pytest.raises(CoordinateError, match=r"no model class for .* has 2 parameters"):
        convert(path, tmp_path / "out.sdelta", base=base)


def test_a_model_that_several_classes_fit_is_refused(tmp_path: Path) -> None:
    """With two labels, tagging and answering differ in the head's name alone; a base saved as one
    of them decides."""
    base = write_bert(tmp_path / "base")
    model = BertForTokenClassification.from_pretrained(base, num_labels=2)
    path = write(tmp_path / "s.pt", summary_of(model, entries=10**6), "0.4")
    with pytest.raises(CoordinateError, match="both fit the shapes in the file"):
        convert(path, tmp_path / "out.sdelta", base=base)
    model.save_pretrained(tmp_path / "whole")
    report = convert(path, tmp_path / "out.sdelta", base=tmp_path / "whole")
    assert "parameters are named in the order of BertForTokenClassification" in report.notes


def test_a_base_is_needed_and_should_be_a_folder(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(base)
    path = write(tmp_path / "s.pt", summary_of(model), "0.4")
    with pytest.raises(ConfigError, match="hold no names; give the base"):
        convert(path, tmp_path / "out.sdelta")
    with pytest.raises(CoordinateError, match=r"has no config\.json to tell the model's order"):
        convert(path, tmp_path / "out.sdelta", base=base / "model.safetensors")


def test_shapes_that_occur_once_are_names_enough(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    path = write(tmp_path / "s.pt", summary_of(model), "0.4")
    convert(path, tmp_path / "out.sdelta", base=tmp_path / "base.safetensors")
    tensors = dk.load(tmp_path / "out.sdelta").tensors
    for name, parameter in model.named_parameters():
        assert tensors[name].indices.tolist() == [0, 1]
        expected = (parameter.data.view(-1)[:2] + 1).numpy()
        assert np.array_equal(tensors[name].values, expected.view(np.uint32))


Edit = Callable[[SelectivePeftSummary], object]
FAULTS: dict[str, tuple[Edit, str]] = {
    "twice": (lambda s: s.pointers[0].fill_(0), "index 0 stands twice"),
    "beyond": (lambda s: s.pointers[0].fill_(99), "coordinate 99 is out of range"),
    "negative": (lambda s: s.pointers[0].fill_(-1), "coordinate -1 is out of range"),
    "dimensions": (lambda s: put(s.pointers, s.pointers[0][:, :1]), "coordinates have shape"),
    "flat": (lambda s: put(s.pointers, s.pointers[0][0]), "pointers are int64"),
    "floats": (lambda s: put(s.pointers, s.pointers[0].float()), "pointers are float32"),
    "short": (lambda s: put(s.values, s.values[0][:1]), r"\[2\] and float32 \[1\]"),
    "no tensor": (lambda s: put(s.values, [1.0, 2.0]), "expected a tensor, found list"),
    "no shape": (lambda s: put(s.shapes, "3x4"), "is no shape"),
    "lengths": (lambda s: s.values.pop(), "lists of one length"),
    "no lists": (lambda s: setattr(s, "values", None), "lists of one length"),
    "no field": (lambda s: delattr(s, "pointers"), "lists of one length"),
    "norms": (lambda s: setattr(s, "bn_metadata", [3]), "list of statistics"),
    "budget": (lambda s: setattr(s, "budget_used", torch.ones(2)), "is no number"),
}


def put(items: list[Any], first: Any) -> None:
    items[0] = first


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_add_up_is_refused(tmp_path: Path, fault: str) -> None:
    edit, message = FAULTS[fault]
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    summary = summary_of(model)
    edit(summary)
    path = write(tmp_path / "s.pt", summary, "0.4")
    with pytest.raises(DeltakitError, match=message) as caught:
        convert(path, tmp_path / "out.sdelta", base=tmp_path / "base.safetensors")
    assert "\n" not in str(caught.value)


def test_a_hostile_summary_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    summary = summary_of(nn.Linear(3, 4))
    summary.values[0] = Attack(trace)
    path = write(tmp_path / "s.pt", summary, "0.4")
    base = tmp_path / "base.safetensors"
    save_file(nn.Linear(3, 4).state_dict(), base)
    with pytest.raises(DeltakitError, match=r"asks for .*system"):
        convert(path, tmp_path / "out.sdelta", base=base)
    assert not trace.exists()
