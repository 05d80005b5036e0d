"""What is wrong with rows that have been read: columns, values and labels that they lack, and rows that say nothing.

Nothing here imports a library that takes seconds: what is missing is told before any is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console

from galore_torch.training.text.rows import is_otherwise_parted
from galore_torch.units import first_of

_NAMED = 20  # rows that a message names

_FORMS = {  # columns that rows of a kind have, and the tasks that take them
    ("chosen", "rejected"): "dpo or --task reward",
    ("prompt", "answer"): "grpo",
    ("instruction", "output"): "sft",
    ("conversations",): "sft",
    ("messages",): "sft",
    ("prompt", "completion"): "sft",
}


def missing_column(field: str, name: str, columns: Iterable[str]) -> ValueError:
    """That rows have no column that a setting names, with those that they have and the task that takes them."""
    columns = list(columns)
    shown = ", ".join(each if each == each.strip() else repr(each) for each in columns)
    whole = " Columns are parted by commas, in .tsv by tabs." if is_otherwise_parted(columns) else ""
    whole += " The first line of a table names its columns." * any(map(str.isdecimal, columns))
    found = f"choose one of {shown}.{whole}{_fitting(columns)}"
    return ValueError(f"{field} = {name!r} is not a column of the rows; {found}")


def require_form(task: str, text_column: str, columns: Iterable[str]) -> None:
    """Refuse, with a ValueError, rows in none of the forms that a stage of TRL's takes, by their columns."""
    columns = list(columns)
    forms = [form for form, tasks in _FORMS.items() if task in tasks.split()] + [(text_column,)] * (task == "sft")
    if not any(set(form) <= set(columns) for form in forms):
        raise ValueError(
            f"task = {task!r} reads columns {' or '.join(map(', '.join, forms))}, and the rows have "
            f"{', '.join(columns)}; rename those.{_fitting(columns)}"
        )


def require_answers(columns: Iterable[str]) -> None:
    """Refuse, with a ValueError, to learn answers alone of rows that are no messages, by their columns."""
    if not {"messages", "conversations"}.intersection(columns):
        raise ValueError(
            "answers_only = True has no effect without messages: completions alone are trained on; leave it out."
        )


def are_messages(task: str, row: Mapping[str, Any]) -> bool:
    """Whether a stage of TRL's finds lists of messages, and no texts, in a row."""
    forms = [form for form, tasks in _FORMS.items() if task in tasks.split() and set(form) <= row.keys()]
    return any(isinstance(row[column], list) for form in forms for column in form)


def _fitting(columns: Sequence[str]) -> str:
    """The task that takes rows of these columns, if there is one, in a sentence."""
    fitting = next((tasks for form, tasks in _FORMS.items() if set(form) <= set(columns)), None)
    return "" if fitting is None else f" Rows with these fit --task {fitting}."


def require_filled(field: str, name: str, column: Iterable[tuple[int, Any]], what: str = "is empty") -> None:
    """Refuse, with a ValueError, a column, that a setting names, of rows' numbers and values where one has none."""
    empty = [number for number, value in column if value is None or value != value or not str(value).strip()]
    if empty:
        raise ValueError(
            f"{field} = {name!r} {what} in {in_rows(sorted(empty))}; leave such rows out. "
            "In tables NA, None, null and the like stand for nothing: use other words."
        )


def require_two_labels(column: str, labels: Sequence[Any]) -> None:
    """Refuse, with a ValueError, the labels of all rows in a column if all are the same."""
    if len(set(map(str, labels))) < 2:
        raise ValueError(f"label_column = {column!r} is {labels[0]!r} in all rows; give rows of at least two labels.")


def shared_rows(rows: Iterable[Any], held_out: Iterable[Any]) -> list[int]:
    """Numbers of the held-out rows that are rows to train on too; a ValueError says that all are."""
    known = {json.dumps(row, sort_keys=True, default=str) for row in rows}
    are = [json.dumps(row, sort_keys=True, default=str) in known for row in held_out]
    if are and all(are):
        raise ValueError(
            "held_out has no row that data has not, and would score what was learnt by heart; give other rows, or "
            "leave it out for a share of data."
        )
    return [number for number, shared in enumerate(are, 1) if shared]


def equal_answers(pairs: Iterable[tuple[int, Any, Any]]) -> list[int]:
    """Numbers of the rows whose chosen and rejected answers are equal; a ValueError says that all are."""
    pairs = list(pairs)
    equal = [number for number, chosen, rejected in pairs if chosen == rejected]
    if pairs and len(equal) == len(pairs):
        raise ValueError("chosen and rejected are equal in all rows, which prefer nothing; give answers that differ.")
    return sorted(equal)


def tell_rows(console: Console, numbers: Sequence[int], what: str) -> None:
    """Print how many rows are not as they should be, in what, and which."""
    if numbers:
        console.print(f"{len(numbers):,} rows are {what}: {in_rows(numbers)}.", highlight=False)


def in_rows(numbers: Sequence[int]) -> str:
    """Where something is wrong, in words.

    >>> in_rows([7]), in_rows([7, 9])
    ('row 7', 'rows 7, 9')
    """
    return f"row{'s' if len(numbers) > 1 else ''} {first_of([f'{number:,}' for number in numbers], _NAMED)}"
