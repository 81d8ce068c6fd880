"""D3 and the streaming pool against the definition on whole tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakit.errors import ConfigError, TrainingError
from deltakit.selection.allocation import proportional_seats
from deltakit.selection.d3 import D3
from deltakit.selection.precondition import factored_rms
from deltakit.selection.topk import TopK
from deltakit.selection.unmask import Unmasking


def _best(scores: list[torch.Tensor], k: int) -> list[tuple[int, int]]:
    """The k best (tensor, index) by higher score, earlier tensor, lower index."""
    ranked = [
        (-float(s), t, i) for t, part in enumerate(scores) for i, s in enumerate(part) if s > 0
    ]
    return [(t, i) for _, t, i in sorted(ranked)[:k]]


@given(st.data())
@settings(deadline=None)
def test_the_pool_keeps_the_k_best_in_tie_order(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 12))
    values = st.sampled_from([0.5, 1.0, 1.0, 2.0, 3.0])
    tensors = data.draw(st.lists(st.lists(values, max_size=30), min_size=1, max_size=4))
    scores = [torch.tensor(t, dtype=torch.float32) for t in tensors]
    pool = TopK(k)
    for number in data.draw(st.permutations(range(len(scores)))):
        index = torch.arange(len(scores[number]))
        for rows in index.split(7):
            pool.offer(number, scores[number][rows], rows, scores[number][rows])
    owners, indices, gradients = pool.result()
    expected = _best(scores, k)
    assert list(zip(owners.tolist(), indices.tolist(), strict=True)) == expected
    assert gradients.tolist() == [float(scores[t][i]) for t, i in expected]


def test_the_pool_stays_small_and_exact_on_ties() -> None:
    pool = TopK(10)
    for start in range(0, 500_000, 50_000):
        rows = torch.arange(start, start + 50_000)
        pool.offer(0, torch.ones(50_000), rows, torch.ones(50_000))
        assert pool._count < 100_000
    assert pool.result()[1].tolist() == list(range(10))


@pytest.mark.parametrize("eps", [1e-8, 0.5, 1.0])
@pytest.mark.parametrize("exp", [0.0, 1.0, -1.0, 2.0, -2.0, 0.5, 1.3])
def test_d3_is_its_formula_and_its_bound_never_drops_a_winner(eps: float, exp: float) -> None:
    generator = torch.Generator().manual_seed(1)
    gradient, weight = torch.randn(2, 5000, generator=generator) * 0.05
    score = D3(eps, exp)
    exact = gradient.double().abs() / (eps + weight.double().abs()) ** exp
    found = score.score(gradient, weight)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), exact.numpy(), rtol=1e-6)
    bounds = weight.abs().min().item(), weight.abs().max().item()
    for threshold in found.quantile(torch.tensor([0.1, 0.5, 0.9, 1.0])).tolist():
        winners = found >= threshold
        assert (gradient.abs()[winners] >= score.least_gradient(threshold, *bounds)).all()


def test_d3_refuses_a_zero_denominator() -> None:
    with pytest.raises(ConfigError, match="eps must be above 0"):
        D3(0.0, 1.0)


@pytest.mark.parametrize("allocation", ["global", "proportional"])
@pytest.mark.parametrize(
    ("eps", "exp", "precondition", "dtype"),
    [
        (1.0, 0.0, "none", torch.float32),
        (1.0, 0.0, "none", torch.bfloat16),
        (1.0, 0.0, "factored", torch.bfloat16),
        (1e-8, 1.0, "none", torch.float32),
        (0.5, -1.0, "factored", torch.float32),
        (1.0, 1.3, "none", torch.bfloat16),
    ],
)
def test_unmasking_equals_a_dense_reference(
    allocation: str, eps: float, exp: float, precondition: str, dtype: torch.dtype
) -> None:
    """Several steps over tensors larger than one chunk; bfloat16 brings many ties."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(600, 500), (1, 7), (50, 100), (3, 90_000)]
    numels = [rows * columns for rows, columns in shapes]
    weights = [(torch.randn(n, generator=generator) * 0.1).to(dtype) for n in numels]
    plan = np.array([500, 500, 1234, 3000])
    seats = proportional_seats(numels, 3000) if allocation == "proportional" else None
    score = D3(eps, exp)
    selector = Unmasking(score, plan, numels, seats, precondition)
    taken: list[set[int]] = [set() for _ in numels]
    for step in range(4):
        gradients = [torch.randn(n, generator=generator).to(dtype) for n in numels]
        masked = []
        for number, gradient in enumerate(gradients):
            masked.append(gradient.clone())
            masked[number][list(taken[number])] = 0
        scores = []
        for shape, g, w in zip(shapes, masked, weights, strict=True):
            matrix = g.float().view(shape)
            if precondition == "factored":
                rows, columns = factored_rms(g.view(shape))
                matrix = matrix.abs() * rows * columns
            scores.append(score.score(matrix.reshape(-1), w))
        support = _Taken({n: np.array(sorted(taken[n]), np.int64) for n in range(4)})
        selector.begin(step, support)
        for number in (2, 0, 3, 1):
            bounds = weights[number].abs().min().item(), weights[number].abs().max().item()
            gradient = masked[number].clone().view(shapes[number])
            selector.offer(number, gradient, weights[number], bounds, "w")
        found = {
            (t, i): g
            for t, indices, grads in selector.choose(support).joining
            for i, g in zip(indices.tolist(), grads.tolist(), strict=True)
        }
        before = plan[step - 1] if step else 0
        if seats is None:
            expected = _dense_best(scores, plan[step] - before)
        else:
            counts = np.bincount(seats[before : plan[step]], minlength=4)
            expected = {(t, i) for t in range(4) for _, i in _dense_best([scores[t]], counts[t])}
        assert set(found) == expected
        assert all(g == float(gradients[t][i]) for (t, i), g in found.items())
        for t, i in found:
            taken[t].add(i)


