"""Scores of a labelled task, in per cent. scikit-learn and SciPy do the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np

Score = Callable[[np.ndarray, np.ndarray], float]
"""From predictions and labels, (N,) classes or values each, to a figure of which more is better."""


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of predictions that are right."""
    return 100.0 * float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Of class 1, in a task of two; 0 where it neither occurs nor is predicted."""
    if not ((predicted == 1) | (labels == 1)).any():
        return 0.0
    return 100.0 * float(_function("sklearn.metrics", "f1_score")(labels, predicted))


def accuracy_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean of accuracy and F1 (GLUE: MRPC, QQP)."""
    return (accuracy(predicted, labels) + f1(predicted, labels)) / 2


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation (GLUE: CoLA); 0 where all predictions are the same."""
    return 100.0 * float(_function("sklearn.metrics", "matthews_corrcoef")(labels, predicted))


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Correlation; 0 where one side does not vary."""
    return _correlation("pearsonr", predicted, labels)


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Correlation of the ranks; 0 where one side does not vary."""
    return _correlation("spearmanr", predicted, labels)


def pearson_spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean of both correlations (GLUE: STS-B)."""
    return (pearson(predicted, labels) + spearman(predicted, labels)) / 2


def _correlation(name: str, predicted: np.ndarray, labels: np.ndarray) -> float:
    if len(labels) < 2 or np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return 0.0
    return 100.0 * float(_function("scipy.stats", name)(predicted, labels).statistic)


def _function(module: str, name: str) -> Any:
    """Loaded on first use, for both take a second; neither tells its types."""
    return getattr(import_module(module), name)


SCORES: Mapping[str, Score] = {
    score.__name__: score for score in (accuracy, f1, accuracy_f1, matthews, pearson, spearman, pearson_spearman)
}


def score_all(names: tuple[str, ...], predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Raises ValueError for a name that is no score."""
    unknown = [name for name in names if name not in SCORES]
    if unknown or not names:
        raise ValueError(f"metrics={names}: each must be one of {', '.join(SCORES)}")
    return {name: round(SCORES[name](predicted, labels), 2) for name in names}
