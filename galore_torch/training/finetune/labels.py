"""What the labels of rows are: classes, or numbers to be met."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from galore_torch.training.finetune.config import RowsConfig
from galore_torch.training.finetune.data import Rows, require_column
from galore_torch.training.finetune.tasks import GLUE


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of a task."""

    column: str
    classes: tuple[Any, ...] | None  # all of them in order; None if labels are numbers to be met
    metrics: tuple[str, ...]  # by what predictions are scored, the main one first

    @property
    def head(self) -> dict[str, Any]:
        """What a model's configuration must say for them."""
        if self.classes is None:
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(map(str, self.classes)))
        return {
            "num_labels": len(names),
            "problem_type": "single_label_classification",
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
        }

    def encoded(self, label: Any) -> float | int:
        """What the model is to say for a label."""
        return float(label) if self.classes is None else self.classes.index(label)

    def decoded(self, said: float | int) -> Any:
        """The label that the model's answer stands for."""
        return said if self.classes is None else self.classes[int(said)]


def find_labels(config: RowsConfig, rows: Rows) -> Labels:
    """Judge the labels of rows; a ValueError says that one is missing, or held out only, or that all are the same."""
    task = GLUE.get(config.task)
    column = "label" if task else config.label_column
    for part in (rows.train, rows.held_out):
        require_column(part, "label_column", column)
        if any(value is None or value != value for value in part[column]):
            raise ValueError(f"label_column = {column!r} has rows without a label; fill them in or leave them out.")
        nested = [value for value in part[column] if isinstance(value, (list, dict))]
        if nested:
            raise ValueError(
                f"label_column = {column!r} holds {type(nested[0]).__name__}s, not labels; choose another column."
            )
    values = list(rows.train[column])
    known = set(values)
    if len(known) < 2:
        raise ValueError(f"label_column = {column!r} is {values[0]!r} in all rows; give rows of at least two labels.")
    numbers = task.numbers if task else _are_numbers(config.labels, values, column)
    if numbers:
        infinite = [value for part in (rows.train, rows.held_out) for value in part[column] if not math.isfinite(value)]
        if infinite:
            raise ValueError(f"label_column = {column!r} holds {infinite[0]!r}; give finite numbers.")
        return Labels(column=column, classes=None, metrics=task.metrics if task else ("pearson", "spearman"))
    classes = tuple(sorted(known))
    strange = sorted(set(rows.held_out[column]) - known)
    if strange:
        raise ValueError(f"label_column = {column!r} holds {strange[0]!r} in held-out rows only; train on it too.")
    yes_or_no = ("f1",) if classes == (0, 1) else ()
    return Labels(
        column=column, classes=classes, metrics=task.metrics if task else ("accuracy", "matthews", *yes_or_no)
    )


def _are_numbers(asked: str, values: list[Any], column: str) -> bool:
    if asked == "classes":
        return False
    are = all(isinstance(value, (int, float)) for value in values)
    if asked == "numbers" and not are:
        raise ValueError(
            f"labels = 'numbers', and label_column = {column!r} holds text; choose classes, or convert it."
        )
    return asked == "numbers" or (are and any(isinstance(value, float) for value in values))
