"""Laws of models that were merged into in place, for those who only read them: half a merge is never
read, and a whole one is named where it is in the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import random_array, write_safetensors, write_sharded
from click.testing import CliRunner
from merge_reference import adding, only
from safetensors.numpy import load_file
from tiny_models import colour_rows, write_jsonl, write_llama
from transformers import AutoModelForCausalLM

import deltakit as dk
from deltakit.cli.main import main
from deltakit.delta import SparseDelta
from deltakit.dtypes import Array
from deltakit.errors import BaseMismatchError, JournalError, OutputError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify
from deltakit.in_place.merge import merge_in_place
from deltakit.in_place.revert import revert
from deltakit.in_place.weights import OpenWeights
from deltakit.merging.merge import merge


def tear(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Stop a merge in place or a revert, and its rolling back, at the second tensor."""
    write, done = OpenWeights.write, 0

    def dying(self: OpenWeights, name: str, indices: Array, words: Array) -> None:
        nonlocal done
        done += 1
        if done > 1:
            raise OutputError("the disk is gone")
        write(self, name, indices, words)

    with monkeypatch.context() as patched:
        patched.setattr(OpenWeights, "write", dying)
        with pytest.raises(OutputError, match="the disk is gone"):
            action()


def torn(monkeypatch: pytest.MonkeyPatch, model: Path, delta: SparseDelta, what: str) -> str:
    """Leave half of a merge or of a revert in a model; what those who read it are told."""
    if what == "revert":
        merge_in_place(model, delta)
    tear(monkeypatch, lambda: revert(model) if what == "revert" else merge_in_place(model, delta))
    named = Checkpoint(model, unfinished=True).journal.with_suffix("")
    also = "deltakit merge --in-place rolls it back and begins again, " if what == "merge" else ""
    does = "takes back all that was merged" if also else "finishes it"
    kind = "merge in place" if also else "revert"
    return (
        f"{named} holds only a part of a {kind} that was interrupted or still runs (journal "
        f"{named}.undo); {also}deltakit revert {named} {does}"
    )


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def base() -> dict[str, Array]:
    rng = np.random.default_rng(90)
    return {name: random_array(rng, (40, 50), np.float32) for name in "vw"}


def delta_on(base: dict[str, Array], seed: int, model: Path | None = None) -> SparseDelta:
    """20 entries in each tensor; with the identity of `model`."""
    rng = np.random.default_rng(seed)
    found = only(*(adding(name, array, rng, 20) for name, array in base.items()))
    if model is None:
        return found
    indices = {name: tensor.indices for name, tensor in found.tensors.items()}
    return only(*found.tensors.values(), base=identify(Checkpoint(model), indices))


READERS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "diff, as base": lambda model, other, delta: dk.diff(model, other),
    "diff, as tuned": lambda model, other, delta: dk.diff(other, model),
    "verify": lambda model, other, delta: dk.verify(delta, model),
    "merge --dry-run": lambda model, other, delta: merge(model, delta, dry_run=True),
    "merge --in-place --dry-run": lambda model, other, delta: merge_in_place(
        model, delta, dry_run=True
    ),
    "stack": lambda model, other, delta: dk.stack([delta, delta], method="ties", base=model),
    "truncate": lambda model, other, delta: dk.truncate(dk.load(delta), 3, base=model),
}


@pytest.mark.parametrize("what", ["merge", "revert"])
@pytest.mark.parametrize("sharded", [False, True])
def test_half_a_merge_is_never_read(
    tmp_path: Path,
    base: dict[str, Array],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    sharded: bool,
) -> None:
    """Nor half a revert; the refusal is one line, writes nothing, and tells what to do."""
    other = write_safetensors(tmp_path / "other.safetensors", base)
    model = write_safetensors(tmp_path / "model.safetensors", base)
    if sharded:
        model = write_sharded(tmp_path / "model", [{n: a} for n, a in base.items()])
    delta = tmp_path / "d.sdelta"
    dk.save(delta_on(base, 1, other), delta)
    told = torn(monkeypatch, model, delta_on(base, 2), what)
    before = contents(tmp_path)
    for name, read in READERS.items():
        with pytest.raises(JournalError) as error:
            read(model, other, delta)
        assert str(error.value) == told, name
    assert contents(tmp_path) == before
    revert(model)
    for read in READERS.values():
        read(model, other, delta)
    assert dk.diff(other, model).nnz == 0