class _Taken:
    """A support of which only the blocked indices are asked for."""

    def __init__(self, blocked: dict[int, np.ndarray]) -> None:
        self._blocked = blocked

    def indices(self, number: int) -> torch.Tensor:
        raise AssertionError("an unmasking does not ask for indices")

    values = indices

    def blocked(self, number: int) -> np.ndarray:
        return self._blocked[number]

    forbidden = blocked


def _dense_best(scores: list[torch.Tensor], k: int) -> set[tuple[int, int]]:
    flat = torch.cat(scores).numpy()
    owner = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
    index = np.concatenate([np.arange(len(s)) for s in scores])
    order = np.lexsort((index, owner, -flat))[:k]
    return set(zip(owner[order].tolist(), index[order].tolist(), strict=True))


def test_missing_scores_are_filled_in_tie_order_with_zero_gradients() -> None:
    selector = Unmasking(D3(), np.array([6]), [3, 4, 5])
    blocked = {0: np.array([1]), 1: np.array([0]), 2: np.zeros(0, np.int64)}
    selector.begin(0, _Taken(blocked))
    selector.offer(1, torch.tensor([[0.0, 2.0, 0.0, 0.0]]), torch.ones(4), (1.0, 1.0), "w")
    chosen = selector.choose(_Taken(blocked)).joining
    entries = {
        (t, i): g for t, ind, gs in chosen for i, g in zip(ind.tolist(), gs.tolist(), strict=True)
    }
    assert entries == {(0, 0): 0, (0, 2): 0, (1, 1): 2, (1, 2): 0, (1, 3): 0, (2, 0): 0}


def test_the_factored_estimate_is_adafactors() -> None:
    """A rank-one gradient becomes flat; rows and columns of zeros stay zero; no unit is left."""
    generator = torch.Generator().manual_seed(3)
    gradient = torch.rand(6, 1, generator=generator) * torch.rand(1, 9, generator=generator)
    rows, columns = factored_rms(gradient)
    torch.testing.assert_close(gradient * rows * columns, torch.ones(6, 9))
    noisy = torch.randn(6, 9, generator=generator)
    second = noisy.square().mean(1, keepdim=True) * noisy.square().mean(0, keepdim=True)
    expected = noisy / (second / noisy.square().mean()).sqrt()
    for scale in (1.0, 1e-3):
        rows, columns = factored_rms(noisy * scale)
        torch.testing.assert_close(noisy * scale * rows * columns, expected)
    noisy[2], noisy[:, 4] = 0, 0
    rows, columns = factored_rms(noisy)
    assert torch.isfinite(rows).all() and torch.isfinite(columns).all()
    vector = torch.tensor([[3.0, 4.0]])
    rows, columns = factored_rms(vector)
    torch.testing.assert_close(vector * rows * columns, vector / 12.5**0.5)


@pytest.mark.parametrize("precondition", ["none", "factored"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(bad: float, precondition: str) -> None:
    selector = Unmasking(D3(), np.array([1]), [3], precondition=precondition)
    selector.begin(0, _Taken({}))
    with pytest.raises(TrainingError, match=r"layer\.weight: the gradient is not finite"):
        gradient = torch.tensor([[1.0, bad, 0.0]])
        selector.offer(0, gradient, torch.ones(3), (1.0, 1.0), "layer.weight")
