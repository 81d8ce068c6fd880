"""Metrics of the tasks, by scikit-learn and scipy; nothing is downloaded."""

from __future__ import annotations

from math import exp

import numpy as np

from deltakit.dtypes import Array

CLASSIFICATION = ("accuracy", "macro_f1", "matthews", "loss")
REGRESSION = ("pearson", "spearman", "mse")
LANGUAGE = ("loss", "perplexity", "token_accuracy")

_SMALLER_IS_BETTER = ("loss", "mse", "perplexity")


def greater_is_better(metric: str) -> bool:
    """Whether a larger value of the metric is the better one."""
    return metric not in _SMALLER_IS_BETTER


def classification_metrics(logits: Array, labels: Array) -> dict[str, float]:
    """Accuracy, macro F1, Matthews correlation and mean cross-entropy in nats.

    logits: [n, classes]; labels: int [n]. The prediction is the first highest logit. Macro F1
    averages over the classes that occur in labels or predictions.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    predicted = logits.argmax(axis=1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
        "matthews": float(matthews_corrcoef(labels, predicted)),
        "loss": _cross_entropy(logits.astype(np.float64), labels),
    }


def regression_metrics(predicted: Array, labels: Array) -> dict[str, float]:
    """Pearson and Spearman correlation and mean squared error.

    predicted, labels: [n]. The correlation with a constant is undefined and counts as 0.
    """
    from scipy.stats import pearsonr, spearmanr

    x, y = predicted.astype(np.float64), labels.astype(np.float64)
    varied = len(x) > 1 and bool(np.ptp(x)) and bool(np.ptp(y))
    return {
        "pearson": float(pearsonr(x, y).statistic) if varied else 0.0,
        "spearman": float(spearmanr(x, y).statistic) if varied else 0.0,
        "mse": float(np.mean((x - y) ** 2)),
    }


def language_metrics(sums: Array) -> dict[str, float]:
    """Loss (mean negative log-likelihood per token, nats), perplexity and token accuracy.

    sums: [n, 3], per example the summed negative log-likelihood, the tokens predicted right and
    the tokens that count. Every token weighs the same, whatever the batches were.
    """
    total, right, count = sums.astype(np.float64).sum(axis=0)
    loss = float(total / count)
    return {
        "loss": loss,
        "perplexity": exp(loss) if loss < 700 else float("inf"),
        "token_accuracy": float(right / count),
    }


def _cross_entropy(logits: Array, labels: Array) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    return float(np.mean(log_sums - shifted[np.arange(len(labels)), labels]))
