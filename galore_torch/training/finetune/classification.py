"""Sequence classification and regression on Transformers' Trainer: labels, model, and how predictions are scored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from scipy import special, stats
from sklearn import metrics
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from galore_torch.training.finetune.config import GLUE, OF_LABELS, FinetuneConfig, RowsConfig
from galore_torch.training.finetune.data import Rows, require_texts
from galore_torch.training.run.base_model import load_base
from galore_torch.training.text.row_checks import in_rows, require_filled, require_two_labels

_BY: tuple[Callable[[Any, Any], Any], ...] = (
    metrics.accuracy_score,
    metrics.matthews_corrcoef,
    partial(metrics.f1_score, zero_division=0),
    lambda right, said: stats.pearsonr(right, said).statistic,
    lambda right, said: stats.spearmanr(right, said).statistic,
)
METRICS = dict(zip(OF_LABELS, _BY, strict=True))
"""What scores predictions, by name, from the right labels and the predicted ones."""


def score(names: Sequence[str], predicted: Any, labels: Any) -> dict[str, float]:
    """Score predicted classes or numbers, one a row, by metrics of `METRICS`.

    A correlation with predictions that are all the same is 0.
    """
    undefined = ("pearson", "spearman") if np.ptp(predicted) == 0 or np.ptp(labels) == 0 else ()
    return {name: 0.0 if name in undefined else float(METRICS[name](labels, predicted)) for name in names}


# Labels --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
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


def class_names(model: str) -> tuple[str, ...]:
    """The classes that a model, by name or folder, can tell, in its order; none if it has no names for any."""
    try:
        config = AutoConfig.from_pretrained(model)
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
    values, held_out = list(rows.train[column]), list(rows.held_out[column])
    known = set(values)
    by_name = {str(value): value for value in {*known, *held_out}}
    of_model = set(by_name) <= set(names)
    if not of_model:
        require_two_labels(column, values)
    if task.numbers if task else _are_numbers(config.labels, values, column):
        infinite = [value for value in (*values, *held_out) if not math.isfinite(value)]
        if infinite:
            raise ValueError(f"label_column = {column!r} holds {infinite[0]!r}; give finite numbers.")
        return Labels(column, None, task.metrics if task else ("pearson", "spearman"))
    classes = tuple(by_name.get(name, name) for name in names) if of_model else tuple(sorted(known))
    strange = sorted(set(held_out) - set(classes))
    if strange:
        raise ValueError(f"label_column = {column!r} holds {strange[0]!r} in held-out rows only; train on it too.")
    yes_or_no = ("f1",) if classes == (0, 1) else ()
    return Labels(column, classes, task.metrics if task else ("accuracy", "matthews", *yes_or_no))


def _require_labels(rows: Rows, column: str) -> None:
    """Refuse rows without a label, and labels of several kinds, by the rows' numbers."""
    require_filled("label_column", column, rows.column("label_column", column), "is without a label")
    where: dict[str, list[int]] = {}
    for number, value in rows.column("label_column", column):
        where.setdefault(type(value).__name__, []).append(number)
    for kind, numbers in where.items():
        there = in_rows(sorted(numbers))
        if kind in ("list", "dict"):
            raise ValueError(f"label_column = {column!r} holds {kind}s, not labels; choose another column.")
        if "str" in where and kind != "str":
            raise ValueError(
                f"label_column = {column!r} holds texts, and {kind}s in {there}; make all texts, or all numbers."
            )


def _are_numbers(asked: str, values: list[Any], column: str) -> bool:
    are = all(isinstance(value, (int, float)) for value in values)
    if asked == "numbers" and not are:
        raise ValueError(
            f"labels = 'numbers', and label_column = {column!r} holds text; choose classes, or convert it."
        )
    return asked == "numbers" or (asked == "auto" and are and any(isinstance(value, float) for value in values))


# Training ------------------------------------------------------------------------------------------------------------


class Classification:
    """One kind of fine-tuning: rows with labels, and a model with a head for them."""

    task_type = "SEQ_CLS"  # PEFT's name
    measured: dict[str, str]  # the Trainer's metrics that are scores, by their names, the main one first
    cut: int  # how many rows are longer than a sequence may be

    def __init__(self, config: FinetuneConfig, rows: Rows, console: Console) -> None:
        data = config.data
        task = GLUE.get(data.task)
        pair = () if data.text_pair_column is None else (data.text_pair_column,)
        columns = task.columns if task else (data.text_column, *pair)
        for field, column in zip(("text_column", "text_pair_column"), columns, strict=False):
            require_texts(rows, field, column)
        self._inputs = [" | ".join(map(str, texts)) for texts in zip(*(rows.held_out[c] for c in columns), strict=True)]
        self._rows = rows.held_out_rows
        self.labels = wanted = find_labels(data, rows, class_names(config.model.model))
        self.model, self.tokenizer = load_base(
            config.model, AutoModelForSequenceClassification, ("max_length", data.max_length), console, **wanted.head
        )
        self.measured = {name: f"eval_{name}" for name in wanted.metrics}
        tokenizer, most = self.tokenizer, data.max_length  # all that Datasets has to digest

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            texts = [[str(text) for text in batch[column]] for column in columns]
            whole = tokenizer(*texts)["input_ids"]
            made = tokenizer(*texts, truncation=True, max_length=most)
            labels = [wanted.encoded(label) for label in batch[wanted.column]]
            return {**made, "labels": labels, "cut": [len(ids) > most for ids in whole]}

        made = [
            part.map(encode, batched=True, remove_columns=part.column_names, desc="Tokenizing")
            for part in (rows.train, rows.held_out)
        ]
        self.cut = sum(sum(part["cut"]) for part in made)
        self.train, self.held_out = [part.remove_columns("cut") for part in made]

    def trainer(self, args: TrainingArguments, **more: Any) -> Trainer:
        """Make the trainer."""
        trainer = Trainer(
            args=args,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=lambda found: score(
                self.labels.metrics, self._said(found.predictions), np.asarray(found.label_ids)
            ),
            **more,
        )
        # Encoders take any keyword and do not heed the number of items: the Trainer would leave the mean over
        # micro-batches to them, and the loss would be as many times too large.
        trainer.model_accepts_loss_kwargs = False
        return trainer

    @property
    def guess(self) -> float | None:
        """How often the commonest label of the rows to train on is right of those held out; None for numbers."""
        if self.labels.classes is None:
            return None
        commonest, _ = Counter(self.train["labels"]).most_common(1)[0]
        return float(np.mean(np.asarray(self.held_out["labels"]) == commonest))

    def predictions(self, trainer: Trainer) -> list[dict[str, Any]]:
        """What the model says of each held-out row: its number and text, the right label, and how sure it is."""
        found = trainer.predict(self.held_out)
        said, right = self._said(found.predictions).tolist(), np.asarray(found.label_ids).tolist()
        lines: list[dict[str, Any]] = [
            {"row": row, "input": text, "expected": self.labels.decoded(wanted), "prediction": self.labels.decoded(is_)}
            for row, text, wanted, is_ in zip(self._rows, self._inputs, right, said, strict=True)
        ]
        if self.labels.classes is not None:
            sure = special.softmax(_logits(found.predictions), -1).max(-1).tolist()
            lines = [{**line, "probability": one} for line, one in zip(lines, sure, strict=True)]
        return lines

    def _said(self, predictions: Any) -> Any:
        logits = _logits(predictions)
        return logits.reshape(-1) if self.labels.classes is None else logits.argmax(-1)


def _logits(predictions: Any) -> Any:
    return predictions[0] if isinstance(predictions, tuple) else predictions
