"""Several processes train what one process would with the same rows: support, values, files."""

from __future__ import annotations

from typing import Any

import numpy as np
import parallel_runs
import pytest
from parallel_lab import together
from parallel_runs import METHODS, Trained, train

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"passes": 1 + at % 2}) for at, name in enumerate(METHODS)),
    ("id3", {"sorted_rows": True}),
    ("random", {"sorted_rows": True}),
    ("id3 factored", {"dtype": "float32"}),
    ("id3", {"dtype": "bfloat16"}),
    ("id3", {"exchange": "candidates"}),
    ("id3 factored", {"exchange": "candidates"}),
    ("repeat", {"exchange": "candidates"}),
]


@pytest.fixture(scope="module", params=[2, 4])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Per case, what each rank has trained."""
    folder = tmp_path_factory.mktemp("ranks") / "meeting"
    ranks = together(request.param, folder, parallel_runs.train_all, CASES)
    return list(zip(*ranks, strict=True))


def test_every_rank_has_the_same_file(runs: list[tuple[Trained, ...]]) -> None:
    for case, ranks in zip(CASES, runs, strict=True):
        assert all(rank.file == ranks[0].file for rank in ranks), case
        assert sum(map(len, ranks[0].indices.values())) == 60, case


def test_float64_runs_equal_one_process(runs: list[tuple[Trained, ...]]) -> None:
    compared = 0
    for (name, options), ranks in zip(CASES, runs, strict=True):
        if {"dtype", "exchange"} & set(options):
            continue
        alone, joint = train(name, **options), ranks[0]
        assert list(joint.indices) == list(alone.indices)
        for tensor, indices in alone.indices.items():
            np.testing.assert_array_equal(joint.indices[tensor], indices, str((name, tensor)))
            np.testing.assert_allclose(
                joint.values[tensor], alone.values[tensor], rtol=1e-6, atol=1e-9
            )
        for extra, values in alone.extras.items():
            np.testing.assert_allclose(joint.extras[extra], values, rtol=1e-6, atol=1e-9)
        compared += 1
    assert compared == 7


@pytest.fixture(scope="module")
def laws(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found in the runs of `parallel_runs.laws`."""
    folder = tmp_path_factory.mktemp("laws") / "meeting"
    return together(2, folder, parallel_runs.laws)


def test_gradients_go_on_in_one_order_however_they_come(laws: list[dict[str, Any]]) -> None:
    (taken, first), (other, _) = (rank["order"] for rank in laws)
    assert taken == other
    assert all(sorted(numbers) == list(range(20)) for numbers in taken)
    assert taken[0] == list(range(20))  # as was expected, before anything was seen
    assert taken[1][:17] == first
    assert taken[2] == taken[1]


def test_a_step_on_a_fixed_support_exchanges_its_entries_and_extras_alone(
    laws: list[dict[str, Any]],
) -> None:
    extras = 24 * 3 + 3
    for step in laws[0]["fixed"]:
        assert step.averaged == [60 + extras + 2 + 1]  # each extra's presence, and a wish to stop
        assert step.gathered == []


def test_candidates_are_a_small_part_of_what_exact_selection_exchanges(
    laws: list[dict[str, Any]],
) -> None:
    exact, candidates = laws[0]["exact"], laws[0]["candidates"]
    sizes = [12 * 10, 100, 10, 100, 10, 240, 24, 25, 5]  # of all targets but the extras
    for step in exact[:4]:  # that select
        assert sorted(step.averaged[:-1]) == sorted(sizes)
    share = 2 * 60 / sum(sizes)
    for step in candidates[:4]:
        named = sum(step.gathered)
        assert sum(sizes) * share <= named <= sum(sizes) * share + len(sizes)
        assert sum(step.averaged[:-1]) <= 2 * named
    assert all(len(step.averaged) == 1 for step in [*exact[4:], *candidates[4:]])


def test_buffers_are_those_of_the_first_rank(laws: list[dict[str, Any]]) -> None:
    first, second = (rank["buffers"] for rank in laws)
    assert "norm.running_mean" in first.extras
    assert first.file == second.file


def test_candidates_of_all_entries_are_exact(laws: list[dict[str, Any]]) -> None:
    exact, candidates = laws[0]["all candidates"]
    assert exact.file == candidates.file


def test_ranks_that_start_apart_are_told(laws: list[dict[str, Any]]) -> None:
    expected = ["targets", "extras", "support"]
    for rank in laws:
        assert len(rank["apart"]) == len(expected)
        for told, what in zip(rank["apart"], expected, strict=True):
            assert told.startswith(f"rank 1 starts from other {what} than rank 0 (digest ")
