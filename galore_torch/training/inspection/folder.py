"""The folder of an inspection: there with all of its files, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def require_free(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        ValueError: when it does, or is no folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out = {str(out)!r} exists and is no empty folder; choose another --out.")


def write(made: Mapping[str, bytes], out: Path) -> None:
    """Write all files in one move: the folder holds all of them, or is as it was.

    Args:
        made: the files by name.
        out: a folder that `require_free` accepts.
    """
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for name, content in made.items():
            (unfinished / name).write_bytes(content)
        os.replace(unfinished, out)  # noqa: PTH105 - onto an empty folder, too
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
