"""Files that are there whole or not at all, whatever stops the process that writes them, and one process at a time."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout


def write_whole(path: Path, text: str) -> None:
    """Write a text file, as UTF-8, in one move: a reader, or a crash, finds the old text or the new one."""
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
    if path.is_dir() and os.name != "posix":  # where a folder cannot be opened, and needs not be
        return
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def local_path(field: str, name: str) -> Path:
    """The path that a setting names: as it stands if that exists, else with ``~`` as the home folder.

    A ValueError says that no path can have that name.
    """
    path = Path(name)
    try:
        return path if path.exists() else path.expanduser()
    except RuntimeError:  # nobody has such a home
        return path
    except OSError as error:  # too long, for example
        raise ValueError(f"{field} = {name[:80]!r} cannot be a path: {error.strerror}; give another.") from error


def is_written_as_path(name: str) -> bool:
    """Whether a name can only be meant as a path: no name on the Hub begins like that."""
    return name.startswith((".", "/", "~"))


def model_of_run(field: str, name: str) -> str:
    """The folder of the finished model, where a setting names the folder of a run; else the name as it is.

    A ValueError says that the run has none yet.
    """
    run = local_path(field, name)
    if not (run / "config.toml").is_file():
        return name
    if not (run / "model" / "config.json").is_file():
        raise ValueError(
            f"{field} = {name!r} is a run that has no finished model yet; finish it with --resume --out {name}, or "
            "give the folder of one of its checkpoints."
        )
    return str(run / "model")


def take_back(files: Iterable[Path], folders: Iterable[Path] = ()) -> None:
    """Remove files that this process has made, and those of its folders, inner ones first, that nobody else uses."""
    for file in files:
        file.unlink(missing_ok=True)
        being_written(file).unlink(missing_ok=True)
    for folder in folders:
        with suppress(OSError):  # somebody else's file is in it, or it was never made
            folder.rmdir()


def require_empty(out: Path) -> None:
    """Refuse, with a ValueError, a folder that holds something or is none."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out = {str(out)!r} exists and is not an empty folder; choose another --out.")


def write_folder(files: Mapping[str, bytes], out: Path) -> None:
    """Write files, by name, into a folder that is empty, in one move: it holds all of them, or is as it was."""
    unfinished = being_written(out)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for name, content in files.items():
            (unfinished / name).write_bytes(content)
        os.replace(unfinished, out)  # noqa: PTH105 - onto an empty folder, too
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class Lock:
    """A file that at most one process has locked. The system frees it when that process ends, however it ends.

    Args:
        path: the lock's file, in a folder that exists. Beside it stands, for messages, a file that says who holds it.
    """

    def __init__(self, path: Path) -> None:
        self.files = (path, path.with_suffix(".holder"))
        self._lock = FileLock(str(path), thread_local=False)

    @property
    def is_held(self) -> bool:
        """Whether this object holds it."""
        return self._lock.is_locked

    def acquire(self, *, waiting: Callable[[str], None] | None = None) -> bool:
        """Lock it, and return whether that was possible.

        Args:
            waiting: called with the holder before an unlimited wait, where another process holds it; None not to wait.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            if waiting is None:
                return False
            waiting(self.holder())
            self._lock.acquire()
        command, since = " ".join(["galore", *sys.argv[1:2]]), time.strftime("%Y-%m-%d %H:%M:%S")
        write_whole(self.files[1], f"process {os.getpid()} on {socket.gethostname()} ({command}, since {since})\n")
        return True

    def holder(self) -> str:
        """Who holds it, for a message."""
        try:
            return self.files[1].read_text(encoding="utf-8").strip() or "another process"
        except (OSError, ValueError):  # it has only just been acquired
            return "another process"

    def release(self, *, remove: bool = False) -> None:
        """Free it, if this object holds it; ``remove`` its file too, which nobody may be waiting for."""
        if not self.is_held:
            return
        path, holder = self.files
        holder.unlink(missing_ok=True)
        if remove:  # while it is held: whoever has opened it meanwhile sees that it is gone, and makes a new one
            with suppress(PermissionError):  # Windows removes no open file
                path.unlink(missing_ok=True)
        self._lock.release()
        if remove and os.name == "nt":
            with suppress(OSError):
                path.unlink(missing_ok=True)
