"""Metrics against numbers worked out by hand."""

from __future__ import annotations

from math import exp, log, sqrt

import numpy as np
import pytest

from deltakit.training.metrics import (
    classification_metrics,
    greater_is_better,
    language_metrics,
    regression_metrics,
)


def test_classification() -> None:
    """Labels 0 0 1 1 2, predictions 0 1 1 1 0: the confusion matrix is worked out by hand."""
    predicted = [0, 1, 1, 1, 0]
    logits = np.full((5, 3), -1.0, np.float32)
    logits[range(5), predicted] = 1.0
    found = classification_metrics(logits, np.array([0, 0, 1, 1, 2]))
    # F1: class 0 1/2, class 1 4/5, class 2 0. Matthews: (c s - sum p t) / sqrt(...)
    matthews = (3 * 5 - (2 * 2 + 3 * 2 + 0 * 1)) / sqrt((25 - (4 + 9)) * (25 - (4 + 4 + 1)))
    right, wrong = log(1 + 2 * exp(-2)), log(1 + 2 * exp(-2)) + 2
    assert found == pytest.approx(
        {
            "accuracy": 0.6,
            "macro_f1": (0.5 + 0.8 + 0) / 3,
            "matthews": matthews,
            "loss": (3 * right + 2 * wrong) / 5,
        }
    )


def test_first_of_equal_logits_is_the_prediction() -> None:
    """Ties are deterministic."""
    assert classification_metrics(np.zeros((2, 3)), np.array([0, 1]))["accuracy"] == 0.5


def test_regression() -> None:
    """x = 1 2 3, y = 1 3 2: both correlations are 1/2."""
    found = regression_metrics(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]))
    assert found == pytest.approx({"pearson": 0.5, "spearman": 0.5, "mse": 2 / 3})


def test_spearman_sees_ranks_only() -> None:
    """A monotone relation has rank correlation 1 and a smaller linear one."""
    found = regression_metrics(np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 100.0]))
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] < 0.9


@pytest.mark.parametrize("values", [[2.0, 2.0], [2.0]])
def test_correlation_with_a_constant_is_zero(values: list[float]) -> None:
    """Undefined, and told as 0 instead of NaN."""
    found = regression_metrics(np.array(values), np.arange(float(len(values))))
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)


def test_language() -> None:
    """Every token weighs the same: 3 tokens with total 6 and 1 token with total 2."""
    found = language_metrics(np.array([[6.0, 1, 3], [2.0, 1, 1]]))
    assert found == pytest.approx({"loss": 2.0, "perplexity": exp(2), "token_accuracy": 0.5})


def test_direction() -> None:
    """Losses and errors are better when small."""
    small = [
        n for n in ("accuracy", "loss", "mse", "perplexity", "pearson") if not greater_is_better(n)
    ]
    assert small == ["loss", "mse", "perplexity"]
