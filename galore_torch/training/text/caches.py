"""Folders of a cache: each is used by one process at a time, and only if all in it is as it was written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from galore_torch.training.run.files import damage, files_in, listed, write_manifest


@contextmanager
def kept(folder: Path) -> Iterator[Path]:
    """Hold a folder of a cache, made if it is missing, while it is read or filled.

    What another process does in it is waited for. If a file is damaged or missing, or one is there that nobody has
    finished, the folder is emptied first, so that all of it is made again. If the body fails, what it has put there
    goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if damage(folder) is not None or listed(folder) != files_in(folder):
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        before = files_in(folder)
        try:
            yield folder
        except BaseException:
            for made in files_in(folder) - before:
                (folder / made).unlink(missing_ok=True)
            raise
        if files_in(folder) != before:
            write_manifest(folder)
