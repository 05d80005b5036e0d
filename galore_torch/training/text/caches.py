"""Folders of a cache: each is used by one process at a time, and only if all in it is as it was written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from galore_torch.training.run.manifest import MANIFEST, damage, listed, write_manifest


@contextmanager
def kept(folder: Path) -> Iterator[Path]:
    """Hold a folder of a cache while it is read or filled.

    What another process does in it is waited for. If a file is damaged or missing, or one is there that nobody has
    finished, the folder is emptied first, so that all of it is made again.

    Args:
        folder: of the cache; made if it is missing.

    Yields:
        The folder, whole or empty. If the body fails, what it has put there goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not _is_whole(folder):
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        before = _files(folder)
        try:
            yield folder
        except BaseException:
            for made in _files(folder) - before:
                (folder / made).unlink(missing_ok=True)
            raise
        if _files(folder) != before:
            write_manifest(folder)


def _is_whole(folder: Path) -> bool:
    return damage(folder) is None and listed(folder) == _files(folder)


def _files(folder: Path) -> set[str]:
    """All files by their names from the folder on, but locks and the manifest."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if name != MANIFEST and not name.endswith(".lock")}
