"""What figures show is what the delta holds: every entry counted once, whatever its tensor is."""

from __future__ import annotations

from math import inf, nan, prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakit.changes import Changes
from deltakit.delta import TensorDelta
from deltakit.dtypes import Array
from deltakit.views.grid import layer_grid, place_of
from deltakit.views.histogram import Histogram
from deltakit.views.occupancy import occupancy

FLOATS = st.floats(width=64, allow_nan=True, allow_infinity=True)
SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)


def tensor(
    shape: tuple[int, ...], indices: list[int], values: list[float] | Array, name: str = "w"
) -> TensorDelta:
    """An add tensor of float64."""
    return TensorDelta(
        name=name, shape=shape, dtype="float64", mode="add", indices=indices, values=values
    )


def replaced(before: Array, after: Array, keep_base: bool = True) -> TensorDelta:
    """A set tensor that takes every weight of [n] from one value to another."""
    return TensorDelta(
        name="w",
        shape=before.shape,
        dtype="float64",
        mode="set",
        indices=np.arange(before.size),
        values=after,
        base_values=before if keep_base else None,
    )


@st.composite
def tensors(draw: st.DrawFn) -> TensorDelta:
    """Any shape, empty ones among them, and any support of it."""
    shape = draw(SHAPES)
    chosen = sorted(draw(st.sets(st.integers(0, prod(shape) - 1)))) if prod(shape) else []
    finite = st.floats(allow_nan=False, allow_infinity=False)
    values = draw(st.lists(finite, min_size=len(chosen), max_size=len(chosen)))
    return tensor(shape, chosen, values)


@given(tensors(), st.integers(1, 12))
def test_occupancy_counts_the_dense_tensor(given_one: TensorDelta, bins: int) -> None:
    """Rows, columns and cells are sums over slices of a mask that share no row and no column."""
    found = occupancy(given_one, bins)
    mask = np.zeros(given_one.numel, np.int64)
    mask[given_one.indices] = 1
    mask = mask.reshape(found.shape)
    tall, wide = found.rows_per_bin, found.columns_per_bin
    rows = [mask[at : at + tall] for at in range(0, mask.shape[0], tall)]
    assert found.rows.tolist() == [part.sum() for part in rows]
    columns = [mask[:, at : at + wide] for at in range(0, mask.shape[1], wide)]
    assert found.columns.tolist() == [part.sum() for part in columns]
    for at, part in enumerate(rows):
        cells = [part[:, start : start + wide].sum() for start in range(0, mask.shape[1], wide)]
        assert found.cells[at].tolist() == cells
    assert max(found.cells.shape) <= bins
    assert found.cells.sum() == found.rows.sum() == found.columns.sum() == given_one.nnz


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((), (1, 1)), ((7,), (1, 7)), ((7, 3), (7, 3)), ((7, 3, 2), (7, 6)), ((0, 3), (0, 3))],
)
def test_every_shape_is_a_matrix(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert occupancy(tensor(shape, [], []), 4).shape == matrix


def test_tensors_far_beyond_memory_are_counted() -> None:
    """The largest index that there is falls into the last cell."""
    found = occupancy(tensor((2**31, 2**31), [0, 2**62 - 1], [1.0, 2.0]), 8)
    assert found.cells[0, 0] == found.cells[7, 7] == 1
    assert found.rows.tolist() == found.columns.tolist() == [1, 0, 0, 0, 0, 0, 0, 1]


def naive(histogram: Histogram, changes: list[float]) -> tuple[list[int], list[int]]:
    """Positive and negative changes per bin, by looking for the bin of each."""
    edges = histogram.edges
    counts = [[0] * histogram.bins, [0] * histogram.bins]
    for change in changes:
        if np.isfinite(change) and change:
            held = [at for at in range(histogram.bins) if edges[at] <= abs(change) < edges[at + 1]]
            if abs(change) == edges[-1]:  # the largest float64 belongs to the last bin
                held.append(histogram.bins - 1)
            assert len(held) == 1
            counts[change < 0][held[0]] += 1
    return counts[0], counts[1]


@given(st.lists(FLOATS, max_size=30), st.integers(2, 20))
def test_histogram_finds_the_bin_of_every_change(changes: list[float], bins: int) -> None:
    """Of any 64-bit float, subnormal, infinite or NaN, in the finest bins and in coarse ones."""
    after = np.array(changes, np.float64)
    finest = Histogram.of(replaced(np.zeros_like(after), after))
    assert (np.diff(finest.edges) >= 0).all()
    coarse = finest.coarsened(bins)
    assert coarse.bins <= bins
    for found in (coarse, finest) if finest.bins < 500 else (coarse,):
        assert (found.positive.tolist(), found.negative.tolist()) == naive(found, changes)
        assert found.zeros == sum(change == 0 for change in changes)
        assert found.non_finite == int((~np.isfinite(after)).sum())
        assert found.entries == len(changes)
        assert not found.bins or (found.counts[0] and found.counts[-1])


@given(st.lists(st.lists(FLOATS, max_size=8), max_size=5), st.integers(2, 9))
def test_histograms_add_up_to_that_of_everything(parts: list[list[float]], bins: int) -> None:
    """Combining the parts gives the whole, also when the parts are coarse."""

    def histogram(changes: list[float]) -> Histogram:
        return Histogram.of(replaced(np.zeros(len(changes)), np.array(changes, np.float64)))

    whole = histogram([change for part in parts for change in part])
    together = Histogram.combined(map(histogram, parts))
    assert together.as_dict() == whole.as_dict()
    rough = Histogram.combined(histogram(part).coarsened(bins) for part in parts)
    assert rough.as_dict() == whole.widened(rough.step).as_dict()


def test_changes_of_set_mode_are_against_the_base() -> None:
    before = np.array([1.0, 1.0, 1.0, inf, 1.0])
    after = np.array([1.5, 0.5, 1.0, inf, nan])
    found = Histogram.of(replaced(before, after))
    assert (found.positive.sum(), found.negative.sum()) == (1, 1)
    assert (found.zeros, found.non_finite, found.unknown) == (1, 2, 0)
    unknown = Histogram.of(replaced(before, after, keep_base=False))
    assert (unknown.bins, unknown.unknown, unknown.entries) == (0, 5, 5)
    assert len(unknown.edges) == 1


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("encoder.layer.3.output.dense.weight", ("encoder.layer.3", "output.dense.weight")),
        ("h.0.mlp.experts.7.w1", ("h.0", "mlp.experts.*.w1")),
        ("bert.embeddings.word.weight", ("bert.embeddings.word", "weight")),
        ("weight", ("weight", "weight")),
        ("scales.4", ("scales.4", "*")),
    ],
)
def test_names_tell_their_place(name: str, place: tuple[str, str]) -> None:
    assert place_of(name) == place


