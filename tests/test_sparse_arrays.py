"""Deltas as arrays of SciPy and torch: the same entries, values and shapes, and back unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltakit as dk
from deltakit.errors import BaseMismatchError, ConfigError, DeltaError, FormatError
from deltakit.formats.checkpoint import Checkpoint

torch = pytest.importorskip("torch")
sparse = pytest.importorskip("scipy.sparse")


@st.composite
def deltas(draw: st.DrawFn) -> dk.SparseDelta:
    """Deltas of differences, entries of zero among them, of one dtype."""
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float64"]))
    tensors = {}
    for name in draw(st.lists(st.sampled_from("abc"), unique=True, min_size=1)):
        shape = draw(st.sampled_from([(7,), (3, 4), (2, 3, 2), (2, 1, 3, 2)]))
        numel = int(np.prod(shape))
        indices = sorted(draw(st.sets(st.integers(0, numel - 1))))
        numbers = [draw(st.sampled_from([-1.5, 0.0, 0.25, 3.0])) for _ in indices]
        tensors[name] = dk.TensorDelta(
            name=name,
            shape=shape,
            dtype=dtype,
            mode="add",
            indices=np.array(indices, np.int64),
            values=np.array(numbers, np.float64 if dtype == "float64" else np.float32),
        )
    return dk.SparseDelta(tensors=tensors)


def dense(tensor: dk.TensorDelta) -> Any:
    filled = np.zeros(tensor.numel, tensor.values.dtype)
    filled[tensor.indices] = tensor.values
    return filled.reshape(tensor.shape)


@given(delta=deltas())
def test_there_and_back(delta: dk.SparseDelta) -> None:
    dtype = next(iter(delta.tensors.values())).dtype
    for name, array in dk.to_scipy(delta).items():
        assert array.nnz == delta.tensors[name].nnz
        assert np.array_equal(array.toarray(), dense(delta.tensors[name]))
    for name, tensor in dk.to_torch(delta).items():
        assert tensor.is_coalesced()
        assert np.array_equal(tensor.to_dense().numpy(), dense(delta.tensors[name]))
    assert dk.from_scipy(dk.to_scipy(delta), dtypes=dtype).equals(delta)
    assert dk.from_torch(dk.to_torch(delta), dtypes=dtype).equals(delta)


def test_any_layout_of_scipy(checkpoint: Checkpoint) -> None:
    array = sparse.random_array((20, 30), density=0.1, rng=np.random.default_rng(0), dtype="f4")
    layouts = [array.tocsr(), array.tocsc(), array.tolil(), sparse.csr_matrix(array)]
    one, *others = (dk.from_scipy({"w": layout}, base=checkpoint) for layout in layouts)
    assert all(other.equals(one) for other in others)
    assert np.array_equal(dense(one.tensors["w"]), array.toarray())
    assert one.base is not None
    assert list(one.base.tensors) == ["w"]


def test_uncoalesced_but_distinct_entries_are_sorted() -> None:
    tensor = torch.sparse_coo_tensor(
        torch.tensor([[1, 0], [0, 2]]), torch.tensor([1.0, 2.0]), (2, 3), check_invariants=True
    )
    found = dk.from_torch({"w": tensor}).tensors["w"]
    assert (found.indices.tolist(), found.values.tolist()) == ([2, 3], [2.0, 1.0])


def test_what_is_no_delta() -> None:
    twice = sparse.coo_array(([1.0, 2.0], ([0, 0], [1, 1])), shape=(2, 2))
    with pytest.raises(FormatError, match="index 1 stands twice"):
        dk.from_scipy({"w": twice})
    with pytest.raises(DeltaError, match="is not finite"):
        dk.from_scipy({"w": sparse.coo_array(np.array([[np.nan, 1.0]]))})
    with pytest.raises(DeltaError, match="differences of complex128"):
        dk.from_scipy({"w": sparse.coo_array(np.array([[1j]]))})
    with pytest.raises(DeltaError, match=r"is torch.strided with"):
        dk.from_torch({"w": torch.ones(2, 2)})
    scalar = dk.TensorDelta(
        name="s",
        shape=(),
        dtype="float32",
        mode="add",
        indices=np.array([0]),
        values=np.ones(1, np.float32),
    )
    for change in (dk.to_scipy, dk.to_torch):
        with pytest.raises(ConfigError, match=r"dimensions"):
            change(dk.SparseDelta(tensors={"s": scalar}))


def test_another_shape_than_the_base(checkpoint: Checkpoint) -> None:
    with pytest.raises(BaseMismatchError, match=r"has shape \[30, 20\], in .* it has \[20, 30\]"):
        dk.from_scipy({"w": sparse.coo_array((30, 20), dtype=np.float32)}, base=checkpoint)


def test_new_weights_are_differences_with_the_base_beside(
    delta_file: Path, checkpoint: Checkpoint
) -> None:
    delta = dk.load(delta_file)
    kept = dk.to_torch(dk.rebase(delta, checkpoint, "set"))
    for name, tensor in dk.to_torch(delta).items():
        assert torch.allclose(kept[name].to_dense(), tensor.to_dense(), atol=1e-6)
    with pytest.raises(DeltaError, match="in set mode without base values"):
        dk.to_torch(dk.rebase(delta, checkpoint, "set", keep_base=False))


def test_patches_for_vllm_give_the_merged_weights(
    delta_file: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Applied as vLLM applies them: into a tensor of NaN, which stands for unchanged weights."""
    from safetensors.torch import load_file

    delta = dk.load(delta_file)
    with pytest.raises(ConfigError, match="holds differences, vLLM new weights; give the base"):
        dk.to_vllm(delta)
    dk.merge(checkpoint.path, [delta_file], tmp_path / "merged.safetensors")
    before, after = load_file(checkpoint.path), load_file(tmp_path / "merged.safetensors")
    for patch in dk.to_vllm(delta, checkpoint):
        name, shape, dtype, values, indices = patch
        flat = torch.full((before[name].numel(),), float("nan"), dtype=dtype)
        flat.index_copy_(0, indices.long(), values)
        staged = flat.view(shape)
        applied = torch.where(torch.isnan(staged), before[name], staged)
        assert torch.equal(applied, after[name])
        assert (indices.dtype, values.dtype) == (torch.int32, dtype)
