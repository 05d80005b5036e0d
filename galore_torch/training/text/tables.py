"""Files of rows, read by Datasets as what they are: a name is a name, and what is in the file is what is read.

Datasets takes names for patterns (``g[1].csv`` for ``g1.csv``) and keeps what it has read by a file's name and time,
which the files of an unpacked archive share. Here a name is literal, and what is kept is its caller's to choose.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

_CHAIN = "::"  # what Datasets reads as an address within an archive, and no escape hides


def read_table(kind: str, files: Iterable[Path], cache: Path, *, in_memory: bool = False) -> datasets.Dataset:
    """Read files of rows, by what Datasets calls their kind (csv, json, parquet) and by their literal paths.

    Datasets keeps what it reads in the cache, which must be the files' own. If it is to go again, the
    rows are kept ``in_memory``.

    Raises:
        ValueError: when a name cannot be given to Datasets.
        Exception: of many kinds, from pandas, Arrow and Datasets, when a file is not what it should be.
    """
    names = [str(file.resolve()) for file in files]
    for name in names:
        if _CHAIN in name:
            raise ValueError(
                f"{name!r} has {_CHAIN!r} in its name, which stands for a file inside an archive; rename it."
            )
    rows: Any = datasets.load_dataset(
        kind,
        data_files=[glob.escape(name) for name in names],
        split="train",
        cache_dir=str(cache),
        keep_in_memory=in_memory or None,
    )
    return rows
