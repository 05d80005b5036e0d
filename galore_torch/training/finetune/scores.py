"""How predictions are scored, by scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics

METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")


def score(names: Sequence[str], said: Any, labels: Any) -> dict[str, float]:
    """Score predictions.

    Args:
        names: of `METRICS`.
        said: predicted classes or numbers, one a row.
        labels: the right ones.

    Returns:
        The scores by name. A correlation with predictions that are all the same is 0.
    """
    constant = np.ptp(said) == 0 or np.ptp(labels) == 0
    ways: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: metrics.accuracy_score(labels, said),
        "f1": lambda: metrics.f1_score(labels, said, zero_division=0),
        "matthews": lambda: metrics.matthews_corrcoef(labels, said),
        "pearson": lambda: 0.0 if constant else stats.pearsonr(labels, said).statistic,
        "spearman": lambda: 0.0 if constant else stats.spearmanr(labels, said).statistic,
    }
    return {name: float(ways[name]()) for name in names}