def test_half_a_merge_through_an_index_is_seen_from_its_shards_and_back(
    tmp_path: Path, base: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files beside them that no unfinished merge is about can be read."""
    folder = write_sharded(tmp_path / "model", [{n: a} for n, a in base.items()])
    shard = folder / "model-00001-of-00002.safetensors"
    apart = write_safetensors(folder / "apart.safetensors", base)
    torn(monkeypatch, folder, delta_on(base, 3), "merge")
    for path in (folder, shard, folder / "model.safetensors.index.json"):
        with pytest.raises(JournalError, match=r"^\S+index\.json holds only a part of a merge in "):
            Checkpoint(path)
    with pytest.raises(JournalError, match="holds only a part"):
        merge(shard, only(), tmp_path / "out.safetensors")
    Checkpoint(apart)
    revert(folder)
    (name,) = Checkpoint(shard).names
    tear(
        monkeypatch,
        lambda: merge_in_place(shard, only(delta_on(base, 3).tensors[name]), progress=_stop),
    )
    with pytest.raises(JournalError, match=r"^\S+-00001-of-00002\.safetensors holds only a part"):
        Checkpoint(folder)


def _stop(done: int, total: int) -> None:
    raise OutputError("stopped")


def test_commands_refuse_before_they_load_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line: one line, status 1, no output; the loader is never asked."""
    model = write_llama(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", colour_rows(20))
    weights = load_file(model / "model.safetensors")
    some = {name: weights[name] for name in sorted(weights)[:2]}
    delta = tmp_path / "d.sdelta"
    dk.save(delta_on(some, 4, model), delta)
    told = torn(monkeypatch, model, delta_on(some, 5), "merge")
    before = contents(tmp_path)
    settings = ["--model", model, "--data", data, "--task", "causal-lm"]
    run = ["--output-dir", tmp_path / "run", "--budget", 10, "--epochs", 1]
    with monkeypatch.context() as patched:
        patched.delattr(AutoModelForCausalLM, "from_pretrained")
        for command in (
            ["train", *settings, *run],
            ["lr-find", *settings, *run],
            ["evaluate", *settings, "--delta", delta],
            ["diff", model, model, "-o", tmp_path / "o.sdelta"],
            ["verify", delta, "--base", model],
            ["merge", model, delta, "--dry-run"],
        ):
            result = CliRunner().invoke(main, [str(word) for word in command])
            assert (result.exit_code, result.stdout) == (1, ""), (command, result.exception)
            assert result.stderr.splitlines()[-1] == f"Error: {told}", command
    assert contents(tmp_path) == before
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(JournalError, match="holds only a part of a merge in place"):
        dk.apply(loaded, dk.load(delta))


def test_a_base_that_was_merged_into_is_named_with_its_journal(
    tmp_path: Path, base: dict[str, Array]
) -> None:
    """A delta whose entries were changed by it: revert first, or merge in place; both work."""
    model = write_safetensors(tmp_path / "model.safetensors", base)
    first, second = (delta_on(base, seed, model) for seed in (6, 7))
    out = tmp_path / "out.safetensors"
    merge(model, [first, first, second], tmp_path / "expected.safetensors")
    merge(model, second, tmp_path / "second.safetensors")
    dk.save(second, tmp_path / "d.sdelta")
    merge_in_place(model, [first, first])
    carries = (
        rf"it carries 2 deltas merged in place \(journal {model}\.undo\): deltakit revert {model} "
        "first, or merge --in-place, which starts from the base's own values$"
    )
    with pytest.raises(BaseMismatchError, match=carries):
        merge(model, second, out)
    (problem,) = {p.partition("); ")[2] for p in dk.verify(tmp_path / "d.sdelta", model).problems}
    assert re.match(carries, problem)
    assert not out.exists()
    with pytest.raises(
        BaseMismatchError, match=r"with --allow-base-mismatch, merge, .* use it all the same$"
    ):
        merge_in_place(model, delta_on(base, 8, tmp_path / "second.safetensors"))
    merge_in_place(model, second)
    assert model.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    revert(model)
    merge(model, second, out)
    assert out.read_bytes() == (tmp_path / "second.safetensors").read_bytes()


def test_what_the_output_takes_over_from_a_merge_in_place_is_said(
    tmp_path: Path, base: dict[str, Array]
) -> None:
    """A delta without identity, whose base cannot be checked, goes on top, and a note says so."""
    model = write_safetensors(tmp_path / "model.safetensors", base)
    first, second = delta_on(base, 9), delta_on(base, 10)
    merge_in_place(model, first)
    report = merge(model, second, tmp_path / "out.safetensors")
    assert report.notes[0] == f"{model} carries delta 0, merged in place; the output does too"
    revert(model)
    assert "merged in place" not in " ".join(merge(model, second, dry_run=True).notes)
