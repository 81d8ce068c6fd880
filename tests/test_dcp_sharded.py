"""Checkpoints that several ranks saved, FSDP2's among them, are read in checkpoint coordinates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dcp_lab import bits
from dcp_runs import Model, save_all, tensors
from parallel_lab import together
from safetensors.torch import save_file

import deltakit as dk
from deltakit.formats.checkpoint import Checkpoint


def assert_reads(checkpoint: Checkpoint, name: str, expected: torch.Tensor) -> None:
    """All ways of reading give the tensor's bits at its row-major indices."""
    info = checkpoint.info(name)
    assert (info.shape, info.dtype) == (tuple(expected.shape), str(expected.dtype)[6:])
    words = checkpoint.words(name)
    assert words.tobytes() == checkpoint.read(name).tobytes() == bits(expected)
    indices = np.random.default_rng(0).permutation(info.numel)
    assert (checkpoint.gather(name, indices) == words[indices]).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder in which two ranks have saved, and the weights that they trained for 3 steps."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, together(2, folder / "meeting", save_all, str(folder), 3)[0]


def test_rows_columns_and_copies_of_two_ranks(run: tuple[Path, dict[str, torch.Tensor]]) -> None:
    checkpoint = Checkpoint(run[0] / "placed")
    expected = {"scalar": torch.tensor(2.5)}
    for name, tensor in tensors().items():
        expected |= {f"{name} by rows": tensor, f"{name} on all": tensor}
        expected |= {f"{name} by columns": tensor} if tensor.dim() > 1 else {}
    assert checkpoint.names == sorted(expected)
    for name, tensor in expected.items():
        assert_reads(checkpoint, name, tensor)


def test_what_fsdp2_trained_becomes_a_delta(
    run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """The base is a safetensors file, the tuned side what two ranks saved with their optimizer; the
    delta leads from one to the other, and from the first saved step as well."""
    saved, trained = run
    base = {name: tensor.clone() for name, tensor in Model().bfloat16().state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")

    tuned = Checkpoint(saved / "step-3")
    assert tuned.names == sorted(trained)
    for name, tensor in trained.items():
        assert_reads(tuned, name, tensor)
    (note,) = tuned.notes
    assert "tensors under 'model' are taken" in note

    delta = dk.diff(tmp_path / "base.safetensors", saved / "step-3")
    changed = sum(int((trained[n] != base[n]).sum()) for n in base)
    assert sum(tensor.nnz for tensor in delta.tensors.values()) == changed > 0
    dk.merge(tmp_path / "base.safetensors", delta, tmp_path / "a.safetensors")
    dk.merge(saved / "step-0", delta, tmp_path / "b.safetensors")
    for merged in (Checkpoint(tmp_path / "a.safetensors"), Checkpoint(tmp_path / "b.safetensors")):
        for name, tensor in trained.items():
            assert merged.read(name).tobytes() == bits(tensor)
    assert dk.diff(saved / "step-0", saved / "step-3").equals(
        dk.diff(tmp_path / "base.safetensors", saved / "step-3")
    )
