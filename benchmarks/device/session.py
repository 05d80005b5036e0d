"""A run of the parts: the device, the time that is left, and where figures go."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


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
    def left_s(self) -> float:
        """The seconds that the part has left."""
        return self.deadline - time.monotonic()

    def tell(self, row: str, figures: Figures) -> None:
        """Print what was measured, and keep it in the part's file.

        Args:
            row: What the figures are of.
            figures: By name; numbers, words, or lists of them.
        """
        self.rows.setdefault(self.part, {}).setdefault(row, {}).update(figures)
        print(f"  {row}: {', '.join(f'{name} {shown(value)}' for name, value in figures.items())}", flush=True)
        path = self.out / f"{self.part}.json"
        path.write_text(json.dumps(self.rows[self.part], indent=1) + "\n")

    def try_row(self, row: str, measure: Callable[[], Figures], *, needs_s: float = 0.0) -> None:
        """Measure one row, if there is time; what fails is told in its place, and the others go on.

        Args:
            row: What is measured.
            measure: Gives the figures.
            needs_s: Seconds that it takes, about: not started with less.
        """
        if self.left_s <= (0 if self.small else needs_s):
            self.tell(row, {"left out": "no time"})
            return
        try:
            figures = measure()
        except Exception as error:
            figures = {"failed": f"{type(error).__name__}: {error}"[:300]}
        self.tell(row, figures)


def shown(value: Any) -> str:
    """A figure as it is printed: three digits of a fraction, "-" for what is not known here.

    >>> shown(0.012345), shown(1234.56), shown(7), shown(None)
    ('0.0123', '1235', '7', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
