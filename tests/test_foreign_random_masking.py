"""Random Masking's checkpoints: models equal to the peer's base plus its sparse weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import Attack, Entries, dense, random_entries, random_masking_state
from safetensors.torch import load_file, save_file
from tiny_models import write_llama
from transformers import LlamaForCausalLM

import deltakit as dk
from deltakit.conversion import convert
from deltakit.errors import BaseMismatchError, DeltakitError
from deltakit.formats.bridges import recognise

Q, V = (f"model.layers.1.self_attn.{part}_proj" for part in "qv")
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder in float16, the precision of the paper's runs."""
    folder = write_llama(tmp_path_factory.mktemp("model") / "base")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float16)
    model.save_pretrained(folder)
    return folder


def masked(state: Mapping[str, torch.Tensor], count: int = 9) -> dict[str, Entries]:
    shapes = {module: state[f"{module}.weight"].shape for module in (Q, V)}
    halves = torch.float16
    return {m: random_entries(s, count, n, halves) for n, (m, s) in enumerate(shapes.items())}


def write(folder: Path, state: Mapping[str, torch.Tensor], pickled: bool = False) -> Path:
    folder.mkdir()
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(dict(state), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("given", [False, True], ids=["alone", "with the base"])
def test_a_model_is_equal_before_and_after(
    tmp_path: Path, base: Path, pickled: bool, given: bool
) -> None:
    """The peer: dense += sparse, both float16. From the folder, and from the file in it."""
    state = load_file(base / "model.safetensors")
    entries = masked(state)
    source = write(tmp_path / "run", random_masking_state(state, entries), pickled)
    for module, found in entries.items():
        state[f"{module}.weight"] += dense(state[f"{module}.weight"].shape, found)
    for where in (source, next(source.iterdir())):
        assert recognise(where)[0] == "random-masking"
        report = convert(where, tmp_path / "out.sdelta", base=base if given else None, force=True)
        assert (report.entries, report.extra_weights) == (18, 0)
        assert any("is taken to be as in the base" in note for note in report.notes) != given
        dk.merge(base, dk.load(tmp_path / "out.sdelta"), tmp_path / "merged", force=True)
        merged = load_file(tmp_path / "merged" / "model.safetensors")
        for name, tensor in state.items():
            assert torch.equal(merged[name].view(torch.int16), tensor.view(torch.int16)), name


def test_the_runs_precision_is_recorded(tmp_path: Path) -> None:
    """A float32 file run in float16: its masked weights are known again by their casts."""
    folder = write_llama(tmp_path / "base")
    state = load_file(folder / "model.safetensors")
    halves = {name: tensor.half() for name, tensor in state.items()}
    source = write(tmp_path / "run", random_masking_state(halves, masked(halves)))
    report = convert(source, tmp_path / "out.sdelta", base=folder)
    delta = dk.load(tmp_path / "out.sdelta")
    assert {t.dtype for t in delta.tensors.values()} == {"float32"}
    assert {t.trained_dtype for t in delta.tensors.values()} == {"float16"}
    assert report.extra_weights == 0
    for module, found in masked(halves).items():
        halves[f"{module}.weight"] += dense(halves[f"{module}.weight"].shape, found)
    dk.merge(folder, delta, tmp_path / "merged", dtype="trained")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for module in (Q, V):
        assert torch.equal(merged[f"{module}.weight"], halves[f"{module}.weight"])


def test_other_changes_are_kept_whole_and_told(tmp_path: Path, base: Path) -> None:
    state = load_file(base / "model.safetensors")
    run = random_masking_state(state, masked(state))
    norm = "model.norm.weight"
    run[norm] = run[norm] + 1
    run["score.weight"] = torch.randn(3, 16, dtype=torch.float16)
    run["copy.weight"] = run["lm_head.weight"].clone()
    report = convert(write(tmp_path / "run", run), tmp_path / "out.sdelta", base=base)
    extras = dk.load(tmp_path / "out.sdelta").extras
    assert list(extras) == [norm, "score.weight"]
    assert extras[norm].tobytes() == run[norm].numpy().tobytes()
    assert f"tensor {norm!r} differs from the base and is kept whole" in report.notes
    assert any("'copy.weight' repeats another one" in note for note in report.notes)


def test_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    state = load_file(base / "model.safetensors")
    run = random_masking_state(state, masked(state))
    run[f"{Q}.base_Linear.weight"] = run[f"{Q}.base_Linear.weight"] + 1
    with pytest.raises(BaseMismatchError, match="give the base that the run started from"):
        convert(write(tmp_path / "run", run), tmp_path / "out.sdelta", base=base)


def faults(state: State) -> dict[str, tuple[dict[str, Any], str]]:
    good = random_masking_state(state, masked(state))
    offsets, columns = good[f"{Q}.row_offsets"], good[f"{Q}.col_indices"]
    nan = torch.full_like(good[f"{Q}.tunable_weights"], torch.nan)
    return {
        "falling": ({f"{Q}.row_offsets": offsets.flip(0)}, "must rise from 0 to the 9 columns"),
        "counts": ({f"{Q}.row_offsets": offsets * 2}, "found 0 to 18"),
        "columns": ({f"{Q}.col_indices": columns + 16}, "outside shape"),
        "short": ({f"{Q}.col_indices": columns[:-1]}, "must rise from 0 to the 8 columns"),
        "values": ({f"{Q}.tunable_weights": nan[:-1]}, r"\[9\] and float16 \[8\]"),
        "nan": ({f"{Q}.tunable_weights": nan}, "not finite"),
        "flat": ({f"{Q}.base_Linear.weight": nan}, "do not fit a matrix"),
    }


SQUARES = {f"{module}.weight": torch.zeros(16, 16, dtype=torch.float16) for module in (Q, V)}


@pytest.mark.parametrize("fault", faults(SQUARES))
def test_what_does_not_add_up_is_refused(tmp_path: Path, fault: str) -> None:
    change, message = faults(SQUARES)[fault]
    run = random_masking_state(SQUARES, masked(SQUARES)) | change
    with pytest.raises(DeltakitError, match=message) as caught:
        convert(write(tmp_path / "run", run), tmp_path / "out.sdelta")
    assert "\n" not in str(caught.value)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    run = random_masking_state(SQUARES, masked(SQUARES))
    del run[f"{V}.base_Linear.weight"]
    with pytest.raises(DeltakitError, match=r"v_proj\.base_Linear\.weight' is missing"):
        convert(write(tmp_path / "run", run), tmp_path / "out.sdelta")


def test_a_hostile_checkpoint_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    run: dict[str, Any] = {**random_masking_state(SQUARES, masked(SQUARES)), "w": Attack(trace)}
    with pytest.raises(DeltakitError, match=r"asks for .*system"):
        convert(write(tmp_path / "run", run, pickled=True), tmp_path / "out.sdelta")
    assert not trace.exists()
