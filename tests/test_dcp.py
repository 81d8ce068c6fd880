"""Directories of torch.distributed.checkpoint as one process saves them, and which tensors are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dcp_lab import GOLDEN, Writer, bits, every_dtype, save

from deltakit.errors import CoordinateError, FormatError, MissingFileError
from deltakit.formats import dcp_folder
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.rewrite import Copied


def state() -> dict[str, torch.Tensor]:
    """Tensors that lie in memory in all ways, and of all dtypes."""
    whole = torch.arange(24.0).reshape(4, 6)
    laid_out = {
        "transposed": whole.t(),
        "every other": whole[:, ::2],
        "repeated": torch.tensor([1.0, 2.0]).expand(3, 2),
        "no rows": torch.zeros(0, 4),
        "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "channels last": torch.arange(48.0)
        .reshape(1, 3, 4, 4)
        .contiguous(memory_format=torch.channels_last),
    }
    return {**laid_out, **every_dtype()}


def assert_holds(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert checkpoint.names == sorted(expected)
    for name, tensor in expected.items():
        info = checkpoint.info(name)
        assert (info.dtype, info.shape) == (str(tensor.dtype)[6:], tuple(tensor.shape))
        assert info.nbytes == len(bits(tensor))
        words = checkpoint.words(name)
        assert words.tobytes() == checkpoint.read(name).tobytes() == bits(tensor), name
        assert not words.flags.writeable or words.base is None
        indices = np.arange(info.numel)[::-1].copy()
        assert (checkpoint.gather(name, indices) == words[::-1]).all()
        assert checkpoint.read(name, 1, 3).tobytes() == words[1:3].tobytes()


@pytest.mark.parametrize(
    "options",
    [{}, {"thread_count": 3}, {"single_file_per_rank": False}],
    ids=["one file", "several files", "a file for each item"],
)
def test_tensors_come_out_as_they_went_in(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save(state(), tmp_path / "saved", **options)
    checkpoint = Checkpoint(folder)
    assert_holds(checkpoint, state())
    assert checkpoint.notes == []
    assert (checkpoint.directory, checkpoint.index) == (folder, None)
    assert checkpoint.files[0] == folder / ".metadata"
    assert set(checkpoint.files) <= set(folder.iterdir())


def test_a_tensor_that_stands_together_is_not_copied(tmp_path: Path) -> None:
    """words is a view of the mapped file, and a merge has the system copy such bytes."""
    checkpoint = Checkpoint(
        save({"w": torch.ones(3, 4), "t": torch.ones(3, 4).t()}, tmp_path / "s")
    )
    assert checkpoint.words("w").base is not None
    (shard,) = checkpoint.shards.values()
    assert [type(piece) for piece in shard.pieces("w")] == [Copied]
    assert [type(piece) for piece in shard.pieces("t")] == [memoryview]


def test_what_is_asked_for_must_be_there(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save({"w": torch.ones(3, 4)}, tmp_path / "saved"))
    with pytest.raises(CoordinateError, match=r"has no tensor 'v'"):
        checkpoint.read("v")
    for index in (-1, 12):
        with pytest.raises(CoordinateError, match=f"has 12 elements, index {index} is outside"):
            checkpoint.gather("w", np.array([0, index]))


WEIGHTS = {"model.layers.0.weight": torch.arange(6.0), "lm_head.weight": torch.ones(2)}
STATES = {
    "state": {"model.layers.0.weight": {"exp_avg": torch.zeros(6)}},
    "param_groups": [{"lr": 1}],
}
FLAT_STATES = {"state.w.exp_avg": torch.zeros(6), "param_groups.w.lr": 0.1}


@pytest.mark.parametrize(
    ("saved", "note"),
    [
        (WEIGHTS, None),
        ({"model": WEIGHTS}, None),
        ({**WEIGHTS, "step": 3}, "tensors at the top level are taken, 1 other items left"),
        ({**WEIGHTS, "optimizer": STATES}, "at the top level are taken, 2 other"),
        ({"model": WEIGHTS, "optimizer": STATES, "step": 3}, "under 'model' are taken, 3 other"),
        ({"net": WEIGHTS, "adam": FLAT_STATES}, "under 'net' are taken, 2 other"),
        ({"app": {"model": WEIGHTS, "optim": STATES}}, "under 'app.model' are taken, 2 other"),
        ({"model": WEIGHTS, "ema": WEIGHTS}, "under 'model' are taken, 2 other"),
        ({"model": WEIGHTS, "step": torch.tensor(3)}, "under 'model' are taken, 1 other"),
    ],
)
def test_the_model_is_found(tmp_path: Path, saved: dict[str, Any], note: str | None) -> None:
    checkpoint = Checkpoint(save(saved, tmp_path / "saved"))
    assert_holds(checkpoint, WEIGHTS)
    assert [note in found for found in checkpoint.notes] == ([] if note is None else [True])


def test_one_of_several_groups_is_chosen_by_name(tmp_path: Path) -> None:
    other = {"w": torch.zeros(3)}
    folder = save({"actor": {"model": WEIGHTS}, "critic": {"model": other}}, tmp_path / "saved")
    with pytest.raises(FormatError, match=r"'actor.model', 'critic.model'; .*saved#critic.model"):
        Checkpoint(folder)
    assert_holds(Checkpoint(f"{folder}#actor.model"), WEIGHTS)
    assert_holds(Checkpoint(f"{folder}#critic.model"), other)
    with pytest.raises(FormatError, match=r"no tensors under 'actor'; it has 'actor.model', 'crit"):
        Checkpoint(f"{folder}#actor")
    folder = save({"w": torch.ones(2), "model": WEIGHTS, "optimizer": STATES}, tmp_path / "more")
    assert_holds(Checkpoint(f"{folder}#"), {"w": torch.ones(2)})
    name = "optimizer.state.model.layers.0.weight"
    assert_holds(Checkpoint(f"{folder}#{name}"), {"exp_avg": torch.zeros(6)})


def test_a_path_with_a_number_sign_in_it_is_a_path(tmp_path: Path) -> None:
    folder = save({"model": WEIGHTS}, tmp_path / "run#1")
    assert_holds(Checkpoint(folder), WEIGHTS)
    assert_holds(Checkpoint(f"{folder}#model"), WEIGHTS)
    with pytest.raises(MissingFileError, match="run#2 does not exist"):
        Checkpoint(tmp_path / "run#2")
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(MissingFileError, match=r"holds no \.metadata"):
        Checkpoint(f"{plain}#model")


def test_a_state_dict_that_was_not_flattened(tmp_path: Path) -> None:
    """Without the planner's data the names are the keys."""
    writer = Writer(tmp_path / "saved")
    writer.add("model.w", torch.ones(2))
    writer.finish(planned=())
    assert_holds(Checkpoint(writer.folder), {"model.w": torch.ones(2)})


