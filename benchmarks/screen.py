"""What the benchmarks show beside their tables: the machine, a warning when it is busy, and a progress bar."""

import os
import platform
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import products


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


def told(about: dict[str, Any]) -> str:
    """Return the machine as one line."""
    return "  ".join(f"{key} {value}" for key, value in about.items())


def warn_if_busy(about: dict[str, Any], console: Console) -> None:
    """Say so when others work on the machine."""
    if about["load"] > about["cores"] / 4:
        console.print(f"[yellow]This machine is busy with other work (load {about['load']}): the times will suffer.")


def progress_bar(console: Console) -> Progress:
    """Return a progress bar that counts, and estimates its end; it goes when it is done."""
    columns = (
        TextColumn("{task.description:<40}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Paces of more than half a minute, which is as far as it looks back by default, need an estimate too.
    return Progress(*columns, console=console, transient=True, speed_estimate_period=600)
