"""A run of the parts: the device, the time that is left, and where figures go."""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.report import Sheet, shown
from benchmarks.common.sizes import LLAMA, REHEARSAL, Llama

Figures = dict[str, Any]
Row = tuple[str, Callable[[], Figures], float]
"""A row of a part's table: its name, what measures it, and the seconds that this takes, about."""

TINY = Llama(hidden=64, intermediate=172, layers=24, heads=4, rank=8)
SIZES = {
    "tiny 168": TINY,
    "tiny 224": replace(TINY, layers=32),
    "350m": replace(LLAMA["350m"], sequence=1024),
    "1b": replace(LLAMA["1b"], sequence=1024),
    "7b": replace(LLAMA["7b"], sequence=2048, gap=200),
}
"""Tiny ones have as many weights as 350M and 7B, and nothing to compute: what they cost is the host's time."""

SMALL = {"350m": REHEARSAL, "7b": replace(REHEARSAL, hidden=48, intermediate=128, layers=2, rank=16)}
"""Two of the names for `--small`."""

WIDE = 44  # characters that a figure may have in a table


@dataclass(kw_only=True)
class Session:
    """What a part is given."""

    device: str  # where it runs: "cuda" or "cpu"
    small: bool  # whether all of it is to take seconds on a CPU
    out: Path  # the folder of the JSON files
    peers: Path  # the folder that holds published optimizers, each in a folder of its own
    deadline: float = float("inf")  # when the part must have ended, by `time.monotonic`
    part: str = ""  # the part that runs
    rows: dict[str, dict[str, Figures]] = field(default_factory=dict)  # what was measured, by part and row

    @property
    def sizes(self) -> dict[str, Llama]:
        """The models by name."""
        return SMALL if self.small else SIZES

    @property
    def left_s(self) -> float:
        """The seconds that the part has left."""
        return self.deadline - time.monotonic()

    def report(self, row: str, figures: Figures) -> None:
        """Print what was measured in a row (numbers, words, or lists of them), and keep it in the part's file."""
        self.rows.setdefault(self.part, {})[row] = figures
        print(f"  {row}: {', '.join(f'{name} {shown(value)}' for name, value in figures.items())}", flush=True)
        path = self.out / f"{self.part}.json"
        path.write_text(json.dumps(self.rows[self.part], indent=1) + "\n")

    def try_row(self, row: str, measure: Callable[[], Figures], needs_s: float = 0.0) -> None:
        """Measure a row, if there are the seconds that it takes; what fails is reported, and others go on."""
        try:
            enough = self.left_s > (0 if self.small else needs_s)
            figures = measure() if enough else {"left out": "no time"}
        except Exception as error:
            figures = {"failed": f"{type(error).__name__}: {error}"[:300]}
        gc.collect()
        gc.freeze()  # what the row imported stays, and is not to be looked through in each of the next ones
        self.report(row, figures)

    def print_tables(self) -> None:
        """Print a table for each part, without what is long, such as lists: the rows above and the files have it."""
        for part, rows in self.rows.items():
            short = {row: {k: v for k, v in one.items() if len(shown(v)) <= WIDE} for row, one in rows.items()}
            Console(width=300, markup=False).print(f"\n{part}", Sheet(rows=short).table(), sep="\n", highlight=False)
