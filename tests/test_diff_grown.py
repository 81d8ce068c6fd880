"""Laws of rows appended to tensors: diff keeps them, merging appends them, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_factory import random_array, read_safetensors, write_safetensors, write_sharded
from click.testing import CliRunner
from merge_reference import adding, only

import deltakit as dk
from deltakit.cli.main import main
from deltakit.errors import BaseMismatchError, CoordinateError, DeltaError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import check_base

KINDS = [np.float32, ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, np.int8, np.bool_]


def grown(folder: Path, kind: Any) -> tuple[Path, Path]:
    """A base of 5 tokens and its tuned form of 8, sharded otherwise, with a head of its own."""
    rng = np.random.default_rng(11)
    embed, norm = random_array(rng, (5, 3), kind), random_array(rng, (4,), np.float32)
    bias = random_array(rng, (5,), kind)
    longer = np.concatenate([embed, random_array(rng, (3, 3), kind)])
    longer.view(f"u{longer.itemsize}")[1, 2] ^= 1
    config = {"architectures": ["X"], "hidden": 3, "vocab_size": 5}
    base = write_sharded(
        folder / "base", [{"embed": embed, "norm": norm}, {"lm_head.bias": bias}], config
    )
    tuned = write_sharded(
        folder / "tuned",
        [
            {"lm_head.bias": np.concatenate([bias, bias[:3]])},
            {"score": random_array(rng, (2, 3), kind), "norm": norm + 1, "embed": longer},
        ],
        {"architectures": ["X"], "hidden": 3, "id2label": {"0": "é"}, "vocab_size": 8},
    )
    return base, tuned


@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_vocabulary_comes_back(tmp_path: Path, kind: Any) -> None:
    """Every tensor and config.json, into a folder and into one file."""
    base, tuned = grown(tmp_path, kind)
    report = dk.diff(base, tuned, out=tmp_path / "d.sdelta")
    assert report.extras == ("embed[5:]", "lm_head.bias[5:]", "score")
    assert report.notes[-1].startswith("new rows of embed, lm_head.bias are kept whole; a delta ")
    delta = dk.load(tmp_path / "d.sdelta")
    assert list(delta.extras) == ["embed[5:]", "lm_head.bias[5:]", "score"]
    assert delta.extras["embed[5:]"].shape == (3, 3)
    assert delta.tensors["embed"].indices.max() < 15
    assert delta.equals(dk.diff(base, tuned))
    assert check_base(delta, Checkpoint(base)) == []
    assert dk.verify(tmp_path / "d.sdelta", base).ok
    dk.merge(base, delta, tmp_path / "merged")
    merged, wanted = Checkpoint(tmp_path / "merged"), Checkpoint(tuned)
    assert merged.names == wanted.names
    for name, info in wanted.tensors.items():
        assert (merged.tensors[name].shape, merged.tensors[name].dtype) == (info.shape, info.dtype)
        assert merged.words(name).tobytes() == wanted.words(name).tobytes()
    made, given = (folder / "config.json" for folder in (tmp_path / "merged", tuned))
    assert made.read_bytes() == given.read_bytes()
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(i.nbytes for i in wanted.tensors.values())
    assert sorted(index["weight_map"]) == wanted.names
    dk.merge(base, delta, tmp_path / "one.safetensors")
    one = read_safetensors(tmp_path / "one.safetensors")
    assert {n: content[2] for n, content in one.items()} == {
        n: wanted.words(n).tobytes() for n in wanted.names
    }


def test_rows_are_converted_with_their_tensor(tmp_path: Path) -> None:
    base, tuned = grown(tmp_path, np.float32)
    delta = dk.diff(base, tuned)
    dk.merge(base, delta, tmp_path / "half", dtype="float16")
    half = Checkpoint(tmp_path / "half")
    wanted = Checkpoint(tuned).words("embed").view(np.float32).astype(np.float16)
    assert half.tensors["embed"].shape == (8, 3)
    assert half.words("embed").view(np.float16).tolist() == wanted.tolist()


def test_rows_and_entries_of_several_deltas_meet(tmp_path: Path) -> None:
    """Entries on a grown tensor keep their places; equal rows count once, others are refused."""
    base, tuned = grown(tmp_path, np.float32)
    delta = dk.diff(base, tuned, mode="add")
    embed = Checkpoint(base).words("embed").view(np.float32).reshape(5, 3)
    entries = only(adding("embed", embed, np.random.default_rng(0), 6))
    dk.merge(base, [delta, entries, delta], tmp_path / "out", weights=[0, 1, 0])
    found = Checkpoint(tmp_path / "out").words("embed").view(np.float32)
    dk.merge(base, entries, tmp_path / "plain")
    assert found[:15].tolist() == Checkpoint(tmp_path / "plain").words("embed").view("f4").tolist()
    assert found[15:].tolist() == Checkpoint(tuned).words("embed").view("f4")[15:].tolist()
    other = only(extras={"embed[5:]": np.zeros((1, 3), np.float32)})
    with pytest.raises(DeltaError, match=r"extra 'embed\[5:\]' differs between"):
        dk.merge(base, [delta, other], tmp_path / "x")
    whole = only(extras={"embed": np.zeros((5, 3), np.float32)})
    with pytest.raises(DeltaError, match="'embed' is a whole extra in one delta and gets rows"):
        dk.merge(base, [other, whole], tmp_path / "x")


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "base.safetensors", {"w": np.zeros((5, 3), np.float32)})

    def merge(name: str, rows: Any) -> None:
        dk.merge(path, only(extras={name: rows}), tmp_path / "out.safetensors")

    rows = np.zeros((2, 3), np.float32)
    with pytest.raises(CoordinateError, match=r"'v', which .*base.safetensors lacks"):
        merge("v[5:]", rows)
    with pytest.raises(CoordinateError, match=r"to tensor 'w' of 4 rows; in .* shape \[5, 3\]"):
        merge("w[4:]", rows)
    with pytest.raises(CoordinateError, match=r"rows of shape \[2\] to tensor 'w' of 5 rows"):
        merge("w[5:]", rows[:, :2])
    with pytest.raises(BaseMismatchError, match="rows of float16 to tensor 'w', which is float32"):
        merge("w[5:]", rows.astype(np.float16))


def test_only_rows_can_be_appended(tmp_path: Path) -> None:
    """Fewer rows, other columns and other ranks are refused, and so is the name of rows."""

    def diff(after: Any, name: str = "w") -> None:
        before = {"w": np.zeros((5, 3), np.int8)}
        base = write_safetensors(tmp_path / "base.safetensors", before)
        tuned = write_safetensors(tmp_path / "tuned.safetensors", before | {name: after})
        dk.diff(base, tuned)

    for shape in [(4, 3), (5, 4), (6, 4), (5, 3, 1), (15,), ()]:
        with pytest.raises(CoordinateError, match="a delta can only append rows"):
            diff(np.zeros(shape, np.int8))
    with pytest.raises(DeltaError, match=r"'w\[5:\]', a name that deltas give to rows appended"):
        diff(np.zeros((1, 3), np.int8), "w[5:]")


def test_command_names_the_new_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    grown(Path(), np.float16)
    done = CliRunner().invoke(main, ["diff", "base", "tuned", "-o", "d.sdelta"])
    assert done.exit_code == 0
    assert ", 3 extras, " in done.stdout
    assert done.stderr.splitlines()[-1] == (
        "Note: new rows of embed, lm_head.bias are kept whole; a delta holds no tokenizer, so take "
        "its files from tuned"
    )
