"""A disk that is full or may not be written to: known again in what every library makes of it, and reported."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_FAILED_WRITES = frozenset(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EIO") if hasattr(errno, name)
)
# What torch says, and then safetensors, tokenizers and Arrow, whose errors are not the system's.
_TORCH = "PytorchStreamWriter failed|unexpected pos \\d+|file write failed"
_OTHERS = "no space left|disk quota exceeded|read-only file system|file too large|os error (28|122|30|27|5)\\b"


def failed_write(error: BaseException) -> str | None:
    """What the system said of a write that failed, by an error or one of its causes; None if none is about a write."""
    for each in _with_causes(error):
        if isinstance(each, OSError) and each.errno in _FAILED_WRITES:
            return f"{each.strerror}: {each.filename}" if each.filename else str(each.strerror)
        # A ValueError is about what was asked for, and says more.
        if not isinstance(each, ValueError) and re.search(f"{_OTHERS}|{_TORCH}", str(each), re.IGNORECASE):
            words = str(each).strip().splitlines()[0].rstrip(".")
            return f"no more could be written, as to a full disk ({words})" if re.search(_TORCH, words) else words
    return None


def raise_failed_write(error: BaseException) -> None:
    """Raise an OSError if a write has failed, for what a library has made of it reads as if the data were wrong."""
    words = failed_write(error)
    if words is not None:
        raise OSError(errno.ENOSPC, words) from error


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            todo += [each.__context__, each.__cause__]


def nearest_folder(path: Path) -> Path:
    """The folder that a path is, is in, or would be made in: the nearest one there is, or a file in its place."""
    path = path.absolute()
    return path if path.is_dir() else next(each for each in path.parents if each.exists())


def free_bytes(path: Path) -> int:
    """What is free on the disk that a path is on, or would be."""
    return shutil.disk_usage(nearest_folder(path)).free
