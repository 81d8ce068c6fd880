"""Every stacking method: numbers worked by hand, and equality with naive dense forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stack_reference import CASES, DENSE, dense, reference, sparse

from deltakit.combine import METHODS
from deltakit.combine.drop import draws
from deltakit.combine.method import make_method
from deltakit.delta import BaseIdentity, SparseDelta
from deltakit.errors import ConfigError, DeltaError
from deltakit.stacking import stack

NO = float("nan")  # no entry
#    entry   0   1   2   3   4   5
A = [4.0, -1.0, 2.0, 1.0, NO, NO]
B = [-2.0, -3.0, NO, 1.0, 8.0, NO]
C = [1.0, NO, -2.0, NO, NO, 0.5]
D = [NO, NO, NO, NO, 8.0, NO]
W = [1.0, 0.5, 2.0]
# seed 0, tensor "w": the numbers drawn for the first entries of the deltas A and B
DRAWN_A = [0.43023747, 0.43431480, 0.13415838, 0.37943583]
DRAWN_B = [0.45184324, 0.53349398, 0.09345270, 0.30094906]

# method -> options, deltas, weights, and the entries that come out
ORACLES: dict[str, list[tuple[dict[str, Any], list[Any], list[float], dict[int, float]]]] = {
    "linear": [
        ({}, [A, B, C], W, {
            0: 1 * 4 + 0.5 * -2 + 2 * 1,
            1: 1 * -1 + 0.5 * -3,
            2: 1 * 2 + 2 * -2,
            3: 1 * 1 + 0.5 * 1,
            4: 0.5 * 8,
            5: 2 * 0.5,
        }),
        # zeros stay: 3 is 1 - 1
        ({}, [A, B], [1, -1], {0: 4 + 2, 1: -1 + 3, 2: 2, 3: 0, 4: -8}),
        ({"normalize": True}, [A, B], [3, 1], {0: 2.5, 1: -1.5, 2: 1.5, 3: 1, 4: 2}),
    ],
    "task-arithmetic": [
        # unlearning B: 3 is 1 - 1 and goes
        ({}, [A, B], [1, -1], {0: 4 + 2, 1: -1 + 3, 2: 2, 4: -8}),
        ({"scale": 0.5}, [A, B], [1, 1], {0: 1, 1: -2, 2: 1, 3: 1, 4: 4}),
        # divided by the weights of both, whether they have the entry or not
        ({"normalize": True}, [A, B], [3, 1], {
            0: (12 - 2) / 4, 1: (-3 - 3) / 4, 2: 6 / 4, 3: (3 + 1) / 4, 4: 8 / 4,
        }),
    ],
    "ties": [
        # half of 4, 4 and 3 entries stay: A 4 2, B -3 8, C -2. Entry 2 has 2 - 2 = 0 and goes by
        # the majority of the other signs + - +.
        ({"density": 0.5}, [A, B, C], W, {0: 4, 1: -3, 2: 2, 4: 8}),
        # 0: 4 - 2 + 1 > 0, so A and C agree; 1: A and B; 2: a tie, and more signs are +
        ({"density": 1}, [A, B, C], W, {
            0: (1 * 4 + 2 * 1) / (1 + 2),
            1: (1 * -1 + 0.5 * -3) / (1 + 0.5),
            2: 2,
            3: (1 * 1 + 0.5 * 1) / (1 + 0.5),
            4: 8,
            5: 0.5,
        }),
        # mergekit votes by weighted values: 2 is 2 - 4 < 0, so C has it
        ({"density": 1, "flavour": "mergekit"}, [A, B, C], W, {
            0: (1 * 4 + 2 * 1) / (1 + 2), 1: (-1 - 1.5) / 1.5, 2: -2, 3: 1, 4: 8, 5: 0.5,
        }),
        # peft votes unweighted, ties are +, and it divides by how many agree
        ({"density": 1, "flavour": "peft"}, [A, B, C], W, {
            0: (4 + 2) / 2, 1: (-1 - 1.5) / 2, 2: 2 / 1, 3: (1 + 0.5) / 2, 4: 4 / 1, 5: 1 / 1,
        }),
        # a negative weight does not turn a vote of the paper's, but it does turn mergekit's
        ({"density": 1}, [A, B], [1, -1], {0: 4, 1: (-1 + 3) / 1, 2: 2, 3: (1 - 1) / 1, 4: 8}),
        ({"density": 1, "flavour": "mergekit"}, [A, B], [1, -1], {
            0: (4 + 2) / 1, 1: 3 / -1, 2: 2, 3: 1, 4: -8 / -1,
        }),
    ],
    "magnitude": [
        # as for ties: A keeps 4 2, B -3 8, C -2
        ({"density": 0.5}, [A, B, C], W, {0: 4, 1: 0.5 * -3, 2: 2 + 2 * -2, 4: 0.5 * 8}),
        # a share of 6 elements: 3 of each; equal ones by the lower index (A's entry 1 before 3)
        ({"density": 0.5, "density_of": "numel", "trim_scope": "tensor"}, [A, B, C], W, {
            0: 4 - 1 + 2, 1: -1 - 1.5, 2: 2 - 4, 4: 4, 5: 1,
        }),
    ],
    "dare": [
        # DRAWN_A < 0.4 for entries 2 and 3, DRAWN_B for its third and fourth, 3 and 4
        ({"density": 0.4}, [A, B], [1, 1], {2: 2 / 0.4, 3: 1 / 0.4 + 1 / 0.4, 4: 8 / 0.4}),
        ({"density": 0.4, "rescale": "none"}, [A, B], [1, -1], {2: 2, 4: -8}),
        # by the sum of magnitudes: A 8 / 3, B 14 / 9
        ({"density": 0.4, "flavour": "mergekit"}, [A, B], [1, 1], {
            2: 2 * 8 / 3, 3: 1 * 8 / 3 + 1 * 14 / 9, 4: 8 * 14 / 9,
        }),
    ],
    "dare-ties": [
        ({"density": 0.4}, [A, B], [1, 3], {
            2: 2 / 0.4, 3: (1 / 0.4 + 3 / 0.4) / (1 + 3), 4: 8 / 0.4,
        }),
        ({"density": 0.4, "combine": "sum"}, [A, B], [1, 3], {
            2: 2 / 0.4, 3: 1 / 0.4 + 3 / 0.4, 4: 3 * 8 / 0.4,
        }),
    ],
    "della-linear": [
        # |A| = 4 1 2 1 has ranks 3 1 2 0 (the lower of equal indices is better): chances
        # 0.2 + rank / 3 * 0.6 = 0.8 0.4 0.6 0.2, drawn 0.43 0.434 0.13 0.38: entries 0 and 2 stay
        ({"density": 0.5, "epsilon": 0.3}, [A], [1], {0: 4 / 0.8, 2: 2 / 0.6}),
        # among 6 elements, two of them 0, ranks are 5 3 4 2: 0.2 + rank / 5 * 0.6
        ({"density": 0.5, "epsilon": 0.3, "density_of": "numel"}, [A], [2], {
            0: 2 * 4 / 0.8, 1: 2 * -1 / 0.56, 2: 2 * 2 / 0.68, 3: 2 * 1 / 0.44,
        }),
    ],
    "della": [
        # B = -2 -3 1 8 has ranks 1 2 0 3: chances 0.4 0.6 0.2 0.8, drawn 0.45 0.53 0.09 0.30: all
        # but the first stay; 1 and 4 have one vote each, as have 0 and 2 of A; 3 too
        ({"density": 0.5, "epsilon": 0.3}, [A, B], [1, 1], {
            0: 4 / 0.8, 1: -3 / 0.6, 2: 2 / 0.6, 3: 1 / 0.2, 4: 8 / 0.8,
        }),
    ],
    "breadcrumbs": [
        # of 4: the largest goes, two follow: A 2 and the first 1, B -3 -2; of 3: C none, then -2
        ({"density": 0.5, "gamma": 0.25}, [A, B, C], [1, 1, 1], {0: -2, 1: -1 - 3}),
        # of 6 elements 1 goes and 3 follow: A 2 -1 1, B -3 -2 1, C 1 0.5
        ({"density": 0.5, "gamma": 0.25, "flavour": "mergekit"}, [A, B, C], [1, 1, 1], {
            0: -2 + 1, 1: -1 - 3, 2: 2, 3: 1 + 1, 5: 0.5,
        }),
    ],
    "breadcrumbs-ties": [
        ({"density": 0.5, "gamma": 0.25}, [A, B, C], [1, 1, 1], {0: -2, 1: (-1 - 3) / 2, 2: -2}),
    ],
    "sce": [
        # variances * 9: 0: 3 * 21 - 9 = 54, 1: 3 * 10 - 16 = 14, 2: 3 * 8 = 24, 3: 3 * 2 - 4 = 2,
        # 4: 3 * 64 - 64 = 128, 5: 0.75 - 0.25 = 0.5: the upper half is 4, 0, 2. Energies there:
        # A 16 + 4, B 4 + 64, C 1 + 4. Entry 0 is +, so A and C agree; 2 sums to 0, which is +.
        ({"density": 0.5}, [A, B, C], [1, 1, 1], {0: (20 * 4 + 5 * 1) / (20 + 5), 2: 2, 4: 8}),
        # energies 22, 78 and 5.25
        ({"density": 1}, [A, B, C], [1, 1, 1], {
            0: (22 * 4 + 5.25) / 27.25, 1: (22 * -1 + 78 * -3) / 100, 2: 2, 3: 1, 4: 8, 5: 0.5,
        }),
    ],
    "ram": [
        ({}, [A, B, C], [1, 1, 1], {0: (4 - 2 + 1) / 3, 1: -2, 3: 1, 4: 8, 5: 0.5}),
        ({"threshold": 1.5}, [A, B, C], [1, 1, 1], {0: (4 - 2) / 2, 1: -3, 4: 8}),
    ],
    "ram-plus": [
        # B shares 0, 1, 3 and owns 4: 3 / 1; C shares 0, 2 and owns 5: 2 / 1; both above the bound
        ({}, [A, B, C], [1, 1, 1], {
            0: 1, 1: -2, 3: 1, 4: 8 * (1 + 0.1 * 0.2), 5: 0.5 * (1 + 0.1 * 0.2),
        }),
        ({"bound": 10}, [A, B, C], [1, 1, 1], {
            0: 1, 1: -2, 3: 1, 4: 8 * (1 + 0.1 * 3), 5: 0.5 * (1 + 0.1 * 2),
        }),
    ],
    "consensus": [
        # + - + elects +: two agree; one vote each at 2 (a tie), 4 and 5 is not enough
        ({}, [A, B, C], [1, 1, 1], {0: (4 + 1) / 2, 1: -2, 3: 1}),
        ({"votes": 1}, [A, B, C], [1, 1, 1], {0: 2.5, 1: -2, 2: 2, 3: 1, 4: 8, 5: 0.5}),
        # one delta has one vote, whatever its weight or magnitude
        ({}, [A, B, B], [1, 1, 1], {0: -2, 1: -7 / 3, 3: 1, 4: 8}),
    ],
    "tall-masks": [
        # 0: sum 3; 4 >= |3 - 4| / 2, 1 >= |3 - 1| / 2, but 2 < |3 + 2| / 2: two votes.
        # 1: sum -4; 3 >= 1 / 2 but 1 < 3 / 2. 2: sum 0. 3: both. 4 and 5 matter to one delta.
        ({"threshold": 0.5}, [A, B, C], [1, 1, 1], {0: 3, 3: 2}),
        ({"threshold": 0.5, "votes": 3}, [A, B, C], [1, 1, 1], {}),
    ],
    "max-magnitude": [
        ({}, [A, B, C], [1, 1, 1], {0: 4, 1: -3, 2: 2, 3: 1, 4: 8, 5: 0.5}),
        ({}, [A, B, C], W, {0: 4, 1: -1.5, 2: -4, 3: 1, 4: 4, 5: 1}),
    ],
    "disjoint": [
        ({}, [A, D], [1, 0.5], {0: 4, 1: -1, 2: 2, 3: 1, 4: 0.5 * 8}),
        ({"collisions": "first"}, [A, B, C], W, {0: 4, 1: -1, 2: 2, 3: 1, 4: 4, 5: 1}),
        ({"collisions": "last"}, [A, B, C], W, {0: 2, 1: -1.5, 2: -4, 3: 0.5, 4: 4, 5: 1}),
    ],
}  # fmt: skip


def test_every_method_has_its_oracles_and_a_naive_form() -> None:
    assert sorted(ORACLES) == sorted(DENSE) == sorted(METHODS.names())


@pytest.mark.parametrize(
    ("name", "options", "values", "weights", "expected"),
    [(name, *case) for name, cases in ORACLES.items() for case in cases],
)
def test_numbers_worked_by_hand(
    name: str,
    options: dict[str, Any],
    values: list[list[float]],
    weights: list[float],
    expected: dict[int, float],
) -> None:
    tensor = stack([sparse({"w": v}) for v in values], name, weights, **options).tensors.get("w")
    found = {} if tensor is None else dict(zip(tensor.indices, tensor.values, strict=True))
    keep = {i for i, v in expected.items() if v or name in ("linear", "disjoint")}
    assert set(found) == keep
    assert [found[i] for i in keep] == pytest.approx([expected[i] for i in keep], rel=1e-6)


def test_draws_are_these_on_every_platform() -> None:
    assert draws(0, "w", 4, 0) == pytest.approx(DRAWN_A, abs=1e-8)
    assert draws(0, "w", 4, 1) == pytest.approx(DRAWN_B, abs=1e-8)
    assert draws(1, "w", 1, 0)[0] == 0.6935649869249423


SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 4), "b": (5,), "c": ()}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "density": st.sampled_from([0.1, 0.29, 0.5, 0.75, 1.0]),
    "epsilon": st.just(0.0) | st.sampled_from([0.1]),
    "gamma": st.sampled_from([0.0, 0.01, 0.2, 0.9]),
    "seed": st.integers(0, 3),
    "scale": st.sampled_from([1.0, 0.3, -2.0]),
    "threshold": st.sampled_from([0.25, 1.0]),
    "bound": st.sampled_from([0.2, 5.0]),
    "sign_by": st.sampled_from(["total", "frequency"]),
    "elect": st.sampled_from(["weighted", "unweighted"]),
    "tie": st.sampled_from(["majority", "positive"]),
    "combine": st.sampled_from(["mean", "count", "sum"]),
    "rescale": st.sampled_from(["inverse", "l1", "none"]),
    "density_of": st.sampled_from(["entries", "numel"]),
    "trim_scope": st.sampled_from(["global", "tensor"]),
    "count_scope": st.sampled_from(["global", "tensor"]),
    "normalize": st.booleans(),
    "votes": st.just(1),
    "least": st.integers(0, 2),
}
DYADIC = ("sce",)  # ranks by variance, which only exact products keep exact


def some_deltas(rng: np.random.Generator, apart: bool) -> list[SparseDelta]:
    """One to four deltas on three tensors, with absent entries and zeros.

    Sums, squares and variances of the values are exact, so no order of summing can hide a mistake;
    few distinct values in every other draw make ties the rule.
    """
    count = int(rng.integers(1, 5))
    rows = (
        rng.integers(-99, 100, (count, SIZE)) / 8
        if rng.random() < 0.5
        else rng.integers(-2, 3, (count, SIZE)) * 1.0
    )
    rows[rng.random(rows.shape) < rng.choice([0.0, 0.4, 0.8])] = NO
    if apart:
        rows[rng.integers(0, count, SIZE) != np.arange(count)[:, None]] = NO
    ends = np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])[:-1]
    deltas = []
    for row in rows:
        pieces = zip(SHAPES.items(), np.split(row, ends), strict=True)
        arrays = {n: piece.reshape(shape) for (n, shape), piece in pieces}
        deltas.append(sparse(arrays, base=BaseIdentity(total_weights=SIZE)))
    return deltas


@st.composite
def stacks(draw: st.DrawFn, name: str, flavour: str) -> tuple[list[SparseDelta], list[float], Any]:
    """Deltas, their weights, and some options of the method."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    deltas = some_deltas(rng, apart=name == "disjoint")
    values = [1.0, 0.5, -1.0, 2.0, 0.0] + ([] if name in DYADIC else [0.3])
    weights = rng.choice(values, len(deltas)).tolist()
    made = make_method(name, flavour)
    names = [n for n in made.options() if n in OPTIONS and draw(st.booleans())]
    options = {n: draw(OPTIONS[n]) for n in names}
    if "epsilon" in made.options():
        options |= {"density": 0.5, "epsilon": draw(st.sampled_from([0.0, 0.15, 0.5]))}
    return deltas, weights, options


