"""How predictions are scored, by scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics

METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")


def score(names: Sequence[str], predicted: Any, labels: Any) -> dict[str, float]:
    """Score predicted classes or numbers, one a row, by metrics of `METRICS`.

    A correlation with predictions that are all the same is 0.
    """
    constant = np.ptp(predicted) == 0 or np.ptp(labels) == 0
    ways: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: metrics.accuracy_score(labels, predicted),
        "f1": lambda: metrics.f1_score(labels, predicted, zero_division=0),
        "matthews": lambda: metrics.matthews_corrcoef(labels, predicted),
        "pearson": lambda: 0.0 if constant else stats.pearsonr(labels, predicted).statistic,
        "spearman": lambda: 0.0 if constant else stats.spearmanr(labels, predicted).statistic,
    }
    return {name: float(ways[name]()) for name in names}
