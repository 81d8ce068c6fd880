"""Adapters that deltakit made, written for PEFT and as plain modules, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_deltas import adapter_delta
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import deltakit as dk
from deltakit.adapters.initial import STORED, check_value, trained_values
from deltakit.cli.main import main
from deltakit.errors import (
    BaseMismatchError,
    ConfigError,
    CoordinateError,
    DeltakitError,
    FormatError,
)
from deltakit.formats.bridges import recognise
from deltakit.formats.checkpoint import Checkpoint

pytest.importorskip("peft")
import torch
from adapters import quietly
from attach_lab import BERT, GPT2, LLAMA, OPT, T5, Family, outputs, train
from peft import PeftModel

from deltakit.adapters.attach import attach

WEIGHTS = "adapter_model.safetensors"


def trained(family: Family, folder: Path, kind: str, **options: Any) -> dk.SparseDelta:
    """A delta of an adapter with random initial values, a third of its elements moved."""
    model, _ = family.load(folder)
    checkpoint = Checkpoint(folder)
    attached = attach(model, kind, options, seed=3, base=checkpoint)
    delta = train(attached, checkpoint)
    heads = [n for n, _ in model.named_parameters() if n.startswith("classifier")]
    extras = {n: model.get_parameter(n).detach().numpy().copy() + 1 for n in heads}
    config = {"architectures": [type(model).__name__]} if heads else {}
    return replace(delta, extras={**delta.extras, **extras}, config=config)


SEEDED = [
    (BERT, "lora"),
    (BERT, "ia3"),
    (GPT2, "lora"),
    (LLAMA, "dora"),
    (LLAMA, "adalora"),
    (T5, "lora"),
    (OPT, "loha"),
    (LLAMA, "hra"),
    (LLAMA, "delora"),
]


@pytest.mark.parametrize(("family", "kind"), SEEDED, ids=lambda part: getattr(part, "name", part))
def test_peft_computes_what_the_delta_does(family: Family, kind: str, tmp_path: Path) -> None:
    """By the names of the model's own class, and back to the compact delta of the same seed."""
    base = tmp_path / "base"
    delta = trained(family, base, kind, **({} if kind == "ia3" else {"rank": 4}))
    dk.save(delta, tmp_path / "d.sdelta")
    dk.convert(tmp_path / "d.sdelta", tmp_path / "peft", to_format="peft-adapter", base=base)
    model, inputs = family.load(base)
    with dk.applied(model, delta):
        expected = outputs(model, inputs)
    assert not torch.allclose(outputs(model, inputs), expected)
    with quietly():
        theirs = PeftModel.from_pretrained(family.load(base)[0], tmp_path / "peft")
    assert torch.equal(outputs(theirs.eval(), inputs), expected)

    dk.convert(tmp_path / "peft", tmp_path / "e.sdelta", base=base)
    again = dk.load(tmp_path / "e.sdelta")
    assert again.adapter is not None and delta.adapter is not None
    if any("constant" not in rule for rule in delta.adapter.initial.values()):
        assert again.adapter == delta.adapter  # else no seed is needed, and none recorded
    assert again.adapter.check == delta.adapter.check and dict(again.config) == dict(delta.config)
    assert [t.nnz for t in again.tensors.values()] == [t.nnz for t in delta.tensors.values()]
    one, other = (trained_everything(d, base) for d in (delta, again))
    assert one == other
    dk.convert(tmp_path / "e.sdelta", tmp_path / "again", to_format="peft-adapter", base=base)
    for name in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


def trained_everything(delta: dk.SparseDelta, base: Path) -> dict[str, bytes]:
    from deltakit.adapters.fold_delta import computed_from

    values = trained_values(delta, computed_from(delta, Checkpoint(base)))
    return {n: a.tobytes() for n, a in {**values, **delta.extras}.items()}


