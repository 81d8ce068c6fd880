"""Laws of the Triton kernels. With TRITON_INTERPRET=1 Triton's interpreter runs them on the CPU;
`test_kernels.py` does so, and `test_gpu.py` runs the same laws on a device.

The interpreter works program by program and wants no device; what it shows is that the kernels
compute what torch does, not that they are quick.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakit.kernels.at_least import BLOCK, at_least
from deltakit.kernels.batched_rows import Packed
from deltakit.kernels.lookup import lookup
from deltakit.kernels.product import product
from deltakit.kernels.turn import LINE, turned
from deltakit.kernels.write_through import write_through

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
quick = settings(max_examples=6, deadline=None)


def _sparse(rows: int, columns: int, density: float) -> tuple[torch.Tensor, ...]:
    """A mask [rows, columns] with empty rows, and its compressed sparse row form."""
    mask = torch.rand(rows, columns) < density
    mask[torch.rand(rows) < 0.3] = False
    mask[-1, -1] = True
    starts = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()
    return mask.to(DEVICE), starts.to(DEVICE), mask.nonzero()[:, 1].int().to(DEVICE)


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 2e-5


@quick
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 300),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    density=st.sampled_from([0.002, 0.05, 0.6]),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
)
def test_product_equals_the_dense_one(
    seed: int,
    tokens: int,
    shape: tuple[int, int],
    density: float,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    torch.manual_seed(seed)
    mask, starts, columns = _sparse(*shape, density)
    left, right = (
        torch.randn(tokens, n, dtype=torch.float64).to(DEVICE, dtype)
        for n, dtype in zip(shape, dtypes, strict=True)
    )
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    found = product(left, right, starts, columns, wide)
    assert found.dtype == wide
    exact = (left.double().t() @ right.double())[mask]
    scale = tokens**0.5
    torch.testing.assert_close(found.double() / scale, exact / scale, rtol=0, atol=_tolerance(wide))
    again = product(left, right, starts, columns, wide)
    assert torch.equal(found, again)


def test_product_reads_any_strides_and_shares_tokens_out() -> None:
    """An expanded gradient, a slice of a wider activation, and more tokens than one share."""
    torch.manual_seed(0)
    mask, starts, columns = _sparse(33, 20, 0.1)
    left = torch.randn(1, 33, device=DEVICE).expand(3000, 33)
    right = torch.randn(3000, 50, device=DEVICE)[:, 7:47:2]
    found = product(left, right, starts, columns, torch.float32)
    exact = (left.double().t() @ right.double())[mask]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-3)


def test_product_of_nothing_is_zero() -> None:
    starts, columns = torch.tensor([0, 0, 2]).int().to(DEVICE), torch.tensor([0, 2]).int()
    none = torch.zeros(0, 2, device=DEVICE), torch.zeros(0, 3, device=DEVICE)
    assert product(*none, starts, columns.to(DEVICE), torch.float32).tolist() == [0, 0]
    some = torch.ones(4, 2, device=DEVICE), torch.ones(4, 3, device=DEVICE)
    assert len(product(*some, starts * 0, columns[:0].to(DEVICE), torch.float32)) == 0


def test_infinities_reach_only_their_own_entries() -> None:
    left, right = torch.ones(3, 2, device=DEVICE), torch.ones(3, 2, device=DEVICE)
    right[1, 0] = float("nan")
    starts, columns = torch.tensor([0, 2, 2]).int(), torch.tensor([0, 1]).int()
    found = product(left, right, starts.to(DEVICE), columns.to(DEVICE), torch.float32)
    assert found.isnan().tolist() == [True, False] and found[1] == 3


@quick
@given(
    shape=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    dtype=st.sampled_from(FLOATS),
)
def test_turned_is_the_transpose(shape: tuple[int, int], dtype: torch.dtype) -> None:
    wide = torch.randn(shape[0], 2 * shape[1], device=DEVICE).to(dtype)
    for matrix in (wide[:, ::2], wide[:, : shape[1]], wide[:1].expand(shape[0], -1)):
        found = turned(matrix)
        assert torch.equal(found[:, : shape[0]], matrix.t())
        assert found.is_contiguous() and not found.shape[1] % LINE
        assert not found[:, shape[0] :].any()


@quick
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 60),
    tokens=st.integers(0, 300),
    dtype=st.sampled_from(FLOATS),
    padding=st.sampled_from([-1, 0]),
)
def test_lookup_equals_the_embedding_gradient(
    seed: int, rows: int, tokens: int, dtype: torch.dtype, padding: int
) -> None:
    """Words that come again and again, words that never come, and the padding."""
    torch.manual_seed(seed)
    mask, starts, columns = _sparse(rows, 17, 0.3)
    ids = (torch.rand(tokens) ** 3 * rows).long().to(DEVICE)
    gradient = torch.randn(tokens, 17, device=DEVICE).to(dtype)
    dense = torch.zeros(rows, 17, dtype=torch.float64, device=DEVICE)
    kept = ids != padding
    dense.index_put_((ids[kept],), gradient[kept].double(), accumulate=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = lookup(ids, gradient, starts, columns, padding, wide)
    torch.testing.assert_close(found.double(), dense[mask], rtol=1e-5, atol=1e-4)
    assert torch.equal(found, lookup(ids, gradient, starts, columns, padding, wide))


EDGES = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    1e-40,
    3.3895314e38,
    -3.4e38,
    65504.0,
    65520.0,
    1.0,
    float("inf"),
]


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's, who interprets
@pytest.mark.parametrize("dtype", FLOATS)
def test_write_through_has_the_bits_of_merging(dtype: torch.dtype) -> None:
    """Ties, subnormal numbers, overflows and zeros of either sign; weights beside stay."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bits = torch.randint(0, 2**16, (4000,)).to(torch.uint16).view(torch.bfloat16)
    base = bits[bits.isfinite()].to(wide)
    edges = torch.tensor(EDGES, dtype=wide)
    values = torch.cat([torch.randn(len(base), dtype=wide) * base.abs() / 100, edges])
    base = torch.cat([base, edges.flip(0)])
    # Exactly halfway between two bfloat16 numbers, whose last bits are even and odd.
    base = torch.cat([base, torch.tensor([1.0, 1.0078125], dtype=wide)])
    values = torch.cat([values, torch.tensor([2.0**-8, 2.0**-8], dtype=wide)])
    count, size = len(base), 20_000
    weight = torch.randn(size, dtype=wide).to(dtype).to(DEVICE)
    indices, slots = torch.randperm(size)[:count].to(DEVICE), torch.randperm(count).to(DEVICE)
    base, values = base.to(DEVICE), values.to(DEVICE)
    expected = weight.clone()
    expected.index_copy_(0, indices, (base + (values + 0.0))[slots].to(dtype))
    write_through(weight, indices, slots, base, values)
    assert _bits(weight) == _bits(expected)
    write_through(weight, indices[:0], slots[:0], base, values)
    assert _bits(weight) == _bits(expected)


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.cpu().view(torch.uint8).numpy())