@pytest.mark.parametrize(("name", "flavour"), CASES)
@settings(max_examples=30)
@given(data=st.data())
def test_equals_the_naive_dense_form(name: str, flavour: str, data: st.DataObject) -> None:
    """Bit for bit, on every element of every tensor, whatever the options."""
    deltas, weights, options = data.draw(stacks(name, flavour))
    if name in ("consensus", "tall-masks"):
        options["votes"] = data.draw(st.integers(1, len(deltas)))
    found = stack(deltas, name, weights, flavour=flavour, **options)  # type: ignore[arg-type]
    arrays = [dense(delta, SHAPES) for delta in deltas]
    expected = reference(name, make_method(name, flavour, options), arrays, weights)
    for tensor, array in dense(found, SHAPES).items():
        assert np.array_equal(array, expected[tensor]), (tensor, array, expected[tensor])


@settings(max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize(
    "name",
    ["consensus", "linear", "magnitude", "ram", "sce", "tall-masks", "task-arithmetic", "ties"],
)
def test_the_order_of_deltas_does_not_matter(name: str, data: st.DataObject) -> None:
    """Where sums are exact; draws go by position, and the first of equals by its nature."""
    deltas, _, _ = data.draw(stacks(name, "paper"))
    more = {"votes": 1} if name in ("consensus", "tall-masks") else {}
    one, other = stack(deltas, name, **more), stack(deltas[::-1], name, **more)
    for tensor, array in dense(one, SHAPES).items():
        assert np.allclose(array, dense(other, SHAPES)[tensor], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("density", "whole"), [(0.29, 100), (0.1, 1000), (0.7, 10), (0.001, 999)])
def test_densities_are_met_exactly(density: float, whole: int) -> None:
    """floor(density * n) of n entries, by the decimal number as written; peers use doubles."""
    values = np.arange(1, whole + 1, dtype=np.float32)
    delta = sparse({"w": values})
    expected = int(str(density).replace("0.", "")) * whole // 10 ** (len(str(density)) - 2)
    assert stack([delta], "ties", density=density).nnz == expected
    peer = stack([delta], "ties", density=density, flavour="mergekit")
    assert peer.nnz == max(1, int(density * whole))


def test_a_global_trim_ranks_over_tensors_and_a_local_one_does_not() -> None:
    delta = sparse({"a": [9.0, 8.0, 7.0, 6.0], "b": [1.0, 1.0, 2.0, 1.0]})
    whole = stack([delta], "magnitude", density=0.5)
    assert {n: t.indices.tolist() for n, t in whole.tensors.items()} == {"a": [0, 1, 2, 3]}
    local = stack([delta], "magnitude", density=0.5, trim_scope="tensor")
    assert {n: t.indices.tolist() for n, t in local.tensors.items()} == {"a": [0, 1], "b": [0, 2]}


def test_a_global_share_of_numel_needs_the_size_of_the_base() -> None:
    delta = sparse({"a": [9.0, 8.0, NO, NO]})
    with pytest.raises(ConfigError, match="needs the number of the base's weights"):
        stack([delta], "ties", density_of="numel")
    known = sparse({"a": [9.0, 8.0, NO, NO]}, base=BaseIdentity(total_weights=10))
    assert stack([known], "ties", density=0.1, density_of="numel").nnz == 1


@pytest.mark.parametrize("name", ["dare", "dare-ties", "della", "della-linear"])
def test_draws_go_by_seed_delta_and_tensor_alone(name: str) -> None:
    """The same whatever else is there; another seed, tensor or position draws otherwise."""
    values = np.arange(1, 401, dtype=np.float32).reshape(1, 400)
    alone = stack([sparse({"w": values})], name)
    beside = stack([sparse({"a": values, "w": values, "z": values})], name)
    assert beside.tensors["w"].equals(alone.tensors["w"])
    supports = {
        tuple(stack([sparse({"w": values})], name, seed=seed).tensors["w"].indices)
        for seed in (0, 1, 2**64 - 1)
    }
    supports.add(tuple(beside.tensors["a"].indices))
    other = stack([sparse({"v": values}), sparse({"w": values})], name)
    supports.add(tuple(other.tensors["w"].indices))
    assert len(supports) == 5


def test_dare_keeps_the_expectation() -> None:
    """50,000 entries of 1 at density 0.2: mean 1, standard error 0.009."""
    delta = sparse({"w": np.ones(50_000, np.float32)})
    made = stack([delta], "dare", density=0.2)
    assert made.nnz == pytest.approx(10_000, abs=5 * 90)
    assert set(made.tensors["w"].values.tolist()) == {5.0}


def test_della_alone_in_a_row_has_the_mean_chance() -> None:
    column = sparse({"w": np.ones((50_000, 1), np.float32)})
    for of in ("entries", "numel"):
        kept = stack([column], "della", density=0.3, density_of=of)  # type: ignore[arg-type]
        assert kept.nnz == pytest.approx(15_000, abs=5 * 102)


def test_disjoint_tells_collisions() -> None:
    one = sparse({"a": [1.0, 2.0, 3.0], "b": [1.0], "c": [NO]})
    other = sparse({"a": [NO, 2.0, 3.0], "b": [1.0], "d": [5.0]})
    with pytest.raises(DeltaError, match=r"3 entries in 2 tensors .* \('a': 2, 'b': 1\)"):
        stack([one, other], "disjoint")
    with pytest.raises(DeltaError, match=r"3 entries in 2 tensors .* \('a': 2, 'b': 1\)"):
        stack([one, other, sparse({"a": [NO, 2.0, NO]})], "disjoint")  # a third is no new one
    made = stack([one, other], "disjoint", collisions="first")
    assert made.provenance["notes"] == [
        "3 entries in 2 tensors are in several deltas ('a': 2, 'b': 1); taken from the first"
    ]


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("tise", {}, "unknown stacking method 'tise'; nearest: ties"),
        ("ties", {"epsilon": 0.1}, "ties takes no option 'epsilon'; it takes: scale, elect, sign"),
        ("ties", {"seed": 1}, "ties takes no option 'seed'"),
        ("ties", {"densty": 1}, "'densty'; nearest: density"),
        ("ties", {"flavour": "llama"}, "unknown flavour 'llama'; known: paper, mergekit, peft"),
        ("della", {"flavour": "peft"}, "della has no flavour 'peft'; it has: paper, mergekit"),
        ("ties", {"density": 0}, "density 0.0 is not above 0 and at most 1"),
        ("dare", {"density": 1.5}, "density 1.5 is not above 0 and at most 1"),
        ("ties", {"density": float("nan")}, "density cannot be nan; it is a finite number"),
        ("ties", {"density": "much"}, "density cannot be 'much'; it is a number"),
        ("ties", {"elect": "both"}, "elect cannot be 'both'; it is unweighted or weighted"),
        ("linear", {"normalize": "no"}, "normalize cannot be 'no'; it is true or false"),
        ("consensus", {"votes": 1.5}, "votes cannot be 1.5; it is a whole number"),
        ("consensus", {"votes": 3}, "3 votes of 2 deltas are not possible"),
        ("tall-masks", {"votes": 0}, "0 votes of 2 deltas are not possible"),
        ("della", {"density": 0.1}, "density 0.1 with epsilon 0.15: epsilon is at least 0"),
        ("breadcrumbs", {"gamma": 1}, "gamma 1.0 is not at least 0 and below 1"),
        ("ram", {"threshold": -1}, "threshold -1.0 is negative"),
        ("dare", {"seed": -1}, "seed -1 is not within"),
    ],
)
def test_what_is_not_possible_is_refused(name: str, options: Any, told: str) -> None:
    delta = sparse({"w": [1.0, 2.0]})
    with pytest.raises(ConfigError) as error:
        stack([delta, delta], name, **options)
    assert told in str(error.value)
