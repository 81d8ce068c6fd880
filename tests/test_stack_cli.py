"""`deltakit stack`, and `deltakit merge --method`, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from stack_reference import sparse

import deltakit as dk
from deltakit.cli.main import main
from deltakit.combine import METHODS


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`a.sdelta` and `b.sdelta` in the folder in which commands run."""
    monkeypatch.chdir(tmp_path)
    dk.save(sparse({"v": [1.0, 4.0], "w": [1.0, -2.0, 3.0]}), "a.sdelta")
    dk.save(sparse({"w": [2.0, 5.0, -1.0]}), "b.sdelta")


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `deltakit ARGUMENTS`, in this process."""
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_stack_announces_a_name_beside_the_first() -> None:
    code, out, err = run("stack", "a.sdelta", "b.sdelta", "--method", "ties", "--density", "1")
    assert (code, err) == (0, "")
    assert out.startswith("a-ties.sdelta: 5 entries in 2 tensors of 2 deltas by ties, ")
    expected = dk.stack(["a.sdelta", "b.sdelta"], "ties", density=1)
    assert dk.load("a-ties.sdelta").equals(expected)


def test_every_option_reaches_the_library() -> None:
    code, out, _ = run(
        *("stack", "a.sdelta", "b.sdelta", "-o", "out.sdelta", "--method", "della", "--json"),
        *("--weights", "0.5,-1", "--density", "0.4", "--density-of", "numel", "--seed", "3"),
        *("--flavour", "mergekit", "--set", "epsilon=0.1", "--set", "sign-by=frequency"),
    )
    assert code == 0
    expected = dk.stack(
        ["a.sdelta", "b.sdelta"],
        "della",
        [0.5, -1],
        density=0.4,
        density_of="numel",
        seed=3,
        flavour="mergekit",
        epsilon=0.1,
        sign_by="frequency",
    )
    assert dk.load("out.sdelta").equals(expected)
    told: Any = json.loads(out)
    assert (told["output"], told["entries"]) == ("out.sdelta", expected.nnz)
    assert told["options"] == expected.provenance["options"]
    assert [s["name"] for s in told["sources"]] == ["a.sdelta", "b.sdelta"]


def test_weights_by_pattern() -> None:
    arguments = ("--weights", "2,1", "--tensor-weights", "v=3,1", "--tensor-weights", "[vw]=4,0")
    assert run("stack", "a.sdelta", "b.sdelta", *arguments, "-o", "out.sdelta")[0] == 0
    made = dk.load("out.sdelta").tensors
    assert made["v"].values.tolist() == [3, 12]
    assert made["w"].values.tolist() == [4, -8, 12]
    code, _, err = run("stack", "a.sdelta", "b.sdelta", "--tensor-weights", "v=3", "-o", "x.sdelta")
    assert (code, err) == (1, "Error: --tensor-weights 'v=3' is no PATTERN=W,... for 2 deltas\n")


def test_inputs_and_outputs_are_kept() -> None:
    before = Path("a.sdelta").read_bytes()
    code, _, err = run("stack", "b.sdelta", "a.sdelta", "-o", "./a.sdelta", "--force")
    assert code == 1
    assert err == "Error: a.sdelta is a delta to be read; give another output\n"
    assert run("stack", "a.sdelta", "b.sdelta")[0] == 0
    code, _, err = run("stack", "a.sdelta", "b.sdelta")
    assert (code, "a-linear.sdelta exists" in err) == (1, True)
    assert run("stack", "a.sdelta", "b.sdelta", "--force", "--weights", "2,2")[0] == 0
    assert dk.load("a-linear.sdelta").tensors["v"].values.tolist() == [2, 8]
    assert Path("a.sdelta").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--method", "tise"), "unknown stacking method 'tise'; nearest: ties"),
        (("--seed", "1"), "linear takes no option 'seed'"),
        (("--method", "ram", "--set", "threshold"), "--set 'threshold' is no NAME=VALUE"),
        (("--method", "ram", "--set", "threshold=x"), "threshold cannot be 'x'; it is a number"),
        (("--method", "disjoint"), "3 entries in 1 tensors are in several deltas ('w': 3)"),
        (("--weights", "1"), "1 weights for 2 deltas"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments: tuple[str, ...], told: str) -> None:
    code, out, err = run("stack", "a.sdelta", "b.sdelta", *arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert told in err
    assert sorted(p.name for p in Path().iterdir()) == ["a.sdelta", "b.sdelta"]


def test_all_methods_are_listed() -> None:
    code, out, _ = run("stack", "--list-methods")
    assert code == 0
    for record in METHODS:
        assert f"{record.name}: {record.summary}" in out
    assert (
        "ties: trim, elect a sign per entry, mean of those that agree (Yadav et al., 2023)" in out
    )
    assert "    flavours: paper, mergekit, peft\n" in out


def test_notes_are_told_on_stderr() -> None:
    arguments = ("--method", "disjoint", "--set", "collisions=first")
    code, _, err = run("stack", "a.sdelta", "b.sdelta", *arguments)
    assert code == 0
    assert err.startswith("Note: 3 entries in 1 tensors are in several deltas ('w': 3); taken from")


def test_merge_by_a_method(delta_file: Path) -> None:
    dk.save(dk.truncate(dk.load(delta_file), 40), "small.sdelta")
    options = ("--method", "ties", "--density", "0.5", "--weights", "1,0.5")
    assert run("stack", "delta.sdelta", "small.sdelta", *options)[0] == 0
    assert run("merge", "base.safetensors", "delta-ties.sdelta", "-o", "one.safetensors")[0] == 0
    both = ("delta.sdelta", "small.sdelta")
    assert run("merge", "base.safetensors", *both, *options, "-o", "two.safetensors")[0] == 0
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()
    code, _, err = run("merge", "base.safetensors", *both, "--density", "0.5")
    assert (code, "density is an option of stacking methods" in err) == (1, True)
    assert run("merge", "base.safetensors", *both, *options, "--in-place")[0] == 0
    merged = dk.load("delta-ties.sdelta")
    base = dk.load("delta.sdelta").base
    assert merged.base is not None
    assert base is not None
    assert merged.base.model_id == base.model_id
    assert Path("base.safetensors").read_bytes() == Path("one.safetensors").read_bytes()