@quick
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5000]),
    bound=st.sampled_from([0.0, 1.401298464324817e-45, 0.1, 2.5, 1e9, float("inf")]),
)
def test_at_least_is_a_mask_in_order(seed: int, size: int, bound: float) -> None:
    torch.manual_seed(seed)
    values = torch.randn(size)
    values[torch.rand(size) < 0.2] = 0.0
    values[torch.rand(size) < 0.1] = -1e-45
    values[torch.rand(size) < 0.1] = 0.1  # the bound itself, as float32 has it
    values[torch.rand(size) < 0.01] = float("nan")
    values = values.to(DEVICE)
    indices, found = at_least(values, bound)
    expected = (values.abs() >= bound).nonzero().view(-1)
    assert torch.equal(indices, expected) and _bits(found) == _bits(values[expected])


@quick
@given(
    seed=st.integers(0, 2**31),
    features=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    tokens=st.integers(1, 20),
    dtype=st.sampled_from(FLOATS),
)
def test_batched_rows_equal_their_own_products(
    seed: int, features: tuple[int, int], tokens: int, dtype: torch.dtype
) -> None:
    """Tasks with few entries, with many and with none; rows of the base; whatever the batch."""
    torch.manual_seed(seed)
    matrices = {task: torch.randn(features) for task in (1, 2, 4)}
    entries = {}
    for (task, matrix), density in zip(matrices.items(), (0.02, 0.9, 0.2), strict=True):
        matrix[torch.rand(features) >= density] = 0
        matrix[0, 0] = 1.0
        out, column = matrix.nonzero().unbind(1)
        mixed = torch.randperm(len(out))  # in any order
        parts = (out[mixed], column[mixed], matrix[out, column][mixed])
        entries[task] = tuple(part.to(DEVICE) for part in parts)
    packed = Packed.of(entries, 4)
    numbers = [2, 0, 1, 1, 3, 4]
    tasks = torch.tensor(numbers, device=DEVICE)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(len(tasks), tokens, features[1], device=DEVICE).to(dtype)
    before = torch.randn(len(tasks), tokens, features[0], device=DEVICE, dtype=wide)
    y = before.clone()
    packed.add(tasks, x, y)
    for row, task in enumerate(numbers):
        matrix = matrices.get(task, torch.zeros(features)).double().to(DEVICE)
        expected = before[row].double() + x[row].double() @ matrix.t()
        torch.testing.assert_close(y[row].double(), expected, rtol=1e-5, atol=1e-4)
        alone = before[row : row + 1].clone()
        packed.add(tasks[row : row + 1], x[row : row + 1], alone)
        assert torch.equal(alone[0], y[row])


@pytest.mark.skipif(DEVICE != "cpu", reason="a sparse file stands in for the memory")
def test_offsets_go_beyond_32_bits(tmp_path: Path) -> None:
    """Flat places, and products of a feature and its stride, that no int32 holds."""
    size = 2**31 + 64
    weight = torch.from_numpy(np.memmap(tmp_path / "weight", np.float16, "w+", shape=(size,)))
    base, values = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5])
    write_through(weight, torch.tensor([size - 1, 5]), torch.tensor([0, 1]), base, values)
    assert weight[[size - 1, 5, size - 2**31 - 1]].tolist() == [1.5, 2.5, 0.0]
    far = weight.as_strided((2, 4), (1, 2**31 // 3))
    far.copy_(torch.arange(8.0).view(2, 4))
    assert torch.equal(turned(far)[:, :2], far.t())
    ones = torch.ones(2, 5)
    starts, column = torch.tensor([0, 0, 0, 0, 1]).int(), torch.tensor([2]).int()
    assert product(far, ones, starts, column, torch.float32).tolist() == [3 + 7]
    assert product(far.t(), far.t(), torch.tensor([0, 0, 1]).int(), column * 0, torch.float32) == 38
