"""Files of rows: of which kind a file is, and its first rows as its format has them, with what is wrong in which line.

Nothing here imports a library that takes seconds: what is missing is told before any is.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from galore_torch.training.run.names import is_written_as_path, local_path

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
ROWS = 100_000  # of a file that are looked at
_WHOLE = 1 << 26  # bytes of a list that is read to see that it is one
csv.field_size_limit((1 << 31) - 1)  # a document may be longer than the 131,072 characters of the standard library


def kind_of(path: Path) -> str | None:
    """What Datasets calls the kind of a file of such a name: text, csv, tsv, json or parquet; None of any other."""
    return next((kind for kind, suffixes in _SUFFIXES.items() if path.name.lower().endswith(suffixes)), None)


def is_hub_name(field: str, name: str) -> bool:
    """Whether what a setting names can only be on the Hub: no file has that name, and none is meant."""
    path = local_path(field, name)
    return not (path.exists() or kind_of(path) or is_written_as_path(name) or name.count("/") > 1)


def require_rows(field: str, name: str) -> str:
    """Refuse, with a ValueError, what is no file of rows that can be read; the kind of one that is, is returned."""
    path = local_path(field, name)
    kind = kind_of(path)
    if not path.exists():
        raise ValueError(
            f"{field} = {name!r} does not exist; give one that exists, of CSV, TSV, JSON lines or Parquet."
        )
    if kind in (None, "text") or not path.is_file():
        wrong = "is a folder; give one file" if path.is_dir() else "is no file of rows; convert it, or give one"
        raise ValueError(f"{field} = {name!r} {wrong}: CSV, TSV, JSON lines or Parquet.")
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
            if more is not None and not is_otherwise_parted(columns):  # Datasets would take the first for a row's name
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


def is_otherwise_parted(columns: Sequence[str]) -> bool:
    """Whether the one column of a table seems to be several, which another sign than its format's parts."""
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
