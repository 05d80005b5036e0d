"""Local files of text and of rows: which are meant, of which kind they are, and what is wrong with what is in them.

Nothing here imports a library that takes seconds: what is missing is told before any is.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from galore_torch.training.run.files import digest_of_file
from galore_torch.training.run.names import is_written_as_path, local_path, require_on_hub
from galore_torch.training.text.config import DataConfig
from galore_torch.units import first_of

_SUFFIXES = {  # by what Datasets calls a file's kind
    "parquet": (".parquet",),
    "json": (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "text": (".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".py", ".c", ".h", ".cpp", ".js", ".ts", ".java",
             ".go", ".rs", ".sh"),
}  # fmt: skip
_LINES = {".jsonl", ".ndjson"}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_FILES, _BEGINNING, ROWS = 1000, 1 << 20, 100_000  # how many files, bytes of a text and rows are looked at
_BEGINNING_ROWS = 10_000  # of all files together
_NAMED = 20  # rows that a message names
_WHOLE = 1 << 26  # bytes of a list that is read to see that it is one
csv.field_size_limit((1 << 31) - 1)  # a document may be longer than the 131,072 characters of the standard library

_FORMS = {  # columns that rows of a kind have, and the tasks that take them
    ("chosen", "rejected"): "dpo or --task reward",
    ("prompt", "answer"): "grpo",
    ("instruction", "output"): "sft",
    ("conversations",): "sft",
    ("messages",): "sft",
    ("prompt", "completion"): "sft",
}


def _kind(path: Path) -> str | None:
    return next((kind for kind, suffixes in _SUFFIXES.items() if path.name.lower().endswith(suffixes)), None)


def is_hub_name(field: str, name: str) -> bool:
    """Whether what a setting names can only be on the Hub: no file has that name, and none is meant."""
    path = local_path(field, name)
    return not (path.exists() or _kind(path) or is_written_as_path(name) or name.count("/") > 1)


# Text ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalFiles:
    """Files that hold the documents, in order, and what of a folder is left out."""

    kind: str  # text, csv, tsv, json or parquet
    paths: list[Path]
    left_out: list[Path]  # those of a folder that are empty, hidden or of no kind of text

    @cached_property
    def digest(self) -> str:
        """A digest of what is in them, in their order, whatever their names and times are."""
        return hashlib.sha256("".join(map(digest_of_file, self.paths)).encode()).hexdigest()

    def folder(self, cache: Path) -> Path:
        """Where in a cache the tables that are made of them are kept: other files, or other contents, have another."""
        return cache / "documents" / f"{self.kind}-{self.digest[:32]}"


def local_files(config: DataConfig) -> LocalFiles | None:
    """The files that ``config.data`` names; None if it names a data set of the Hub."""
    if config.data == "stdlib":
        return LocalFiles("text", _standard_library(), [])
    if is_hub_name("data", config.data):
        return None
    path = local_path("data", config.data)
    if not (path.is_file() or path.is_dir()):
        wrong = "is a pipe or a device" if path.exists() else "does not exist"
        raise ValueError(f"data = {config.data!r} {wrong}; give an existing file or folder, or stdlib.")
    return _of_one_kind(path, config)


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - _NOT_SOURCES
        files += (Path(folder, name) for name in names if name.endswith(".py"))
    if not files:
        raise ValueError(f"data = 'stdlib' found no sources in {root}; give a file or folder of your own.")
    return sorted(files)


def _of_one_kind(path: Path, config: DataConfig) -> LocalFiles:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    hidden = {file for file in files if any(part[0] == "." for part in file.relative_to(path).parts)}  # copies, .git
    filled = [file for file in files if file.stat().st_size and file not in hidden]
    if files and not filled:
        raise ValueError(f"data = {config.data!r} is empty; give a file or folder that holds text.")
    kinds: dict[str, list[Path]] = {}
    for file in filled:
        kind = _kind(file) or ("text" if path.is_file() else None)
        if kind is not None:
            kinds.setdefault(kind, []).append(file)
    if len(kinds) != 1:
        found = f"both {' and '.join(kinds)} files" if kinds else "no text, CSV, JSON lines or Parquet file"
        raise ValueError(f"data = {config.data!r} holds {found}; give a folder with files of one kind, or one file.")
    ((kind, chosen),) = kinds.items()
    for file in chosen:
        if not os.access(file, os.R_OK):
            raise ValueError(f"data = {config.data!r}: {file} cannot be read; allow reading it or leave it out.")
    return LocalFiles(kind, chosen, sorted(set(files) - set(chosen)))


def require_readable(config: DataConfig) -> None:
    """Refuse, with a ValueError, data that are not there, text that is not UTF-8, and rows without the text column.

    Of large files the beginning is looked at.
    """
    files = local_files(config)
    if files is None:
        require_on_hub("data", config.data, "dataset")
        return
    looked_at = files.paths[:_FILES] if config.data != "stdlib" else []
    for path in looked_at:
        if files.kind == "text" and path.suffix != ".gz":
            with path.open("rb") as file:
                start = file.read(_BEGINNING)
            decode(path, start, final=len(start) < _BEGINNING)
        elif files.kind == "parquet":
            require_parquet("data", str(path), path)
        elif files.kind != "text":
            for row in islice(first_rows("data", str(path)), max(1, _BEGINNING_ROWS // len(looked_at))):
                if config.text_column not in row:
                    raise missing_column("text_column", config.text_column, row)


def decode(path: Path, text: bytes, *, final: bool = True) -> str:
    """UTF-8 as text; a ValueError names the file that is none."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(text, final)
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text ({error}); convert it or leave it out.") from error


