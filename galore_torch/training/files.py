"""Files that are there whole or not at all, whatever stops the process that writes them."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one move: a reader, or a crash, finds the old text or the new one, never half of it.

    Args:
        path: the file; its folder is made if it is missing.
        text: what it is to hold, kept as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)  # noqa: PTH105