@pytest.mark.parametrize(
    ("family", "kind"),
    [(BERT, "pfeiffer"), (BERT, "houlsby"), (T5, "parallel"), (LLAMA, "vera"), (BERT, "lora")],
    ids=lambda part: getattr(part, "name", part),
)
def test_plain_modules_go_there_and_back(family: Family, kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    delta = trained(family, base, kind)
    dk.save(delta, tmp_path / "d.sdelta")
    to = {"to_format": "adapter-modules", "base": base}
    dk.convert(tmp_path / "d.sdelta", tmp_path / "m", **to)
    arrays = load_file(tmp_path / "m" / "adapter.safetensors")
    assert {n: a.tobytes() for n, a in arrays.items()} == trained_everything(delta, base)
    assert recognise(tmp_path / "m") == ("adapter-modules", f"modules of adapter {kind!r}")
    dk.convert(tmp_path / "m", tmp_path / "e.sdelta", base=base)
    again = dk.load(tmp_path / "e.sdelta")
    assert again.adapter == delta.adapter and dict(again.config) == dict(delta.config)
    assert trained_everything(again, base) == trained_everything(delta, base)
    dk.convert(tmp_path / "e.sdelta", tmp_path / "again", **to)
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == (
        tmp_path / "m" / "adapter.safetensors"
    ).read_bytes()
    model, inputs = family.load(base)
    with dk.applied(model, delta):
        expected = outputs(model, inputs)
    with dk.applied(model, again):
        assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize(("kind", "why"), [("pfeiffer", "none of PEFT's"), ("vera", "drawn from")])
def test_what_peft_cannot_build_is_not_written(kind: str, why: str, tmp_path: Path) -> None:
    family = BERT if kind == "pfeiffer" else LLAMA
    dk.save(trained(family, tmp_path / "base", kind), tmp_path / "d.sdelta")
    with pytest.raises(ConfigError, match=rf"{why}.*--to adapter-modules"):
        dk.convert(
            tmp_path / "d.sdelta", tmp_path / "o", to_format="peft-adapter", base=tmp_path / "base"
        )
    assert not (tmp_path / "o").exists()


# From here on without models: the adapter of tests/adapter_deltas.py at one layer of 5 by 6.


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The checkpoint with that layer."""
    random = np.random.default_rng(0)
    save_file(
        {"layer.weight": random.standard_normal((5, 6), np.float32)}, tmp_path / "b.safetensors"
    )
    return tmp_path / "b.safetensors"


CONFIG = {
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "r": 4,
    "rank_pattern": {},
    "use_rslora": False,
}


def configured(delta: dk.SparseDelta, initial: Mapping[str, Any], **config: Any) -> dk.SparseDelta:
    """The delta with the whole configuration of a LoRA and the check value of that."""
    assert delta.adapter is not None
    given = {**CONFIG, **config}
    check = check_value("lora", given, initial)
    adapter = replace(delta.adapter, config=given, check=check)
    return replace(delta, adapter=adapter)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """That delta in a file."""
    delta = adapter_delta()
    empty = {
        n: replace(t, indices=t.indices[:0], values=t.values[:0]) for n, t in delta.tensors.items()
    }
    initial = trained_values(replace(delta, tensors=empty))
    dk.save(configured(delta, initial), tmp_path / "d.sdelta")
    return tmp_path / "d.sdelta"


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_a_start_taken_off_the_base_becomes_twice_the_rank(
    rank_stabilised: bool, base: Path, tmp_path: Path
) -> None:
    """As PEFT writes PiSSA: the change of the base itself is factors now minus factors before."""
    delta, random = adapter_delta(), np.random.default_rng(1)
    initial = {n: random.standard_normal(t.shape, np.float32) for n, t in delta.tensors.items()}
    assert delta.adapter is not None
    stored: dict[str, Any] = {p: {"stored": True} for p in delta.adapter.initial}
    extras = {STORED + name: array for name, array in initial.items()}
    delta = replace(delta, adapter=replace(delta.adapter, initial=stored), extras=extras)
    delta = configured(delta, initial, use_rslora=rank_stabilised, alpha_pattern={"layer": 6})
    dk.save(delta, tmp_path / "d.sdelta")
    to = {"to_format": "peft-adapter", "base": base}
    report = dk.convert(tmp_path / "d.sdelta", tmp_path / "peft", **to)
    assert any("with twice the rank" in note for note in report.notes)
    arrays = load_file(tmp_path / "peft" / WEIGHTS)
    assert {k.removeprefix("base_model.model."): a.shape for k, a in arrays.items()} == {
        "layer.lora_A.weight": (8, 6),
        "layer.lora_B.weight": (5, 8),
    }
    dk.convert(tmp_path / "peft", tmp_path / "e.sdelta", base=base)
    for name in ("d", "e"):
        dk.merge(base, [tmp_path / f"{name}.sdelta"], tmp_path / f"{name}.safetensors")
    one, other = (load_file(tmp_path / f"{n}.safetensors")["layer.weight"] for n in ("d", "e"))
    assert np.allclose(one, other, rtol=0, atol=1e-5)
    assert not np.allclose(one, load_file(base)["layer.weight"], rtol=0, atol=1e-2)


def test_half_precision_keeps_its_bits(file: Path, base: Path, tmp_path: Path) -> None:
    dk.convert(file, tmp_path / "peft", to_format="peft-adapter", base=base)
    arrays = {k: a.astype(np.float16) for k, a in load_file(tmp_path / "peft" / WEIGHTS).items()}
    save_file(arrays, tmp_path / "peft" / WEIGHTS, {"format": "pt"})
    before = (tmp_path / "peft" / WEIGHTS).read_bytes()
    dk.convert(tmp_path / "peft", tmp_path / "e.sdelta", base=base)
    assert {t.dtype for t in dk.load(tmp_path / "e.sdelta").tensors.values()} == {"float16"}
    dk.convert(tmp_path / "e.sdelta", tmp_path / "again", to_format="peft-adapter", base=base)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == before


def test_pickled_adapters_are_read_too(file: Path, base: Path, tmp_path: Path) -> None:
    """As PEFT saved them before 0.7."""
    dk.convert(file, tmp_path / "peft", to_format="peft-adapter", base=base)
    dk.convert(tmp_path / "peft", tmp_path / "a.sdelta", base=base)
    arrays = load_file(tmp_path / "peft" / WEIGHTS)
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    torch.save(tensors, tmp_path / "peft" / "adapter_model.bin")
    (tmp_path / "peft" / WEIGHTS).unlink()
    dk.convert(tmp_path / "peft", tmp_path / "b.sdelta", base=base)
    one, other = (dk.load(tmp_path / f"{n}.sdelta") for n in "ab")
    assert {n: a.tobytes() for n, a in trained_values(one).items()} == {
        n: a.tobytes() for n, a in trained_values(other).items()
    }


def test_a_seed_that_does_not_rebuild_is_not_believed(
    file: Path, base: Path, tmp_path: Path
) -> None:
    """Changed metadata cost the compact form, never a value."""
    dk.convert(file, tmp_path / "peft", to_format="peft-adapter", base=base)
    arrays = load_file(tmp_path / "peft" / WEIGHTS)
    told = {"seed": 8, "check": "0" * 16, "initial": {"lora_A.weight": {"uniform": 1}}}
    for text in (json.dumps(told), "[]", "{", json.dumps({"seed": "x"}), '"\\ud800"'):
        save_file(arrays, tmp_path / "peft" / WEIGHTS, {"deltakit.adapter": text})
        dk.convert(tmp_path / "peft", tmp_path / "e.sdelta", base=base, force=True)
        delta = dk.load(tmp_path / "e.sdelta")
        assert delta.adapter is not None
        assert delta.adapter.initial["lora_A.weight"] == {"constant": 0.0}
        for name, array in trained_values(delta).items():
            assert array.tobytes() == arrays[f"base_model.model.{name}"].tobytes()


def test_a_damaged_delta_is_not_written(file: Path, base: Path, tmp_path: Path) -> None:
    delta = dk.load(file)
    assert delta.adapter is not None
    dk.save(replace(delta, adapter=replace(delta.adapter, seed=8)), file)
    for name in ("peft-adapter", "adapter-modules"):
        with pytest.raises(BaseMismatchError, match="check value"):
            dk.convert(file, tmp_path / "o", to_format=name, base=base)
    assert not (tmp_path / "o").exists()


def test_names_of_the_model_are_said_or_told(file: Path, base: Path, tmp_path: Path) -> None:
    """Nothing tells the model of this delta, and `--prefix` says what it has before the names."""
    report = dk.convert(file, tmp_path / "o", to_format="peft-adapter", base=base)
    assert any("--prefix says" in note for note in report.notes)
    said = dk.convert(file, tmp_path / "p", to_format="peft-adapter", base=base, prefix="bert.")
    assert said.notes == ()
    assert set(load_file(tmp_path / "p" / WEIGHTS)) == {
        f"base_model.model.bert.layer.lora_{x}.weight" for x in "AB"
    }
    again = dk.convert(tmp_path / "p", tmp_path / "e.sdelta", base=base)
    assert again.notes == ()
    dk.convert(tmp_path / "e.sdelta", tmp_path / "q", to_format="peft-adapter", base=base)
    assert (tmp_path / "q" / WEIGHTS).read_bytes() == (tmp_path / "p" / WEIGHTS).read_bytes()


def test_extras_that_peft_has_no_place_for(file: Path, base: Path, tmp_path: Path) -> None:
    delta = dk.load(file)
    for name in ("scale", "layer.weight[5:]"):
        extras = {name: np.ones((1, 6), np.float32)}
        dk.save(replace(delta, extras=extras), file)
        with pytest.raises(ConfigError, match="which PEFT cannot save"):
            dk.convert(file, tmp_path / "o", to_format="peft-adapter")
    dk.save(replace(delta, extras={"head.weight": np.ones(2, np.float32)}), file)
    with pytest.raises(ConfigError, match=r"may be a new head.*--base"):
        dk.convert(file, tmp_path / "o", to_format="peft-adapter", prefix="m.")


Arrays = dict[str, np.ndarray]
A, B = (f"base_model.model.layer.lora_{x}.weight" for x in "AB")


def changed(key: str, change: Callable[[np.ndarray], Any]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {**arrays, key: np.ascontiguousarray(change(arrays[key]))}


FILES: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "rank": (changed(A, lambda a: a[:-1]), "do not fit"),
    "width": (changed(A, lambda a: a[:, :-1]), "is this the base"),
    "a vector": (changed(B, lambda a: a[0]), "do not fit"),
    "not finite": (changed(A, lambda a: a * np.nan), "not finite"),
    "integers": (changed(A, lambda a: a.astype(np.int32)), "is int32, expected floats"),
    "one factor": (lambda a: {A: a[A]}, "expected a pair of factors"),
    "none": (lambda a: {"base_model.model.layer.other": a[A]}, "holds no tensors of its type"),
    "magnitudes": (
        lambda a: {**a, "base_model.model.layer.lora_magnitude_vector": np.ones(5, np.float32)},
        "expected a pair of factors",
    ),
    "twice": (lambda a: {**a, "layer.lora_A.weight": a[A]}, "with and without 'base_model.model.'"),
    "shared": (lambda a: {**a, "base_model.vera_A": a[A]}, "of no module of the base's"),
    "another module": (
        lambda a: {k.replace("layer", "../../layers"): v for k, v in a.items()},
        "has no tensor '../../layers.weight'",
    ),
}


@pytest.mark.parametrize("name", list(FILES))
def test_hostile_files_are_refused(name: str, file: Path, base: Path, tmp_path: Path) -> None:
    change, message = FILES[name]
    dk.convert(file, tmp_path / "peft", to_format="peft-adapter", base=base)
    save_file(change(load_file(tmp_path / "peft" / WEIGHTS)), tmp_path / "peft" / WEIGHTS)
    with pytest.raises((FormatError, CoordinateError), match=message):
        dk.convert(tmp_path / "peft", tmp_path / "e.sdelta", from_format="peft-lora", base=base)
    assert not (tmp_path / "e.sdelta").exists()


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 5}, "have rank 4, the adapter's configuration says 5"),
    "rank by pattern": ({"rank_pattern": {"layer": 3}}, "configuration says 3"),
    "alpha": ({"lora_alpha": "8"}, "lora_alpha cannot be '8'"),
    "pattern": ({"alpha_pattern": {"(": 1}}, "alpha_pattern: .* in a pattern"),
    "pattern of text": ({"alpha_pattern": {"layer": "x"}}, "expected numbers"),
    "no patterns": ({"alpha_pattern": [1]}, r"alpha_pattern cannot be \[1\]"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "'pissa' changes the base before training"),
    "QA-LoRA": ({"use_qalora": True}, "use_qalora True is nothing that deltakit's adapter 'lora'"),
    "layers": ({"layer_replication": [[0, 1]]}, "layer_replication .* cannot be converted"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "DoRA": ({"use_dora": True}, "expected factors and magnitudes"),
    "prompts": ({"peft_type": "PROMPT_TUNING"}, "'PROMPT_TUNING' is none that .*virtual tokens"),
    "VeRA": ({"peft_type": "VERA"}, "random values that PEFT draws"),
    "unknown": ({"peft_type": "LORA2"}, "'LORA2' is none that deltakit attaches; it knows LORA,"),
    "MiSS": ({"peft_type": "MISS", "init_weights": "bat"}, "is a variant of MiSS"),
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_hostile_settings_are_refused(name: str, file: Path, base: Path, tmp_path: Path) -> None:
    changes, message = SETTINGS[name]
    dk.convert(file, tmp_path / "peft", to_format="peft-adapter", base=base)
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(FormatError, match=message) as error:
        dk.convert(tmp_path / "peft", tmp_path / "e.sdelta", base=base)
    assert "\n" not in str(error.value)


DESCRIPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 2}, "version 2, which this reader does not know"),
    "member": ({"more": 1}, "member 'more'"),
    "kind": ({"kind": "pickle"}, "adapter 'pickle' is none of lora"),
    "kind of another type": ({"kind": ["lora"]}, "is none of"),
    "parameters": ({"parameters": "lora_A"}, "no list of names"),
    "other parameters": ({"parameters": ["x"]}, "holds no x"),
    "config": ({"config": []}, "where an object is expected"),
    "format": ({"format": "zip"}, "is of no known format"),
}


@pytest.mark.parametrize("name", list(DESCRIPTIONS))
def test_hostile_descriptions_are_refused(name: str, file: Path, tmp_path: Path) -> None:
    changes, message = DESCRIPTIONS[name]
    dk.convert(file, tmp_path / "m", to_format="adapter-modules")
    told = tmp_path / "m" / "adapter.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), **changes}))
    with pytest.raises(DeltakitError, match=message):
        dk.convert(tmp_path / "m", tmp_path / "e.sdelta")
    assert not (tmp_path / "e.sdelta").exists()


def test_the_command_line(file: Path, base: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["convert", *(str(a) for a in arguments)])
        return done.exit_code, done.stdout

    peft = tmp_path / "peft"
    assert run(file, peft, "--to", "peft-adapter", "--base", base)[0] == 0
    code, told = run(peft, tmp_path / "a.sdelta", "--base", base, "--as", "adapter")
    assert (code, told) == (0, f"{tmp_path / 'a.sdelta'}: sdelta of 3 entries\n")
    code, told = run(peft, tmp_path / "w.sdelta", "--base", base, "--as", "weights", "-b", 7)
    assert code == 0 and "sdelta of 7 entries" not in told  # B is zero: nothing changes
    assert "sdelta of 0 entries" in told
