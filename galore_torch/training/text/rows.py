"""Files of rows, looked into before any library that takes seconds is imported: are they there, and what is in them?"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from galore_torch.training.run.names import is_written_as_path, local_path

KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
"""What Datasets calls a file of rows, by the ending of its name."""

_LINES = {".jsonl", ".ndjson"}
_LOOKED_AT = 100_000  # rows
_NAMED = 20  # rows that a message names

_FORMS = {  # columns that rows of a kind have, and the tasks that take them
    ("chosen", "rejected"): "dpo or --task reward",
    ("prompt", "answer"): "grpo",
    ("messages",): "sft",
    ("conversations",): "sft",
    ("prompt", "completion"): "sft",
    ("instruction", "output"): "sft",
}


def is_hub_name(name: str) -> bool:
    """Whether a name can only be one of the Hub's: no file has it, and none is meant."""
    path = Path(name)
    is_file = path.suffix and not path.suffix[1:].isdigit()
    return not path.exists() and not is_file and not is_written_as_path(name) and name.count("/") <= 1


def require_rows(field: str, name: str) -> str:
    """Refuse, with a ValueError, what is no file of rows that can be read; the kind of one that is, is returned."""
    path = local_path(field, name)
    kind = KINDS.get(path.suffix.lower())
    if kind is None or not path.is_file():
        raise ValueError(f"{field} = {name!r} is not a CSV, JSON lines or Parquet file; give one that exists.")
    if not path.stat().st_size:
        raise ValueError(f"{field} = {name!r} is empty; give a file that holds rows.")
    return kind


def first_rows(field: str, name: str) -> Iterator[dict[str, Any]]:
    """The first rows of a file, as its format has them; none where reading them needs a library.

    A ValueError says which line of a file of JSON lines is not one.
    """
    path = local_path(field, name)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix.lower() == ".csv":
                yield from islice(csv.DictReader(file), _LOOKED_AT)
            elif path.suffix.lower() in _LINES:
                yield from _objects(field, name, islice(file, _LOOKED_AT))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{field} = {name!r} cannot be read as text: {error}. Save it as UTF-8.") from error


def _objects(field: str, name: str, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{field} = {name!r}: line {number} is not JSON ({error}); fix the line.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{field} = {name!r}: line {number} is no JSON object; give one a line.")
        yield row


def missing_column(field: str, name: str, columns: Iterable[str]) -> ValueError:
    """That rows have no column that a setting names, with those that they have and the task that takes them."""
    columns = list(columns)
    fitting = next((tasks for form, tasks in _FORMS.items() if set(form) <= set(columns)), None)
    hint = "" if fitting is None else f" Rows with these fit --task {fitting}."
    return ValueError(f"{field} = {name!r} is not a column of the rows; choose one of {', '.join(columns)}.{hint}")


def in_rows(numbers: Sequence[int]) -> str:
    """Where something is wrong, in words.

    >>> in_rows([7]), in_rows([7, 9])
    ('row 7', 'rows 7, 9')
    """
    more = f" and {len(numbers) - _NAMED:,} more" if len(numbers) > _NAMED else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(f'{number:,}' for number in numbers[:_NAMED])}{more}"