PARTS = st.sampled_from(["a", "b", "weight", "0", "1", "2", "10", ""])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@given(st.lists(NAMES, unique=True, max_size=12))
def test_grid_holds_every_tensor_once(names: list[str]) -> None:
    """And its cells add up to the delta, with density and mean of the tensors in them."""
    given_ones = {
        name: tensor((4, 5), list(range(at)), np.full(at, 2.0**at), name)
        for at, name in enumerate(names)
    }
    known = {name: Changes.of(one) for name, one in given_ones.items()}
    grid = layer_grid(given_ones.values(), known)
    assert sorted(n for row in grid.names for cell in row for n in cell) == sorted(names)
    assert grid.entries.sum() == sum(one.nnz for one in given_ones.values())
    assert grid.density.shape == grid.mean_change.shape == (len(grid.rows), len(grid.columns))
    for at, row in enumerate(grid.names):
        for column, cell in enumerate(row):
            held = [given_ones[name] for name in cell]
            values = np.concatenate([one.values for one in held] or [[]])
            assert grid.entries[at, column] == values.size
            density = values.size / (20 * len(held)) if held else nan
            assert grid.density[at, column] == pytest.approx(density, nan_ok=True)
            mean = values.mean() if values.size else nan
            assert grid.mean_change[at, column] == pytest.approx(mean, nan_ok=True)


def test_layers_stand_in_natural_order_and_unknown_is_nan() -> None:
    names = ["h.10.up.weight", "h.2.up.weight", "h.2.down.weight", "embed.weight"]
    grid = layer_grid([tensor((0, 4), [], [], name) for name in names])
    assert grid.rows == ("embed", "h.2", "h.10")
    assert grid.columns == ("down.weight", "up.weight", "weight")
    assert grid.names[2] == ((), ("h.10.up.weight",), ())
    assert np.isnan(grid.mean_change).all()
    assert np.isnan(grid.density[2, 0])
    assert grid.density[2, 1] == 0.0  # a tensor without elements
