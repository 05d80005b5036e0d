"""Local files of text: which are meant, what is left out, and whether they can be read.

Nothing here imports a library that takes seconds: what is missing is told before any is.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from galore_torch.training.run.files import digest_of_file
from galore_torch.training.run.names import local_path, require_on_hub
from galore_torch.training.text.config import DataConfig
from galore_torch.training.text.row_checks import missing_column
from galore_torch.training.text.rows import first_rows, is_hub_name, kind_of, require_parquet

_NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_FILES, _BEGINNING = 1000, 1 << 20  # how many files, and bytes of a text, are looked at
_BEGINNING_ROWS = 10_000  # of all files together


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
        kind = kind_of(file) or ("text" if path.is_file() else None)
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
