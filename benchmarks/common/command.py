"""What every benchmark's command shares: its options, its progress, and how it is run."""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.common import bf16_products
from benchmarks.common.report import Report, bar_sheet, draw


def described(doc: str | None, module: str) -> argparse.ArgumentParser:
    """Return a command line without options, which describes itself as the module does."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=doc, formatter_class=raw)


def parser(doc: str | None, module: str) -> argparse.ArgumentParser:
    """Return a command line with the options that most benchmarks have."""
    made = described(doc, module)
    add = made.add_argument
    add("--threads", type=at_least(1), default=torch.get_num_threads(), help="threads of torch in each process")
    add("--json", action="store_true", help="print JSON, raw figures included, in place of tables")
    add("--quiet", action="store_true", help="no progress")
    add("--plot", type=Path, help="draw the figures into this PNG file")
    return made


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a whole number that is not smaller, for argparse."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def some_of(names: Iterable[str], only: str, command: argparse.ArgumentParser) -> list[str]:
    """Return those of the names that `--only` lists, with commas between; one that is unknown is an error."""
    wanted = [name for name in only.split(",") if name]
    if unknown := [name for name in wanted if name not in names]:
        command.error(f"--only names {', '.join(unknown)}; choose from {', '.join(names)}")
    return wanted


def run(given: argparse.Namespace, measure: Callable[[argparse.Namespace, Console], Report]) -> None:
    """Measure, and print and draw what came of it, below what a reader of the figures must know of the machine."""
    messages = Console(stderr=True, quiet=given.quiet)
    torch.set_num_threads(given.threads)
    machine = {
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": given.threads,
        "bfloat16": "multiplied in float32" if bf16_products.in_float32() else "native",
        "load": round(os.getloadavg()[0], 2),  # the work of others on it
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if os.getloadavg()[0] > (os.cpu_count() or 1) / 4:
        messages.print(f"[yellow]This machine is busy with other work (load {machine['load']}): the times will suffer.")
    try:
        report = measure(given, messages)
    except (RuntimeError, ValueError, ImportError) as error:
        raise SystemExit(str(error)) from error
    if given.json:
        tables = [{"title": sheet.title, "rows": sheet.rows} for sheet in report.sheets]
        bars = [bar.record() for bar in report.bars]
        print(json.dumps({"machine": machine, **report.record, "tables": tables, "bars": bars}, indent=1))
    else:
        console = Console()
        console.print("  ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)
        sheets = [*report.sheets, *([bar_sheet(report.bars)] if report.bars else [])]
        console.print(*(sheet.table() for sheet in sheets), sep="\n")
    if given.plot is not None:
        draw(report, given.plot)
        messages.print(f"The chart is in {given.plot}")


class Phases(Progress):
    """A progress bar for one phase after the other, each with an estimated end of its own; it goes when it is done."""

    def __init__(self, console: Console) -> None:
        text = TextColumn("{task.description:<40}")
        columns = (text, BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
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
