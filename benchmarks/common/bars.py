"""Figures against their bars, which stand in bars.toml."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One figure, in words and in numbers, and what it must not exceed."""

    what: str
    value: float
    at_most: float

    @property
    def kept(self) -> bool:
        """Whether the figure keeps to its bar."""
        return self.value <= self.at_most

    def record(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {**asdict(self), "kept": self.kept}


def limits(benchmark: str, case: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return what figures of a benchmark (a key of bars.toml) must not exceed in a case, by their words.

    >>> limits("step")["ordinary step / the floor"]
    1.25
    """
    entries = tomllib.loads(Path(__file__).with_name("bars.toml").read_text())[benchmark]
    fitting = [entry for entry in entries if entry.get("case", {}).items() <= dict(case or {}).items()]
    return {what: limit for entry in fitting for what, limit in entry["at_most"].items()}


def judged(benchmark: str, case: Mapping[str, Any], figures: Mapping[str, float]) -> list[Bar]:
    """Return those of the figures, by their words, that have a bar in what was measured, such as sizes."""
    known = limits(benchmark, case).items()
    return [Bar(what=what, value=figures[what], at_most=at_most) for what, at_most in known if what in figures]
