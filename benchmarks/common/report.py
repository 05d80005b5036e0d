"""Rows of figures: held to their bars, which stand in bars.toml, printed as tables, and drawn as a chart."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

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


@dataclass(kw_only=True)
class Sheet:
    """A table: a row each, and a column for each figure that any row has."""

    title: str | None = None
    rows: Mapping[str, Mapping[str, Any]]  # by the row's words, and the figure's, which may name its unit after a comma
    caption: str = ""
    last: int = 0  # how many rows at the end are set apart
    drawn: Sequence[str] = ()  # the figures that the chart shows of each row, one on the other
    unit: str = ""  # of those

    def table(self) -> Table:
        """Return it as a table."""
        columns = list(dict.fromkeys(name for figures in self.rows.values() for name in figures))
        made = Table(title=self.title, caption=self.caption, pad_edge=False, collapse_padding=True, box=box.SIMPLE_HEAD)
        for number, name in enumerate(["", *columns]):
            made.add_column(name.replace(", ", "\n"), justify="right" if number else "left", no_wrap=True)
        for number, (row, figures) in enumerate(self.rows.items(), 1):
            cells = (shown(figures[name]) if name in figures else "" for name in columns)
            made.add_row(row, *cells, end_section=number == len(self.rows) - self.last)
        return made


@dataclass(kw_only=True)
class Report:
    """All that a benchmark has to say, in every form that can be asked for."""

    title: str
    record: dict[str, Any] = field(default_factory=dict)  # every raw figure, as JSON
    sheets: list[Sheet] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)

    @classmethod
    def of(cls, title: str, rows: Mapping[str, Mapping[str, Any]]) -> "Report":
        """Return that of one table, whose figures are all there is."""
        return cls(title=title, record={"rows": rows}, sheets=[Sheet(title=title, rows=rows)])


def shown(value: Any) -> str:
    """A figure as it is printed: three digits of a fraction, "-" for what is not known here.

    >>> shown(0.012345), shown(1234.56), shown(7), shown(None)
    ('0.0123', '1,235', '7', '-')
    """
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")
    return "-" if value is None else f"{value:,}" if type(value) is int else str(value)


def bar_sheet(bars: Iterable[Bar]) -> Sheet:
    """Return figures against their bars."""
    verdicts = {True: "[green]kept[/]", False: "[red]missed[/]"}
    return Sheet(
        rows={bar.what: {"measured": bar.value, "at most": bar.at_most, "": verdicts[bar.kept]} for bar in bars}
    )


def draw(report: Report, path: Path) -> None:
    """Draw the figures of the sheets that have some to draw, one beside the other, and save the picture."""
    from matplotlib.figure import Figure

    sheets = [sheet for sheet in report.sheets if sheet.drawn]
    size = (1 + 5 * len(sheets), 1.9 + 0.35 * max(len(sheet.rows) for sheet in sheets))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    for axis, sheet in zip(figure.subplots(1, len(sheets), squeeze=False)[0], sheets, strict=True):
        lefts = [0.0] * len(sheet.rows)
        for name in sheet.drawn:
            widths = [float(figures.get(name, 0.0)) for figures in sheet.rows.values()]
            axis.barh(list(sheet.rows), widths, left=lefts, label=name)
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        axis.legend(fontsize="small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        axis.invert_yaxis()  # the first on top
        axis.set_xlabel(sheet.unit)
    figure.suptitle(report.title, fontsize="medium")
    figure.savefig(path)
