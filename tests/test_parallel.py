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
