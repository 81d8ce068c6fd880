"""The search for weights on any objective: exact budgets, never worse than the plain choices."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltakit.errors import ConfigError, TrainingError
from deltakit.weight_search import Weights, plain_choices, search_weights


def _bowl(*bottom: float) -> Callable[[Weights], dict[str, float]]:
    """A quadratic whose axes are not the weights', lowest at `bottom`."""
    slant = np.tri(len(bottom)) + np.eye(len(bottom))

    def loss(weights: Weights) -> dict[str, float]:
        away = slant @ (np.array(weights) - bottom)
        return {"loss": float(away @ away)}

    return loss


@pytest.mark.parametrize("bottom", [(0.62,), (0.3, 0.9), (-0.4, 1.2, 0.55), (0.1, 0.5, 0.9, -1.0)])
def test_the_bottom_of_a_bowl_is_found(bottom: Weights) -> None:
    search = search_weights(_bowl(*bottom), len(bottom), regularization=0)
    assert search.weights == pytest.approx(bottom, abs=0.02)
    assert len(search.evaluations) == 40


def test_bounds_hold_where_the_bottom_lies_beyond() -> None:
    search = search_weights(_bowl(3.0, -2.0), 2, bounds=(-0.5, 1.0), regularization=0)
    assert all(-0.5 <= w <= 1 for e in search.evaluations for w in e.weights)
    assert search.weights[0] == 1.0


def test_more_is_better_where_it_is() -> None:
    def accuracy(weights: Weights) -> dict[str, float]:
        return {"accuracy": -_bowl(0.7, 0.2)(weights)["loss"]}

    search = search_weights(accuracy, 2, objective="accuracy", greater=True, regularization=0)
    assert search.weights == pytest.approx((0.7, 0.2), abs=0.02)


@pytest.mark.parametrize("evaluations", [4, 5, 17, 90])
@pytest.mark.parametrize("flat", [True, False])
def test_the_number_of_evaluations_is_exact_and_none_is_made_twice(
    evaluations: int, flat: bool
) -> None:
    """Also where the optimizer converges early, as on a plane, and starts anew."""
    asked: list[Weights] = []

    def measure(weights: Weights) -> dict[str, float]:
        asked.append(weights)
        return {"loss": 1.0} if flat else _bowl(0.2, 0.9)(weights)

    search = search_weights(measure, 2, evaluations=evaluations)
    assert len(asked) == len(set(asked)) == evaluations
    assert [e.weights for e in search.evaluations] == asked
    assert [e.number for e in search.evaluations] == list(range(1, evaluations + 1))
    assert asked[:4] == [(1.0, 1.0), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)]


def test_the_seed_decides_where_the_search_starts_anew() -> None:
    def tried(seed: int) -> list[Weights]:
        search = search_weights(_bowl(0.2, 0.9), 2, evaluations=60, seed=seed)
        return [e.weights for e in search.evaluations]

    assert tried(1) == tried(1)
    assert tried(1)[:10] == tried(2)[:10]
    assert tried(1) != tried(2)


@pytest.mark.parametrize("name", list(plain_choices(3)))
@pytest.mark.parametrize("evaluations", [5, 12])
def test_nothing_is_worse_than_the_plain_choices(name: str, evaluations: int) -> None:
    """On an objective that is lowest at one of them alone and misleads everywhere else."""
    best = tuple(round(w, 4) for w in plain_choices(3)[name])

    def measure(weights: Weights) -> dict[str, float]:
        return {"loss": 0.0 if weights == best else 1.0 + sum(weights) % 1}

    search = search_weights(measure, 3, evaluations=evaluations)
    assert search.weights == best
    assert search.reason.endswith(f"no search beat {name}")
    assert search.value == min(e.value for e in search.evaluations)


def test_the_penalty_is_on_the_mean_magnitude() -> None:
    search = search_weights(lambda weights: {"loss": 2.0}, 2, regularization=0.05, evaluations=30)
    for e in search.evaluations:
        assert e.value == pytest.approx(2 + 0.05 * (abs(e.weights[0]) + abs(e.weights[1])) / 2)
    assert search.weights == pytest.approx((0, 0), abs=0.05)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_infinitely_bad_and_told(broken: float) -> None:
    def measure(weights: Weights) -> dict[str, float]:
        return {"loss": broken} if weights[0] > 0.6 else _bowl(0.4, 0.8)(weights)

    search = search_weights(measure, 2, regularization=0, evaluations=60)
    assert search.weights == pytest.approx((0.4, 0.8), abs=0.05)
    assert search.evaluations[0].value == math.inf
    assert search.as_dict()["evaluations"][0]["value"] is None
    assert search.as_dict()["evaluations"][0]["metrics"] == {"loss": None}
    assert search.record()["tried"][0] == [[1.0, 1.0], None]
    json.dumps([search.as_dict(), search.record()], allow_nan=False)
    with pytest.raises(TrainingError, match="none of 6 evaluations was finite"):
        search_weights(lambda weights: {"loss": broken}, 2, evaluations=6)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"evaluations": 3}, "3 evaluations are fewer than the 4 plain choices"),
        ({"evaluations": 20_000}, "20,000 evaluations: expected at most 10,000"),
        ({"bounds": (0.2, 1.5)}, r"bounds 0\.2,1\.5: expected finite ones around 0 and 1"),
        ({"bounds": (0, math.inf)}, "bounds 0,inf: expected finite ones"),
        ({"regularization": math.nan}, "regularization nan: expected a number of at least 0"),
    ],
)
def test_what_cannot_be_searched_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        search_weights(_bowl(0, 0), 2, **options)


def test_rows_and_plot(tmp_path: Path) -> None:
    search = search_weights(_bowl(0.3, 0.9), 2, evaluations=5)
    assert search.rows()[:2] == [
        ["evaluation", "origin", "weights", "loss", "minimised"],
        ["1", "all 1", "1,1", f"{search.evaluations[0].metrics['loss']:.4f}", "2.8200"],
    ]
    search.plot(tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
