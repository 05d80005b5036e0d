"""Which rows are trained on and which are held out: GLUE's, a data set of the Hub, files of one's own, or sums.

Rows in the forms that people have them in become columns as TRL has them:

| form | columns | become |
| --- | --- | --- |
| Alpaca | instruction, output, and input or not | prompt, completion |
| ShareGPT | conversations, of from and value | messages, of role and content |
| pairs | chosen and rejected, which begin with the prompt | prompt, chosen, rejected |
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from galore_torch.training.finetune.config import ARITHMETIC, GLUE, RowsConfig
from galore_torch.training.run.names import local_path, refused
from galore_torch.training.text.row_checks import missing_column, require_filled
from galore_torch.training.text.rows import first_rows, is_hub_name, kind_of, require_rows
from galore_torch.training.text.sources import read_table

_SPLIT = 0  # the seed of which rows of a file are held out
_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "bard": "assistant"}
_SUMS = 2000
_TABLES = ("csv", "tsv")


@dataclass(frozen=True)
class Rows:
    """Rows to train on and rows held out."""

    train: datasets.Dataset
    held_out: datasets.Dataset
    train_rows: Sequence[int]  # the number of each in what it was read from, counted from 1
    held_out_rows: Sequence[int]

    def column(self, field: str, name: str) -> Iterator[tuple[int, Any]]:
        """Number and value of every row in a column; a ValueError says that there is none as a setting names it."""
        for part, numbers in ((self.train, self.train_rows), (self.held_out, self.held_out_rows)):
            if name not in part.column_names:
                raise missing_column(field, name, part.column_names)
            yield from zip(numbers, part[name], strict=True)

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
        parts = _of_hub("task", config.task, "nyu-mll/glue", config.task)
        train, held_out = parts["train"], parts[GLUE[config.task].held_out]
    else:
        as_text = _texts(config)
        train, held_out = _named("data", str(config.data), as_text)
        if config.held_out is not None:
            held_out, _ = _named("held_out", config.held_out, as_text)
    if held_out is not None:
        return Rows(train, held_out, range(1, len(train) + 1), range(1, len(held_out) + 1))
    if len(train) < 2:
        raise ValueError(
            f"data = {config.data!r} holds {len(train)} rows; give at least two, one to be held out. In JSON a row is "
            "an object, of a list or on a line of its own."
        )
    size = max(1, round(config.held_out_share * len(train)))
    numbered = datasets.Dataset.from_dict({"row": range(1, len(train) + 1)})
    parts, rows = (each.train_test_split(test_size=size, seed=_SPLIT) for each in (train, numbered))
    return Rows(parts["train"], parts["test"], rows["train"]["row"][:], rows["test"]["row"][:])


def _texts(config: RowsConfig) -> dict[str, Any]:
    """How tables are read: a column with a value such as 007, which is no 7, is text, whatever pandas takes it for."""
    found: set[str] = set()
    for field in ("data", "held_out"):
        path = local_path(field, name := str(getattr(config, field)))
        for row in first_rows(field, name) if path.is_file() and kind_of(path) in _TABLES else ():
            found |= {column for column, value in row.items() if value and re.fullmatch(r"0\d+", value)}
    return {"converters": dict.fromkeys(found - {config.label_column if config.labels == "numbers" else ""}, str)}


def _named(field: str, name: str, of_tables: dict[str, Any]) -> tuple[Any, Any]:
    """The rows that a setting names, in columns as TRL has them; and those that come as held out with them, or None."""
    if name == ARITHMETIC:
        return _arithmetic(), None
    if not is_hub_name(field, name):
        kind, path = require_rows(field, name), local_path(field, name)
        with tempfile.TemporaryDirectory(prefix="galore-rows-") as scratch:  # for nothing to be read from a cache
            how = of_tables if kind in _TABLES else {}
            rows = read_table(field, name, kind, [path], Path(scratch), keep_in_memory=True, **how)
        if not len(rows):
            raise ValueError(f"{field} = {name!r} holds no rows; give a file that does.")
        return _in_columns(rows), None
    parts = _of_hub(field, name, name)
    if "train" not in parts:
        raise ValueError(f"{field} = {name!r} has no split named train, but {', '.join(parts)}; give files of it.")
    held_out = parts.get("validation", parts.get("test"))
    return _in_columns(parts["train"]), None if held_out is None else _in_columns(held_out)


def _of_hub(field: str, value: str, *name: str) -> Any:
    remedy = "Check the network and the name, or give a CSV, TSV, JSON lines or Parquet file."
    with refused(f"{field} = {value!r} is not given by the Hugging Face Hub", remedy):
        return datasets.load_dataset(*name)


def _in_columns(rows: datasets.Dataset) -> Any:
    """Rows whose columns are those that TRL's trainers read; rows that need none of that are returned as they are."""
    columns = set(rows.column_names)
    if {"instruction", "output"} <= columns and not {"prompt", "completion", "messages"} & columns:
        return rows.map(_asked, remove_columns=sorted({"instruction", "input", "output"} & columns))
    if "conversations" in columns and "messages" not in columns:
        return rows.map(_messages, remove_columns=["conversations"])
    if {"chosen", "rejected"} <= columns and "prompt" not in columns:
        from trl import extract_prompt

        rows = rows.map(extract_prompt)
        if not any(rows["prompt"]):
            raise ValueError("chosen and rejected begin alike in no row, and no column is named prompt; name one so.")
    return rows


def _asked(row: dict[str, Any]) -> dict[str, str]:
    """A row of Alpaca's, with the blank line between instruction, input and response that its template has."""
    asked, given, said = (
        "" if row.get(name) is None else str(row[name]) for name in ("instruction", "input", "output")
    )
    return {"prompt": "".join(f"{part.strip()}\n\n" for part in (asked, given) if part.strip()), "completion": said}


def _messages(row: dict[str, Any]) -> dict[str, Any]:
    known = [one for one in row["conversations"] or [] if isinstance(one, dict)]
    said = [(one.get("from") or one.get("role"), one.get("value") or one.get("content")) for one in known]
    return {"messages": [{"role": _ROLES.get(str(who), str(who)), "content": what} for who, what in said]}


def _arithmetic() -> Any:
    """Sums and differences of two numbers below a hundred, with their answers: a small task whose reward is a rule."""
    draw = random.Random(0)
    pairs = [sorted((draw.randrange(100), draw.randrange(100)), reverse=True) for _ in range(_SUMS)]
    signs = [draw.choice("+-") for _ in pairs]
    found = [a + b if sign == "+" else a - b for (a, b), sign in zip(pairs, signs, strict=True)]
    prompts = [f"{a} {sign} {b} = " for (a, b), sign in zip(pairs, signs, strict=True)]
    return datasets.Dataset.from_dict({"prompt": prompts, "answer": [str(number) for number in found]})


def require_texts(rows: Rows, field: str, name: str) -> None:
    """Refuse, with a ValueError, rows whose column, which a setting names, is missing, empty somewhere, or no text."""
    for number, text in rows.column(field, name):
        if isinstance(text, (dict, list, bytes)):
            kind = type(text).__name__.removesuffix("s")
            raise ValueError(f"{field} = {name!r} holds {kind}s, not text, as in row {number}; choose another.")
    require_filled(field, name, rows.column(field, name))
