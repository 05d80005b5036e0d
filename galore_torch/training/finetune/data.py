"""Which rows are trained on and which are held out: GLUE's from the Hub, or files of one's own."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from galore_torch.training.finetune.config import RowsConfig
from galore_torch.training.finetune.tasks import GLUE
from galore_torch.training.run.disk import raise_failed_write
from galore_torch.training.run.files import local_path
from galore_torch.training.run.units import sentence
from galore_torch.training.text.tables import read_table

_KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
_SPLIT = 0  # the seed of which rows of a file are held out


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows to train on and rows held out."""

    train: datasets.Dataset
    held_out: datasets.Dataset

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
    train = _file("data", config.data)
    if config.held_out is not None:
        return Rows(train=train, held_out=_file("held_out", config.held_out))
    if len(train) < 2:
        raise ValueError(f"data = {config.data!r} holds {len(train)} rows; give at least two, one to be held out.")
    parts = train.train_test_split(test_size=max(1, round(config.held_out_share * len(train))), seed=_SPLIT)
    return Rows(train=parts["train"], held_out=parts["test"])


def _glue(task: str) -> Rows:
    try:
        parts = datasets.load_dataset("nyu-mll/glue", task)
    except Exception as error:  # the Hub's client raises errors of many kinds
        raise ValueError(
            f"task = {task!r} is not given by the Hugging Face Hub: {sentence(error)} Check the network."
        ) from error
    return Rows(train=parts["train"], held_out=parts[GLUE[task].held_out])


def _file(field: str, name: str) -> Any:
    path = local_path(field, name)
    kind = _KINDS.get(path.suffix.lower())
    if kind is None or not path.is_file():
        raise ValueError(f"{field} = {name!r} is not a CSV, JSON lines or Parquet file; give one that exists.")
    if not path.stat().st_size:
        raise ValueError(f"{field} = {name!r} is empty; give a file that holds rows.")
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
        raise ValueError(
            f"{field} = {name!r} is not a column of the rows; choose one of {', '.join(rows.column_names)}."
        )


def require_texts(rows: datasets.Dataset, field: str, name: str) -> None:
    """Refuse, with a ValueError, rows whose column, which a setting names, is missing, empty somewhere, or no text."""
    require_column(rows, field, name)
    for number, text in enumerate(rows[name]):
        if text is None or not str(text).strip():
            raise ValueError(f"{field} = {name!r} is empty in row {number} of {len(rows)}; leave such rows out.")
        if isinstance(text, (dict, list)):
            raise ValueError(f"{field} = {name!r} holds {type(text).__name__}s, not text; choose another column.")
