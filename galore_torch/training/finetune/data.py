"""Which rows are trained on and which are held out: GLUE's, a data set of the Hub, files of one's own, or sums."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from galore_torch.training.finetune.config import RowsConfig
from galore_torch.training.finetune.forms import arithmetic, in_columns
from galore_torch.training.finetune.tasks import ARITHMETIC, GLUE
from galore_torch.training.run.disk import raise_failed_write
from galore_torch.training.run.names import local_path
from galore_torch.training.text.rows import in_rows, is_hub_name, missing_column, require_rows
from galore_torch.training.text.tables import read_table
from galore_torch.units import sentence

_SPLIT = 0  # the seed of which rows of a file are held out


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows to train on and rows held out."""

    train: datasets.Dataset
    held_out: datasets.Dataset
    train_rows: Sequence[int]  # the number of each in what it was read from, counted from 1
    held_out_rows: Sequence[int]

    @property
    def parts(self) -> tuple[tuple[datasets.Dataset, Sequence[int]], ...]:
        """Both, each with its rows' numbers."""
        return (self.train, self.train_rows), (self.held_out, self.held_out_rows)

    @property
    def digest(self) -> str:
        """A digest that another row or another split would change."""
        known = [self.train.to_list(), self.held_out.to_list()]
        return hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()


def load(config: RowsConfig) -> Rows:
    """Find the rows; a ValueError says that there are none, or that they cannot be read.

    Which of a file's are held out is the same for every seed of a run: all are judged alike.
    """
    if config.task in GLUE:
        return _glue(config.task)
    assert config.data is not None
    train, held_out = _named("data", config.data)
    if config.held_out is not None:
        held_out, _ = _named("held_out", config.held_out)
    if held_out is not None:
        return _whole(train, held_out)
    if len(train) < 2:
        raise ValueError(f"data = {config.data!r} holds {len(train)} rows; give at least two, one to be held out.")
    size = max(1, round(config.held_out_share * len(train)))
    numbered = datasets.Dataset.from_dict({"row": range(1, len(train) + 1)})
    parts, rows = (each.train_test_split(test_size=size, seed=_SPLIT) for each in (train, numbered))
    return Rows(
        train=parts["train"],
        held_out=parts["test"],
        train_rows=rows["train"]["row"][:],
        held_out_rows=rows["test"]["row"][:],
    )


def _whole(train: datasets.Dataset, held_out: datasets.Dataset) -> Rows:
    numbers = [range(1, len(part) + 1) for part in (train, held_out)]
    return Rows(train=train, held_out=held_out, train_rows=numbers[0], held_out_rows=numbers[1])


def _named(field: str, name: str) -> tuple[Any, Any]:
    """The rows that a setting names, in columns as TRL has them; and those that come as held out with them, or None."""
    if name == ARITHMETIC:
        return arithmetic(), None
    if not is_hub_name(name):
        return in_columns(_file(field, name)), None
    try:
        parts = datasets.load_dataset(name)
    except Exception as error:  # the Hub's client raises errors of many kinds
        raise ValueError(
            f"{field} = {name!r} is neither a file nor a data set that the Hugging Face Hub gives: {sentence(error)} "
            "Check the name and the network, or give a CSV, JSON lines or Parquet file."
        ) from error
    if "train" not in parts:
        raise ValueError(f"{field} = {name!r} has no split named train, but {', '.join(parts)}; give files of it.")
    held_out = parts.get("validation", parts.get("test"))
    return in_columns(parts["train"]), None if held_out is None else in_columns(held_out)


def _glue(task: str) -> Rows:
    try:
        parts = datasets.load_dataset("nyu-mll/glue", task)
    except Exception as error:  # the Hub's client raises errors of many kinds
        raise ValueError(
            f"task = {task!r} is not given by the Hugging Face Hub: {sentence(error)} Check the network."
        ) from error
    return _whole(parts["train"], parts[GLUE[task].held_out])


def _file(field: str, name: str) -> Any:
    kind, path = require_rows(field, name), local_path(field, name)
    try:
        with tempfile.TemporaryDirectory(prefix="galore-rows-") as scratch:  # for nothing to be read from a cache
            rows = read_table(kind, [path], Path(scratch), in_memory=True)
    except Exception as error:  # pandas, Arrow and Datasets each have their own
        raise_failed_write(error)
        raise ValueError(
            f"{field} = {name!r} holds no rows that can be read as {kind}: {sentence(error.__cause__ or error)} "
            "Fix the file, or give another."
        ) from error
    if not len(rows):
        raise ValueError(f"{field} = {name!r} holds no rows; give a file that does.")
    return rows


def require_column(rows: datasets.Dataset, field: str, name: str) -> None:
    """Refuse, with a ValueError, rows without a column that a setting names."""
    if name not in rows.column_names:
        raise missing_column(field, name, rows.column_names)


def require_texts(rows: Rows, field: str, name: str) -> None:
    """Refuse, with a ValueError, rows whose column, which a setting names, is missing, empty somewhere, or no text."""
    empty = []
    for part, numbers in rows.parts:
        require_column(part, field, name)
        for number, text in zip(numbers, part[name], strict=True):
            if text is None or not str(text).strip():
                empty.append(number)
            if isinstance(text, (dict, list)):
                kind = type(text).__name__
                raise ValueError(f"{field} = {name!r} holds {kind}s, not text, as in row {number}; choose another.")
    if empty:
        raise ValueError(f"{field} = {name!r} is empty in {in_rows(sorted(empty))}; leave such rows out.")
