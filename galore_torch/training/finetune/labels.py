"""What the labels of rows are: classes, or numbers to be met."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from galore_torch.training.finetune.config import RowsConfig
from galore_torch.training.finetune.data import Rows, require_column
from galore_torch.training.finetune.tasks import GLUE
from galore_torch.training.text.rows import in_rows


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


def class_names(model: Any) -> tuple[str, ...]:
    """The classes that a model has learnt to tell, in its order, by their names; none if it has no names for any.

    Args:
        model: the settings of a fine-tuning's model.
    """
    try:
        config = AutoConfig.from_pretrained(model.model)
    except (OSError, ValueError, KeyError):  # told where the model is loaded
        return ()
    names = tuple(str(name) for name in (config.id2label or {}).values())
    return () if names[:1] == ("LABEL_0",) else names


def find_labels(config: RowsConfig, rows: Rows, names: tuple[str, ...] = ()) -> Labels:
    """Judge the labels of rows; a ValueError says that one is missing, or held out only, or that all are the same.

    Where all are among the ``names`` of what a model has learnt to tell, classes are those, in the model's order.
    """
    task = GLUE.get(config.task)
    column = "label" if task else config.label_column
    _require_labels(rows, column)
    values = list(rows.train[column])
    known = set(values)
    of_model = set(map(str, known | set(rows.held_out[column]))) <= set(names)
    if len(known) < 2 and not of_model:
        raise ValueError(f"label_column = {column!r} is {values[0]!r} in all rows; give rows of at least two labels.")
    numbers = task.numbers if task else _are_numbers(config.labels, values, column)
    if numbers:
        infinite = [value for part in (rows.train, rows.held_out) for value in part[column] if not math.isfinite(value)]
        if infinite:
            raise ValueError(f"label_column = {column!r} holds {infinite[0]!r}; give finite numbers.")
        return Labels(column=column, classes=None, metrics=task.metrics if task else ("pearson", "spearman"))
    by_name = {str(value): value for value in known | set(rows.held_out[column])}
    classes = tuple(by_name.get(name, name) for name in names) if of_model else tuple(sorted(known))
    strange = sorted(set(rows.held_out[column]) - set(classes))
    if strange:
        raise ValueError(f"label_column = {column!r} holds {strange[0]!r} in held-out rows only; train on it too.")
    yes_or_no = ("f1",) if classes == (0, 1) else ()
    return Labels(
        column=column, classes=classes, metrics=task.metrics if task else ("accuracy", "matthews", *yes_or_no)
    )


def _require_labels(rows: Rows, column: str) -> None:
    """Refuse rows without a label, and labels of several kinds, by the rows' numbers."""
    where: dict[str, list[int]] = {}
    for part, numbers in rows.parts:
        require_column(part, "label_column", column)
        for number, value in zip(numbers, part[column], strict=True):
            empty = value is None or value != value or value == ""
            where.setdefault("no label" if empty else type(value).__name__, []).append(number)
    for kind, numbers in where.items():
        there = in_rows(sorted(numbers))
        if kind == "no label":
            raise ValueError(
                f"label_column = {column!r} is without a label in {there}; fill them in or leave them out."
            )
        if kind in ("list", "dict"):
            raise ValueError(f"label_column = {column!r} holds {kind}s, not labels; choose another column.")
        if "str" in where and kind != "str":
            raise ValueError(
                f"label_column = {column!r} holds texts, and {kind}s in {there}; make all texts, or all numbers."
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
