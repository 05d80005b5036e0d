"""A benchmark's command: its options, its progress, and its figures as tables, as JSON and as a chart."""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.common import products
from benchmarks.common.bars import Bar

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One half of a chart."""

    label: str  # what the heights are, with their unit
    names: list[str]  # of the bars
    parts: dict[str, list[float]]  # the heights of each bar's parts, one on the other
    notes: list[str] = field(default_factory=list)  # at the ends of the bars


@dataclass(kw_only=True)
class Report:
    """All that a benchmark has to say, in every form that can be asked for."""

    title: str
    record: dict[str, Any]
    tables: list[Table]
    bars: list[Bar]
    panels: list[Panel]


def parser(doc: str | None, module: str) -> argparse.ArgumentParser:
    """Return a command line with the options that all benchmarks have."""
    made = argparse.ArgumentParser(
        prog=f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--threads", type=at_least(1), default=torch.get_num_threads(), help="threads of torch in each process"
    )
    made.add_argument("--json", action="store_true", help="print JSON, raw figures included, in place of tables")
    made.add_argument("--quiet", action="store_true", help="no progress")
    made.add_argument("--plot", type=Path, help="draw the figures into this PNG file")
    return made


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a whole number that is not smaller, for argparse."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def run(given: argparse.Namespace, measure: Callable[[argparse.Namespace, Console], Report]) -> None:
    """Measure, and print and draw what came of it."""
    messages = Console(stderr=True, quiet=given.quiet)
    torch.set_num_threads(given.threads)
    about = machine(given.threads)
    if about["load"] > about["cores"] / 4:
        messages.print(f"[yellow]This machine is busy with other work (load {about['load']}): the times will suffer.")
    products.in_float32()
    try:
        report = measure(given, messages)
    except (RuntimeError, ValueError, ImportError) as error:
        raise SystemExit(str(error)) from error
    if given.json:
        bars = [{**asdict(bar), "kept": bar.kept} for bar in report.bars]
        print(json.dumps({"machine": about, **report.record, "bars": bars}, indent=1))
    else:
        console = Console()
        console.print("  ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
        console.print(*report.tables, *([bar_table(report.bars)] if report.bars else []), sep="\n")
    if given.plot is not None:
        draw(report, given.plot)
        messages.print(f"The chart is in {given.plot}")


def machine(threads: int) -> dict[str, Any]:
    """Return what a reader of the figures must know of the machine; `load` is the work of others on it.

    `bfloat16` tells whether `products` takes the place of torch's own kernels.
    """
    return {
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": threads,
        "bfloat16": "native" if products.bfloat16_is_native() else "multiplied in float32",
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


class Phases(Progress):
    """A progress bar for one phase after the other, each with an estimated end of its own; it goes when it is done."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:<40}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        # Paces of more than half a minute, which is as far as it looks back by default, need an estimate too.
        super().__init__(*columns, console=console, transient=True, speed_estimate_period=600)
        self._title, self._task = "", self.add_task("starting", total=None)

    def begin(self, title: str, total: int) -> None:
        """Begin a phase of so many parts."""
        if not self.console.is_terminal:
            self.console.print(title, highlight=False)
        self._title = title
        self.reset(self._task, description=title, total=total)

    def count(self, doing: str = "") -> None:
        """Count one part, which does this."""
        self.update(self._task, description=": ".join(filter(None, (self._title, doing))), advance=1)


def table(
    title: str | None, headings: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", last: int = 0
) -> Table:
    """Return a table that fits 80 columns: the first column is words, the others are figures.

    So many of the last rows are set apart.
    """
    made = Table(title=title, caption=caption or None, pad_edge=False, collapse_padding=True)
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="right" if number and heading else "left", no_wrap=True)
    cells = list(rows)
    for number, row in enumerate(cells, 1):
        made.add_row(*row, end_section=number == len(cells) - last)
    return made


def bar_table(bars: Iterable[Bar]) -> Table:
    """Return figures against their bars as a table."""
    verdicts = {True: "[green]kept[/]", False: "[red]missed[/]"}
    rows = [(bar.what, f"{bar.value:.4g}", f"{bar.at_most:.4g}", verdicts[bar.kept]) for bar in bars]
    return table(None, ("galore-torch 2", "measured", "at most", ""), rows)


def draw(report: Report, path: Path) -> None:
    """Draw bars, one panel beside the other, and save the picture."""
    import matplotlib.pyplot as plt

    count, longest = len(report.panels), max(len(panel.names) for panel in report.panels)
    size = (1 + 5 * count, 1.9 + 0.35 * longest)
    figure, axes = plt.subplots(1, count, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], report.panels, strict=True):
        lefts = [0.0] * len(panel.names)
        for part, widths in panel.parts.items():
            drawn = axis.barh(panel.names, widths, left=lefts, label=part)
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        if panel.notes:
            axis.bar_label(drawn, labels=panel.notes, padding=3)
        if len(panel.parts) > 1:
            axis.legend(fontsize="small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        axis.invert_yaxis()  # the first on top
        axis.margins(x=0.12)
        axis.set_xlabel(panel.label)
    figure.suptitle(report.title, fontsize="medium")
    figure.savefig(path, dpi=150)
    plt.close(figure)