# Rows ----------------------------------------------------------------------------------------------------------------


def require_rows(field: str, name: str) -> str:
    """Refuse, with a ValueError, what is no file of rows that can be read; the kind of one that is, is returned."""
    path = local_path(field, name)
    kind = _kind(path)
    if kind in (None, "text") or not path.is_file():
        remedy = "convert it, or give one" if path.exists() else "give one that exists"
        raise ValueError(f"{field} = {name!r} is not a CSV, JSON lines or Parquet file; {remedy}.")
    if not path.stat().st_size:
        raise ValueError(f"{field} = {name!r} is empty; give a file that holds rows.")
    if kind == "parquet":
        require_parquet(field, name, path)
    return str(kind)


def require_parquet(field: str, name: str, path: Path) -> None:
    """Refuse, with a ValueError, a file that a setting names and that does not begin and end as Parquet's do."""
    with path.open("rb") as file:
        start, size = file.read(4), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        end = file.read(8)
    if start != end[4:] or start not in (b"PAR1", b"PARE") or int.from_bytes(end[:4], "little") + 12 > size:
        raise ValueError(
            f"{field} = {name!r} cannot be read as parquet: it does not begin and end as such files do, and may have "
            "been cut off. Fix it, or give another."
        )


def first_rows(field: str, name: str) -> Iterator[dict[str, Any]]:
    """The first rows of a file, as its format has them; none where reading them needs a library.

    A ValueError says which line of a file of JSON lines is not one, which of a table has more fields than its header,
    that a list is broken or not of objects, or that there are no rows.
    """
    path = local_path(field, name)
    suffix, found = path.suffix.lower(), False
    if suffix not in {*_LINES, *_DELIMITERS} and (suffix != ".json" or path.stat().st_size > _WHOLE):
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # Excel begins a file by a mark of its encoding
            if suffix in _DELIMITERS:
                rows = _fields(file, _DELIMITERS[suffix], field, name)
            else:
                rows = (_lines if suffix in _LINES else _listed)(file, field, name)
            for row in islice(rows, ROWS):
                found = True
                yield row
    except UnicodeDecodeError as error:
        raise ValueError(f"{field} = {name!r} cannot be read as text: {error}. Save it as UTF-8.") from error
    if not found:
        raise ValueError(f"{field} = {name!r} holds no rows; give a file that does, and leave out this one.")


def _fields(file: Iterable[str], delimiter: str, field: str, name: str) -> Iterator[dict[str, Any]]:
    rows = csv.DictReader(file, delimiter=delimiter, strict=True)  # pandas goes on to the next quote in silence
    try:
        columns = list(rows.fieldnames or ())
        twice = next((column for column in columns if column and columns.count(column) > 1), None)
        if twice is not None:
            raise ValueError(f"{field} = {name!r}: the header has two columns {twice!r}; rename one, or leave it out.")
        for row in rows:
            more: Any = row.pop(None, None)  # where the standard library puts them
            if more is not None and not _is_otherwise_parted(columns):  # Datasets would take the first for a row's name
                raise ValueError(
                    f"{field} = {name!r}: line {rows.line_num} has {len(columns) + len(more)} fields, and the header "
                    f'{len(columns)}; put texts that hold {delimiter!r} into "quotes", or fix the line.'
                )
            yield row
    except csv.Error as error:
        raise ValueError(
            f"{field} = {name!r}: line {rows.line_num + 1} cannot be read ({error}); a text that begins with a quote "
            'ends with one, before the next field, and quotes within it are written twice: "".'
        ) from error


def _is_otherwise_parted(columns: Sequence[str]) -> bool:
    return len(columns) == 1 and re.search(r"[;\t|,]", columns[0]) is not None


def _lines(file: Iterable[str], field: str, name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        where = f"{field} = {name!r}: line {number}"
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}); fix the line; one list is a .json file.") from error
        if isinstance(row, dict):
            yield row
        elif line.strip():
            raise ValueError(f"{where} is no JSON object; give one a line.")


def _listed(file: IO[str], field: str, name: str) -> Iterator[dict[str, Any]]:
    try:
        held = json.load(file)
    except (json.JSONDecodeError, RecursionError) as error:
        if getattr(error, "msg", "") != "Extra data":
            raise ValueError(f"{field} = {name!r} is not JSON: {error}. Mend it, or give another.") from error
        file.seek(0)
        yield from _lines(file, field, name)
        return
    for number, row in enumerate(held if isinstance(held, list) else [held], 1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{field} = {name!r}: row {number} is no JSON object; give a list of objects, or one a line."
            )
        yield row


def missing_column(field: str, name: str, columns: Iterable[str]) -> ValueError:
    """That rows have no column that a setting names, with those that they have and the task that takes them."""
    columns = list(columns)
    shown = ", ".join(each if each == each.strip() else repr(each) for each in columns)
    whole = " Columns are parted by commas, in .tsv by tabs." if _is_otherwise_parted(columns) else ""
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
