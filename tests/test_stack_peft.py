"""Flavour "peft" gives what peft's own functions give on dense tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stack_reference import dense, sparse

from deltakit.combine.drop import draws
from deltakit.stacking import stack

torch = pytest.importorskip("torch")
peers = pytest.importorskip("peft.utils.merge_utils")
SHAPE = (6, 7)


def tasks(seed: int, count: int) -> list[np.ndarray]:
    """Dense task vectors without equal magnitudes, which peft breaks ties among as it likes."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(SHAPE, np.float32) for _ in range(count)]


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.lists(st.sampled_from([1.0, 0.5, 0.3, 2.0, -1.0]), min_size=1, max_size=4),
    density=st.sampled_from([0.05, 0.29, 0.5, 0.99]),
    sign_by=st.sampled_from(["total", "frequency"]),
)
def test_ties_magnitude_and_task_arithmetic(
    seed: int, weights: list[float], density: float, sign_by: str
) -> None:
    given = tasks(seed, len(weights))
    theirs = [torch.from_numpy(g) for g in given]
    factors = torch.tensor(weights)
    cases = [
        (
            "ties",
            {"density": density, "sign_by": sign_by},
            peers.ties(theirs, factors, density, sign_by),
        ),
        ("magnitude", {"density": density}, peers.magnitude_prune(theirs, factors, density)),
        ("task-arithmetic", {}, peers.task_arithmetic(theirs, factors)),
    ]
    for name, options, expected in cases:
        found = stack([sparse({"w": g}) for g in given], name, weights, flavour="peft", **options)
        array = dense(found, {"w": SHAPE})["w"]
        np.testing.assert_allclose(array, expected.numpy(), rtol=1e-5, atol=1e-6)
        assert np.array_equal(array != 0, expected.numpy() != 0)


def test_dare_given_the_same_draws() -> None:
    """peft draws by torch.bernoulli; from masks on its own steps are the same."""
    given, weights, density = tasks(0, 3), [1.0, 0.5, 2.0], 0.4
    masks = [draws(5, "w", 42, number).reshape(SHAPE) < density for number in range(3)]
    thinned = [torch.from_numpy(g * mask) / density for g, mask in zip(given, masks, strict=True)]
    factors = torch.tensor(weights)
    votes = peers.calculate_majority_sign_mask(torch.stack(thinned), method="total")
    weighted = torch.stack(thinned) * factors[:, None, None]
    expected = {
        "dare": peers.task_arithmetic(thinned, factors),
        "dare-ties": peers.disjoint_merge(weighted, votes),
    }
    deltas = [sparse({"w": g}) for g in given]
    for name, theirs in expected.items():
        found = stack(deltas, name, weights, flavour="peft", density=density, seed=5)
        array = dense(found, {"w": SHAPE})["w"]
        np.testing.assert_allclose(array, theirs.numpy(), rtol=1e-5, atol=1e-6)
