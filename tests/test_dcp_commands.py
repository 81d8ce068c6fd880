"""What takes a checkpoint takes a directory of torch.distributed.checkpoint: diff, merge, verify, ..."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dcp_lab import Writer, bits, grid, save
from safetensors.torch import load_file, save_file
from train_lab import deltakit

import deltakit as dk
from deltakit.errors import OutputError
from deltakit.formats import dcp_folder
from deltakit.formats.checkpoint import Checkpoint

Tensors = dict[str, torch.Tensor]


def weights(seed: int = 0) -> Tensors:
    """A model of three tensors of two dtypes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(8, 6, generator=generator).bfloat16(),
        "head.weight": torch.randn(4, 6, generator=generator),
        "head.bias": torch.randn(4, generator=generator),
    }


def changed(tensors: Tensors) -> Tensors:
    """The same with five other elements."""
    new = {name: tensor.clone() for name, tensor in tensors.items()}
    new["embed.weight"][[1, 5, 7], [0, 3, 5]] += 1
    new["head.weight"][2, :2] = -0.0
    return new


def split(folder: Path, tensors: Tensors) -> Path:
    """Saved in chunks: one tensor by rows, one by columns, one whole; an optimizer's state beside."""
    writer = Writer(folder)
    cuts = {"embed.weight": [[2, 5], []], "head.weight": [[], [4]], "head.bias": [[]]}
    for name, tensor in tensors.items():
        writer.add(f"model.{name}", tensor, grid(tensor.shape, cuts[name]), files=3)
    writer.add("optimizer.state.0.exp_avg", torch.zeros(3))
    planned: dict[str, Any] = {f"model.{name}": ("model", name) for name in tensors}
    planned["optimizer.state.0.exp_avg"] = ("optimizer", "state", 0, "exp_avg")
    return writer.finish(planned)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with safetensors and a configuration."""
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(weights(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    return folder


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return split(tmp_path / "tuned", changed(weights()))


def assert_is(path: Path, expected: Tensors) -> None:
    checkpoint = Checkpoint(path)
    assert checkpoint.names == sorted(expected)
    for name, tensor in expected.items():
        assert checkpoint.info(name).shape == tuple(tensor.shape)
        assert checkpoint.read(name).tobytes() == bits(tensor), name


@pytest.mark.parametrize("mode", ["set", "add"])
def test_diff_gives_what_safetensors_give(
    base: Path, tuned: Path, tmp_path: Path, mode: Any
) -> None:
    """The base may be a directory too; deltas are equal to the byte."""
    save_file(changed(weights()), tmp_path / "plain.safetensors")
    dk.diff(base, tmp_path / "plain.safetensors", mode=mode, out=tmp_path / "expected.sdelta")
    expected = (tmp_path / "expected.sdelta").read_bytes()
    before = split(tmp_path / "before", weights())
    for number, (old, new) in enumerate([(base, tuned), (before, tuned)]):
        report = dk.diff(old, new, mode=mode, out=tmp_path / f"{number}.sdelta", workers=2)
        assert (tmp_path / f"{number}.sdelta").read_bytes() == expected
        assert report.entries == 5
        assert f"{new}: the 3 tensors under 'model' are taken, 1 other items left" in report.notes
        assert dk.diff(old, new, mode=mode).equals(dk.load(tmp_path / "expected.sdelta"))


def test_merge_writes_safetensors(base: Path, tuned: Path, tmp_path: Path) -> None:
    """A folder, or one file; what merging the same base in safetensors gives, to the bit."""
    delta = dk.diff(base, tuned)
    before = split(tmp_path / "before", weights())
    (before / "config.json").write_text('{"model_type": "tiny"}')
    report = dk.merge(before, delta, tmp_path / "folder")
    assert set(report.files) == {"model.safetensors", "config.json"}
    assert {path.name for path in (tmp_path / "folder").iterdir()} == set(report.files)
    assert any("under 'model' are taken" in note for note in report.notes)
    dk.merge(before, delta, tmp_path / "one.safetensors")
    for out in (tmp_path / "folder", tmp_path / "one.safetensors"):
        assert_is(out, changed(weights()))
    loaded = load_file(tmp_path / "folder" / "model.safetensors")
    assert {name: bits(t) for name, t in loaded.items()} == {
        name: bits(tensor) for name, tensor in changed(weights()).items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_converts(base: Path, tuned: Path, tmp_path: Path, dtype: str) -> None:
    delta = dk.diff(base, tuned)
    dk.merge(base, delta, tmp_path / "a.safetensors", dtype=dtype)
    before = split(tmp_path / "before", weights())
    dk.merge(before, delta, tmp_path / "b.safetensors", dtype=dtype)
    expected = Checkpoint(tmp_path / "a.safetensors")
    found = Checkpoint(tmp_path / "b.safetensors")
    assert {n: found.read(n).tobytes() for n in found.names} == {
        n: expected.read(n).tobytes() for n in expected.names
    }


def test_a_large_merge_is_sharded(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several weight files with their index, by threads and by the jobs of an array."""
    monkeypatch.setattr(dcp_folder, "SHARD_SIZE", 112)
    delta = dk.diff(base, tuned)
    new = torch.ones(3, 2)
    delta = dk.SparseDelta(
        tensors=delta.tensors, base=delta.base, extras={"score.weight": new.numpy()}
    )
    before = split(tmp_path / "before", weights())
    dk.merge(before, delta, tmp_path / "whole", workers=2)
    index = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text())
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert index["weight_map"] == {
        "embed.weight": names[0],
        "head.bias": names[0],
        "head.weight": names[1],
        "score.weight": names[1],
    }
    expected = {**changed(weights()), "score.weight": new}
    assert index["metadata"]["total_size"] == sum(len(bits(t)) for t in expected.values())
    assert_is(tmp_path / "whole", expected)
    for number in (1, 2):
        dk.merge(before, delta, tmp_path / "jobs", shard=(number, 2))
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "jobs").iterdir()} == files
    dk.merge(before, delta, tmp_path / "one.safetensors")
    assert_is(tmp_path / "one.safetensors", expected)


