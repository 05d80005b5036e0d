"""Local files of text: which are meant, of which kind they are, and whether they can be read.

Nothing here imports a library that takes seconds: what is missing is told before any is.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from galore_torch.training.run.files import digest_of_file
from galore_torch.training.run.names import is_written_as_path, local_path, require_on_hub
from galore_torch.training.text.config import DataConfig
from galore_torch.training.text.rows import first_rows, missing_column

_SUFFIXES = {
    "parquet": (".parquet",),
    "json": (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst"),
    "csv": (".csv",),
    "text": (".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".py", ".c", ".h", ".cpp", ".js", ".ts", ".java",
             ".go", ".rs", ".sh"),
}  # fmt: skip
_NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_LOOKED_AT, _BEGINNING = 1000, 1 << 20  # files, and bytes of one


@dataclass(frozen=True)
class LocalFiles:
    """Files that hold the documents, in order, and what of a folder is left out."""

    kind: str  # text, csv, json or parquet
    paths: list[Path]
    left_out: list[Path]  # those of a folder that are empty or of no kind of text

    @cached_property
    def digest(self) -> str:
        """A digest of what is in them."""
        return digest_of(self.paths)

    def folder(self, cache: Path) -> Path:
        """Where in a cache the tables that are made of them are kept: other files, or other contents, have another."""
        return cache / "documents" / f"{self.kind}-{self.digest[:32]}"


def local_files(config: DataConfig) -> LocalFiles | None:
    """The files that ``config.data`` names; None if it names a data set of the Hub."""
    if config.data == "stdlib":
        kind, paths = "text", _standard_library()
    else:
        path = local_path("data", config.data)
        if not path.exists():
            if is_written_as_path(config.data) or config.data.endswith(tuple(chain(*_SUFFIXES.values()))):
                raise ValueError(f"data = {config.data!r} does not exist; give an existing file or folder, or stdlib.")
            return None
        return _of_one_kind(path, config)
    return LocalFiles(kind, paths, [])


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not _NOT_SOURCES.intersection(path.relative_to(root).parts)]
    if not files:
        raise ValueError(f"data = 'stdlib' found no sources in {root}; give a file or folder of your own.")
    return sorted(files)


def _of_one_kind(path: Path, config: DataConfig) -> LocalFiles:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    kinds: dict[str, list[Path]] = {}
    for file in files:
        fitting = [kind for kind, suffixes in _SUFFIXES.items() if file.name.lower().endswith(suffixes)]
        for kind in fitting or (["text"] if path.is_file() else []):
            if file.stat().st_size:
                kinds.setdefault(kind, []).append(file)
    if len(kinds) != 1:
        if files and not any(file.stat().st_size for file in files):
            raise ValueError(f"data = {config.data!r} is empty; give a file or folder that holds text.")
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
    for path in files.paths[:_LOOKED_AT] if config.data != "stdlib" else ():
        with path.open("rb") as file:
            start = file.read(_BEGINNING)
        if files.kind == "text" and path.suffix != ".gz":
            decode(path, start, final=len(start) < _BEGINNING)
        elif files.kind == "csv" or path.suffix == ".jsonl":
            for row in first_rows("data", str(path)):
                if config.text_column not in row:
                    raise missing_column("text_column", config.text_column, row)
                break


def decode(path: Path, text: bytes, *, final: bool = True) -> str:
    """UTF-8 as text; a ValueError names the file that is none."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(text, final)
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text ({error}); convert it or leave it out.") from error


def digest_of(files: Iterable[Path]) -> str:
    """A digest of what is in some files, in their order, whatever their names and times are."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(digest_of_file(file).encode())
    return whole.hexdigest()
