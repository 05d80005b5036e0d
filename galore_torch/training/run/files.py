"""Files that are there whole or not at all, whatever stops the process that writes them, or the machine."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one move: a reader, or a crash, finds the old text or the new one, never half of it.

    Args:
        path: the file; its folder is made if it is missing.
        text: what it is to hold, kept as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = being_written(path)
    unfinished.write_text(text, encoding="utf-8")
    sync(unfinished)
    os.replace(unfinished, path)  # noqa: PTH105


def being_written(path: Path) -> Path:
    """Where `write_whole` writes before it moves the file to its place; a killed process leaves it behind."""
    return path.with_name(f"{path.name}.unfinished")


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk, so that it outlasts a loss of power."""
    if path.is_dir():
        if os.name != "posix":  # elsewhere a folder cannot be opened, and needs not be
            return
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
        return
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def take_back(files: Iterable[Path], folders: Iterable[Path] = ()) -> None:
    """Remove files that this process has made, and those of its folders that nobody has put anything into.

    Args:
        files: with what a killed `write_whole` leaves of them; those that are not there are passed over.
        folders: inner ones first.
    """
    for file in files:
        file.unlink(missing_ok=True)
        being_written(file).unlink(missing_ok=True)
    for folder in folders:
        with suppress(OSError):  # somebody else's file is in it, or it was never made
            folder.rmdir()