def test_the_commands(base: Path, tuned: Path, tmp_path: Path) -> None:
    delta = tmp_path / "delta.sdelta"
    done = deltakit("diff", base, tuned, "-o", delta)
    assert done.exit_code == 0
    assert "5 entries in 2 tensors" in done.stdout
    assert "the 3 tensors under 'model' are taken" in done.stderr
    before = split(tmp_path / "before", weights())
    done = deltakit("verify", delta, "--base", before)
    assert (done.exit_code, "is its base" in done.stdout) == (0, True)
    done = deltakit("verify", delta, "--base", f"{tuned}#model")
    assert (done.exit_code, "is not the base of the delta" in done.stderr) == (1, True)
    done = deltakit("merge", f"{before}#model", delta)
    assert done.exit_code == 0, done.stderr
    assert_is(tmp_path / "before-delta", changed(weights()))
    done = deltakit("merge", f"{before}#ema", delta, "-o", tmp_path / "none")
    assert (done.exit_code, done.stderr.strip()) == (
        1,
        f"Error: {before} holds no tensors under 'ema'; it has 'model'",
    )
    done = deltakit("merge", tmp_path / "gone#model", delta)
    assert (done.exit_code, "no such file or folder" in done.stderr) == (1, True)


def test_inputs_are_not_overwritten(base: Path, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is one of the two checkpoints"):
        dk.diff(base, tuned, out=tuned / "__1_0.distcp")
    delta = dk.diff(base, tuned)
    for out in (tuned, tuned / "inside"):
        with pytest.raises(OutputError, match=r"is an input of the merge|inside the base's own"):
            dk.merge(tuned, delta, out, force=True, allow_base_mismatch=True)
    assert_is(tuned, changed(weights()))


def test_nothing_is_changed_in_place(base: Path, tuned: Path, tmp_path: Path) -> None:
    delta = tmp_path / "delta.sdelta"
    dk.diff(base, tuned, out=delta)
    before = split(tmp_path / "before", weights())
    files = {path: path.read_bytes() for path in before.iterdir()}
    with pytest.raises(OutputError, match="is not changed in place; merge into a new folder"):
        dk.merge_in_place(before, delta)
    done = deltakit("merge", before, delta, "--in-place")
    assert (done.exit_code, "is not changed in place" in done.stderr) == (1, True)
    done = deltakit("revert", before)
    assert (done.exit_code, "Error: " in done.stderr) == (1, True)
    assert {path: path.read_bytes() for path in before.iterdir()} == files


def test_other_uses_of_a_base(base: Path, tuned: Path, tmp_path: Path) -> None:
    """What takes values from a base takes them from a directory."""
    delta = dk.diff(base, tuned, keep_base=False)
    before = split(tmp_path / "before", weights())
    for name, function in {
        "truncate": lambda side: dk.truncate(delta, 2, base=side),
        "rebase": lambda side: dk.rebase(delta, side, "add"),
        "stack": lambda side: dk.stack([delta], "linear", base=side),
    }.items():
        assert function(before).equals(function(base)), name


def tied_checkpoints(tmp_path: Path, same: bool) -> tuple[Path, Path, Tensors]:
    """A base with one embedding, and its tuned form whose state dict has it under two names."""
    old = {"embed.weight": torch.randn(8, 6), "norm.weight": torch.zeros(6)}
    new = {"embed.weight": old["embed.weight"] + 1, "norm.weight": torch.zeros(6)}
    new |= {"lm_head.weight": new["embed.weight"].clone(), "norm.bias": torch.zeros(6)}
    new["lm_head.weight"][0, 0] += 0 if same else 1
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(old, folder / "model.safetensors")
    return folder, save({"model": new}, tmp_path / "tuned"), new


def test_a_tied_tensor_is_kept_once(tmp_path: Path) -> None:
    """A state dict has it under both names. Vectors that are equal by chance stay."""
    base, tuned, _ = tied_checkpoints(tmp_path, same=True)
    report = dk.diff(base, tuned, out=tmp_path / "d.sdelta")
    assert (report.tensors, report.extras) == (1, ("norm.bias",))
    assert any(note.startswith("lm_head.weight of the tuned side is") for note in report.notes)


def test_what_is_not_tied_is_kept_twice(tmp_path: Path) -> None:
    base, tuned, new = tied_checkpoints(tmp_path, same=False)
    assert list(dk.diff(base, tuned).extras) == ["lm_head.weight", "norm.bias"]
    new["lm_head.weight"] = new["embed.weight"].clone()
    shutil.rmtree(tuned)
    save({"model": new}, tuned)
    (base / "config.json").write_text('{"tie_word_embeddings": false}')
    assert list(dk.diff(base, tuned).extras) == ["lm_head.weight", "norm.bias"]
    (base / "config.json").unlink()
    save_file(new, tmp_path / "plain.safetensors")
    assert list(dk.diff(base, tmp_path / "plain.safetensors").extras) == [
        "lm_head.weight",
        "norm.bias",
    ]


def test_torch_is_not_needed(base: Path, tuned: Path, tmp_path: Path) -> None:
    """Where importing torch fails, a directory is diffed, merged and verified all the same."""
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import deltakit as dk\n"
        f"dk.diff({str(base)!r}, {str(tuned)!r}, out='d.sdelta')\n"
        f"dk.merge({str(tuned)!r}, 'd.sdelta', 'm.safetensors', allow_base_mismatch=True)\n"
        f"assert not dk.verify('d.sdelta', {str(tuned)!r}).ok\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(dk.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert dk.load(tmp_path / "d.sdelta").equals(dk.diff(base, tuned))


def test_memory_follows_what_is_asked_for(tmp_path: Path) -> None:
    """Of 64 MB in chunks, a window and some entries are read in far less memory."""
    import tracemalloc

    folder = save({"w": torch.zeros(4096, 4096)}, tmp_path / "saved")
    writer = Writer(tmp_path / "cut")
    writer.add("w", torch.zeros(4096, 4096), grid((4096, 4096), [[1000, 3000], [1500]]))
    for each in (folder, writer.finish()):
        checkpoint = Checkpoint(each)
        tracemalloc.start()
        checkpoint.read("w", 4096 * 999 + 7, 4096 * 1010 + 3)
        checkpoint.gather("w", np.arange(0, 2**24, 2**10))
        (shard,) = checkpoint.shards.values()
        for piece in shard.pieces("w"):
            assert piece.nbytes > 0
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
        tracemalloc.stop()
