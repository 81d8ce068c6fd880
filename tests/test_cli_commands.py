"""inspect, truncate, merge, diff and verify as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import deltakit as dk
from deltakit.cli.main import main
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import SdeltaFile


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in the folder of the files, so that messages hold short names."""
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `deltakit ARGUMENTS`, in this process."""
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


def run_json(*arguments: object) -> Any:
    """What a command prints with --json; fails unless that is all of stdout."""
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    return json.loads(out)


def test_inspect_tells_the_story(delta_file: Path) -> None:
    code, out, err = run("inspect", "delta.sdelta")
    assert (code, err) == (0, "")
    assert out.startswith(f"file     delta.sdelta ({delta_file.stat().st_size / 1000:.2f} kB")
    assert "entries  110 in 2 tensors\n" in out
    assert "density  17.7 % of the base, 17.7 % of the touched tensors\n" in out
    assert "; unmasked at steps " in out
    assert "entropy of support" in out
    assert "  task  news\n" in out
    assert "block" in out
    assert "shape" not in out


def test_inspect_lists_tensors_on_request(delta_file: Path) -> None:
    code, out, _ = run("inspect", delta_file, "--tensors")
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("w ")]
    assert line.split()[:5] == ["w", "20x30", "float32", "add", "100"]
    assert "block" not in out


def test_inspect_prints_json_and_nothing_else(delta_file: Path) -> None:
    told = run_json("inspect", delta_file)
    assert told["entries"] == 110
    assert [t["name"] for t in told["tensors"]] == ["b", "w"]


def test_truncate_announces_a_name_beside_the_input(delta_file: Path) -> None:
    before = delta_file.read_bytes()
    code, out, err = run("truncate", "delta.sdelta", "--budget", "25")
    assert (code, err) == (0, "")
    assert out.startswith("delta-25.sdelta: 25 of 110 entries by magnitude, ")
    small = dk.load("delta-25.sdelta")
    assert small.nnz == 25
    assert small.equals(dk.truncate(dk.load(delta_file), 25))
    assert delta_file.read_bytes() == before


def test_truncate_by_order_to_a_share_of_the_base(delta_file: Path) -> None:
    told = run_json("truncate", delta_file, "-b", "10%", "--by", "order", "-o", "out.sdelta")
    assert told["output"] == "out.sdelta"
    assert (told["entries"], told["of"]) == (62, 110)
    assert dk.load("out.sdelta").equals(dk.truncate(dk.load(delta_file), 62, "order"))


def test_truncate_keeps_an_existing_output_unless_forced(delta_file: Path) -> None:
    assert run("truncate", delta_file, "-b", "25")[0] == 0
    kept = Path("delta-25.sdelta").read_bytes()
    code, out, err = run("truncate", delta_file, "-b", "30", "-o", "delta-25.sdelta")
    assert (code, out) == (1, "")
    assert err == ("Error: delta-25.sdelta exists; give another output or --force to replace it\n")
    assert Path("delta-25.sdelta").read_bytes() == kept
    assert run("truncate", delta_file, "-b", "30", "-o", "delta-25.sdelta", "--force")[0] == 0
    assert dk.load("delta-25.sdelta").nnz == 30


def test_truncate_never_replaces_its_input(delta_file: Path) -> None:
    before = delta_file.read_bytes()
    code, _, err = run("truncate", delta_file, "-b", "3", "-o", "./delta.sdelta", "--force")
    assert code == 1
    assert err == "Error: delta.sdelta is a delta to be read; give another output\n"
    assert delta_file.read_bytes() == before


def test_truncate_says_when_there_is_nothing_to_drop(delta_file: Path) -> None:
    code, out, err = run("truncate", "delta.sdelta", "-b", "1k")
    assert code == 0
    assert out.startswith("delta-110.sdelta: 110 of 110 entries")
    assert err == "delta.sdelta has 110 entries, within the budget: nothing was dropped.\n"
    assert run("-q", "truncate", delta_file, "-b", "1k", "--force")[2] == ""
    assert run("truncate", delta_file, "-b", "1k", "--force", "--quiet")[2] == ""


def test_truncate_keeps_the_dtype_of_stored_values(delta_file: Path) -> None:
    dk.save(dk.load(delta_file), "half.sdelta", values="bfloat16")
    assert run("truncate", "half.sdelta", "-b", "30")[0] == 0
    with SdeltaFile("half-30.sdelta") as file:
        assert {t.value_dtype for t in file.tensors.values()} == {"bfloat16"}


def test_truncate_reads_a_base_for_bare_set_deltas(delta_file: Path) -> None:
    assert run("merge", "base.safetensors", delta_file, "-o", "tuned.safetensors")[0] == 0
    files = ["base.safetensors", "tuned.safetensors"]
    assert run("diff", *files, "-o", "bare.sdelta", "--no-base-values")[0] == 0
    code, _, err = run("truncate", "bare.sdelta", "-b", "5")
    assert code == 1
    assert err.endswith("so the size of its changes is not known; give the base\n")
    assert run("truncate", "bare.sdelta", "-b", "5", "--base", "base.safetensors")[0] == 0
    assert dk.load("bare-5.sdelta").nnz == 5


def test_merge_works_as_it_stands(delta_file: Path) -> None:
    base = Path("base.safetensors").read_bytes()
    code, out, err = run("merge", "base.safetensors", "delta.sdelta")
    assert (code, err) == (0, "")
    assert out.startswith("base-delta.safetensors: ")
    assert out.endswith(" in 1 file, 110 entries of 1 delta merged\n")
    before, after = load_file("base.safetensors"), load_file("base-delta.safetensors")
    for name, tensor in dk.load(delta_file).tensors.items():
        expected = before[name].copy()
        expected.flat[tensor.indices] += tensor.values
        assert after[name].tobytes() == expected.tobytes()
    assert Path("base.safetensors").read_bytes() == base


def test_merge_tells_base_and_deltas_apart_by_content(delta_file: Path) -> None:
    """Neither their order nor their names matter."""
    delta_file.rename("one")
    Path("base.safetensors").rename("two")
    code, out, _ = run("merge", "one", "two", "-o", "out.safetensors")
    assert code == 0
    assert "110 entries of 1 delta" in out


def test_merge_weighs_several_deltas(delta_file: Path) -> None:
    told = run_json(
        "merge", "base.safetensors", delta_file, delta_file, "--weights", "0.5,-0.5", "-o",
        "same.safetensors",
    )  # fmt: skip
    assert told["weights"] == [0.5, -0.5]
    before, after = load_file("base.safetensors"), load_file("same.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_merge_into_a_folder_takes_the_rest_along(delta_file: Path) -> None:
    Path("model").mkdir()
    Path("base.safetensors").rename("model/model.safetensors")
    Path("model/config.json").write_text('{"model_type": "tiny"}')
    code, out, _ = run("merge", "model", delta_file)
    assert code == 0
    assert out.startswith(f"{delta_file.parent / 'model-delta'}: ")
    assert Path("model-delta/config.json").read_text() == '{"model_type": "tiny"}'


def test_merge_dry_run_writes_nothing(delta_file: Path) -> None:
    before = sorted(Path().iterdir())
    code, out, _ = run(
        "merge", "base.safetensors", delta_file, "-o", "out.safetensors", "--dry-run"
    )
    assert code == 0
    assert out.startswith("out.safetensors: would be written, ")
    assert "\nmemory needed: about " in out
    assert sorted(Path().iterdir()) == before


def test_merge_refuses_another_base_unless_told(
    delta_file: Path, other_checkpoint: Checkpoint
) -> None:
    code, out, err = run("merge", "other.safetensors", delta_file)
    assert (code, out) == (1, "")
    assert "is not the base of the delta: tensor 'b' has other values" in err
    assert err.count("\n") == 1
    assert not Path("other-delta.safetensors").exists()
    code, _, err = run("merge", "other.safetensors", delta_file, "--allow-base-mismatch")
    assert code == 0
    assert "used all the same, as asked" in err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["base.safetensors"], "no delta given: base.safetensors is no .sdelta file"),
        (
            ["base.safetensors", "other.safetensors", "delta.sdelta"],
            (
                "a merge takes one base, found 2: base.safetensors, other.safetensors; "
                "the others are no .sdelta files"
            ),
        ),
        (["base.safetensors", "delta.sdelta", "gone"], "no such file or folder: gone"),
        (
            ["base.safetensors", "delta.sdelta", "--weights", "1,2"],
            "2 weights for 1 deltas; give one for each",
        ),
    ],
)
def test_merge_says_what_is_missing(
    delta_file: Path, other_checkpoint: Checkpoint, arguments: list[str], line: str
) -> None:
    assert run("merge", *arguments) == (1, "", f"Error: {line}\n")


def test_merge_without_arguments_is_wrong_usage() -> None:
    assert run("merge")[0] == 2


def test_diff_and_merge_give_the_tuned_file_back(delta_file: Path) -> None:
    random = np.random.default_rng(5)
    tuned = load_file("base.safetensors")
    tuned["w"].flat[random.choice(600, 40, replace=False)] += 1
    save_file(tuned, "tuned.safetensors")
    code, out, err = run("diff", "base.safetensors", "tuned.safetensors", "-o", "tuned.sdelta")
    assert (code, err) == (0, "")
    assert out.startswith("tuned.sdelta: 40 entries in 1 tensor, 0 extras, ")
    assert run("merge", "base.safetensors", "tuned.sdelta", "-o", "again.safetensors")[0] == 0
    again = load_file("again.safetensors")
    assert {n: a.tobytes() for n, a in again.items()} == {n: a.tobytes() for n, a in tuned.items()}


def test_diff_needs_an_output_and_keeps_an_existing_one(delta_file: Path) -> None:
    assert run("diff", "base.safetensors", "base.safetensors")[0] == 2
    code, _, err = run("diff", "base.safetensors", "base.safetensors", "-o", "delta.sdelta")
    assert (code, err) == (
        1,
        "Error: delta.sdelta exists; give another output or --force to replace it\n",
    )


def test_diff_reports_json(delta_file: Path) -> None:
    told = run_json("diff", "base.safetensors", "base.safetensors", "-o", "none.sdelta")
    assert (told["entries"], told["tensors"], told["extras"]) == (0, 0, [])


def test_verify_finds_a_sound_file_sound(delta_file: Path) -> None:
    code, out, err = run("verify", "delta.sdelta")
    assert code == 0
    assert out == "delta.sdelta: sound; 110 entries, sparse tensors: 2, extras: 0\n"
    assert err == "Note: no base given, so only the file itself was checked\n"
    code, out, err = run("verify", "delta.sdelta", "--base", "base.safetensors")
    assert (code, err) == (0, "")
    assert out.startswith("delta.sdelta: sound, and base.safetensors is its base; 110 entries")


def test_verify_finds_damage(delta_file: Path) -> None:
    data = bytearray(delta_file.read_bytes())
    data[-1] ^= 1
    delta_file.write_bytes(data)
    code, out, err = run("-q", "verify", "delta.sdelta")
    assert (code, out) == (1, "")
    assert "bytes differ from their digest" in err
    assert err.count("\n") == 1


def test_verify_finds_another_base(delta_file: Path, other_checkpoint: Checkpoint) -> None:
    code, out, err = run("verify", "delta.sdelta", "--base", "other.safetensors")
    assert (code, out) == (1, "")
    assert "tensor 'b' has other values" in err
    assert err.endswith("; and 1 more such problems (--json lists all)\n")
    done = CliRunner().invoke(
        main, ["verify", "delta.sdelta", "--base", "other.safetensors", "--json"]
    )
    assert done.exit_code == 1
    assert len(json.loads(done.stdout)["problems"]) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["truncate", "-b", "5"],
        ["merge", "base.safetensors"],
        ["verify"],
    ],
)
@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_cut_file_is_one_line_and_leaves_nothing(
    delta_file: Path, arguments: list[str], size: int
) -> None:
    delta_file.write_bytes(delta_file.read_bytes()[:size])
    before = sorted(Path().iterdir())
    code, out, err = run("-q", *arguments, "delta.sdelta")
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert "delta.sdelta" in err
    assert sorted(Path().iterdir()) == before


def test_an_output_folder_that_does_not_exist_is_told(delta_file: Path) -> None:
    code, _, err = run("truncate", delta_file, "-b", "5", "-o", "gone/out.sdelta")
    assert (code, err) == (
        1,
        "Error: cannot write gone/out.sdelta: folder gone does not exist\n",
    )


def test_a_device_is_never_replaced(delta_file: Path) -> None:
    code, _, err = run("truncate", delta_file, "-b", "5", "-o", "/dev/null", "--force")
    assert (code, err) == (
        1,
        "Error: /dev/null is neither a file nor a folder; give another output\n",
    )
    assert Path("/dev/null").is_char_device()
