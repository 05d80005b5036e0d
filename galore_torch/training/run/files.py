"""Files that are there whole or not at all, whatever stops the process that writes them, and one process at a time.

``manifest.json`` has size and SHA-256 of each file of a folder, by which later damage is told from what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from galore_torch.training.run.disk import nearest_folder

MANIFEST = "manifest.json"

_CHUNK = 1 << 20  # bytes


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


def take_back(files: Iterable[Path], folders: Iterable[Path] = ()) -> None:
    """Remove files that this process has made, and those of its folders, inner ones first, that nobody else uses."""
    for file in files:
        file.unlink(missing_ok=True)
        being_written(file).unlink(missing_ok=True)
    for folder in folders:
        with suppress(OSError):  # somebody else's file is in it, or it was never made
            folder.rmdir()


def require_empty(out: Path, besides: Collection[Path] = ()) -> None:
    """Refuse, with a ValueError, a folder that holds something besides some files, written whole or not, or is none."""
    known = {*besides, *map(being_written, besides)}
    if out.exists() and not (out.is_dir() and known.issuperset(out.iterdir())):
        raise ValueError(f"out = {str(out)!r} exists and is not an empty folder; choose another --out.")


def require_writable(field: str, path: Path) -> None:
    """Refuse, with a ValueError, a file or folder that could not be made: before the work, not after it.

    Args:
        field: the setting that names it.
        path: where it would be.
    """
    there = nearest_folder(path)
    try:  # the permissions that files show are not all there are
        os.rmdir(tempfile.mkdtemp(dir=there))  # noqa: PTH106
        why = None
    except OSError as error:
        why = error.strerror
    if why is not None:  # without that error, which names the trial
        raise ValueError(f"{field} = {str(path)!r} cannot be made in {there}: {why}; choose another --{field}.")


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


def write_manifest(folder: Path) -> None:
    """Write down size and digest of each file of a folder."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest_of_file(folder / name)}
        for name in sorted(_files_in(folder))
    }
    write_whole(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def _files_in(folder: Path) -> set[str]:
    """All files by their names from the folder on, but locks and the manifest."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix() for path in found}


def _entries(folder: Path) -> list[tuple[str, int, str]]:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return [(str(name), int(each["bytes"]), str(each["sha256"])) for name, each in files.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is not a manifest") from error


def damage(folder: Path) -> str | None:
    """What is wrong with the first file that is not as the manifest says; None if all is as it was written."""
    try:
        known = _entries(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    for name, size, digest in known:
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if digest_of_file(path) != digest:
                return f"{name} is not as it was written: its SHA-256 has changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:  # the second: no name of a file
            return f"{name!r} cannot be read ({error})"
    return None


def require_whole(field: str, name: str, folder: Path) -> None:
    """Refuse, with a ValueError, a folder that is not as its manifest says, which a setting has named."""
    wrong = damage(folder)
    if wrong is not None:
        raise ValueError(
            f"{field} = {name!r}: {folder} is damaged: {wrong}. Restore it from a copy; if you have changed it "
            f"yourself, remove {folder / MANIFEST}."
        )


def digest_of_file(path: Path) -> str:
    """The SHA-256 of what is in a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def kept(folder: Path) -> Iterator[Path]:
    """Hold a folder of a cache, made if it is missing, while it is read or filled: one process at a time.

    What another process does in it is waited for. If a file is damaged or missing, or one is there that nobody has
    finished, the folder is emptied first, so that all of it is made again. If the body fails, what it has put there
    goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if damage(folder) is not None or {name for name, *_ in _entries(folder)} != _files_in(folder):
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        before = _files_in(folder)
        try:
            yield folder
        except BaseException:
            for made in _files_in(folder) - before:
                (folder / made).unlink(missing_ok=True)
            raise
        if _files_in(folder) != before:
            write_manifest(folder)


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