def test_properties_as_torch_wrote_them_before_2_3(tmp_path: Path) -> None:
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    writer = Writer(tmp_path / "saved")
    writer.add("w", torch.ones(2).bfloat16())
    told: Any = TensorProperties(dtype=torch.bfloat16)
    writer.tensors["w"].properties = told
    writer.finish()
    assert_holds(Checkpoint(writer.folder), {"w": torch.ones(2).bfloat16()})


def test_safetensors_come_first(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = save({"w": torch.ones(2)}, tmp_path / "saved")
    save_file({"v": torch.zeros(3)}, folder / "model.safetensors")
    assert_holds(Checkpoint(folder), {"v": torch.zeros(3)})
    assert_holds(Checkpoint(f"{folder}#"), {"w": torch.ones(2)})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_what_the_writer_for_hugging_face_writes(tmp_path: Path) -> None:
    """Its whole checkpoints are plain safetensors with an index."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    tensors = {"v": torch.arange(3.0), "w": torch.ones(2, 3).bfloat16()}
    writer = HuggingFaceStorageWriter(str(tmp_path), {"v": 1, "w": 2})
    dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.files) == 2
    assert_holds(checkpoint, tensors)


def test_weight_files_are_as_large_as_they_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dcp_folder, "SHARD_SIZE", 100)
    tensors = {f"t{n}": torch.full((n,), float(n)) for n in (3, 12, 8, 30, 1)}
    checkpoint = Checkpoint(save(tensors, tmp_path / "saved"))
    held = [list(shard.tensors) for shard in checkpoint.shards.values()]
    assert held == [["t1", "t12", "t3"], ["t30"], ["t8"]]  # 64 bytes, 120, 32
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert list(checkpoint.shards) == names
    found = checkpoint.index_content()
    assert found is not None
    assert found[0] == "model.safetensors.index.json"
    assert_holds(checkpoint, tensors)


def test_the_version_changes_with_the_files(tmp_path: Path) -> None:
    folder = save({"w": torch.ones(2)}, tmp_path / "saved")
    before = Checkpoint(folder).version()
    assert Checkpoint(folder).version() == before
    save({"w": torch.ones(3)}, folder)
    assert Checkpoint(folder).version() != before


def test_a_directory_of_an_earlier_version_of_torch() -> None:
    """Two ranks of torch 2.13 saved it under FSDP2, with their optimizer."""
    checkpoint = Checkpoint(GOLDEN)
    assert [path.name for path in checkpoint.files] == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    expected = {
        "bias": torch.tensor([0.5, -1.0, 0.25]).bfloat16(),
        "steps": torch.tensor(7),
        "weight": torch.arange(15.0).reshape(5, 3).bfloat16(),
    }
    assert_holds(checkpoint, expected)
    (note,) = checkpoint.notes
    assert note == f"{GOLDEN}: the 3 tensors under 'model' are taken, 2 other items left"
