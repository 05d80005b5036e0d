"""``make demo``: a tiny LLaMA pre-trained with GaLore, then with full-rank AdamW on the same tokens, side by side.

Each run is a ``galore pretrain`` in a process of its own, so that neither's memory counts for the other, with the
learning rates that suited it best. Further arguments go to both:
``python -m galore_torch.training.compare.demo --steps 800``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from galore_torch.training.compare.process import run_child
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.plots import plot_losses
from galore_torch.training.run.stopping import STOPPED, exit_status, stoppable
from galore_torch.training.run.units import megabytes

RUNS = {"GaLore AdamW": "galore-adamw", "full-rank AdamW": "adamw"}
"""What is compared: the name on the table and the plot, and the optimizer's."""


def demo(parent: Path, flags: Sequence[str] = (), console: Console | None = None) -> Path | None:
    """Train both, print their table and draw their losses.

    Args:
        parent: where the run folders and the picture go.
        flags: further arguments of ``galore pretrain``, for both.
        console: where the table goes.

    Returns:
        The picture, or None if a run was stopped early.

    Raises:
        subprocess.CalledProcessError: when a run fails; it has said why.
    """
    console = console or Console()
    console.rule("[bold]Text", align="left")
    # First, and in a process of its own, so that the work counts for neither run's memory.
    prepared = run_child(_arguments("--prepare", *flags))
    if prepared.stopped:
        console.print("Stopped. Nothing was written.")
        return None
    if prepared.status:
        raise subprocess.CalledProcessError(prepared.status, "pretrain --prepare")
    results: dict[str, dict[str, Any]] = {}
    for label, optimizer in RUNS.items():
        console.rule(f"[bold]{label}", align="left")
        result = _pretrain(optimizer, parent / optimizer, flags)
        if result is None:
            console.print(
                f"Stopped. {parent / optimizer} is not there; finished runs are kept.", soft_wrap=True, markup=False
            )
            return None
        if not result["finished"]:
            console.print(
                f"Stopped. Go on with:  galore pretrain --resume --out {result['out']}", soft_wrap=True, markup=False
            )
            return None
        results[label] = result
    picture = parent / "loss.png"
    plot_losses({label: RunFolder(Path(result["out"])).metrics for label, result in results.items()}, picture)
    console.rule(align="left")
    console.print(table(results))
    console.print(f"losses drawn in {picture}", soft_wrap=True, markup=False)
    return picture


def _pretrain(optimizer: str, out: Path, flags: Sequence[str]) -> dict[str, Any] | None:
    """Run one pre-training in its own process, its progress on our stderr; None if it stopped without a state."""
    arguments = _arguments("--json", "--optimizer", optimizer, "--out", str(out), *flags)
    ended = run_child(arguments)
    if ended.status in STOPPED or ended.stopped:
        return json.loads(ended.output) if ended.output.strip() else None
    if ended.status:
        raise subprocess.CalledProcessError(ended.status, arguments)
    result: dict[str, Any] = json.loads(ended.output)
    return result


def _arguments(*flags: str) -> list[str]:
    return ["pretrain", "--preset", "llama-tiny", *flags]


def table(results: dict[str, dict[str, Any]]) -> Table:
    """The results side by side.

    Args:
        results: by label, the fields of `galore_torch.training.pretrain.run.PretrainResult`.
    """
    first = next(iter(results.values()))
    columns = ("perplexity", "tokens/s", "optimizer state", "peak memory")
    drawn = Table(
        caption=f"{first['parameters']:,} parameters, {first['tokens']:,} tokens each; perplexity on held-out text, "
        "peak memory of the whole process",
        caption_justify="left",
    )
    drawn.add_column("method")
    for column in columns:
        drawn.add_column(column, justify="right")
    for label, result in results.items():
        drawn.add_row(
            label,
            f"{result['perplexity']:,.2f}",
            f"{result['tokens_per_second']:,.0f}",
            megabytes(result["state_bytes"]),
            megabytes(result["peak_memory_bytes"]),
        )
    return drawn


def main() -> None:
    """Run the demo in a folder of its own below ``runs``; the first that is free."""
    parents = (Path("runs") / name for name in chain(["demo"], (f"demo-{number}" for number in count(2))))
    try:
        with stoppable(lambda: "Stopped. Finished runs are kept."):
            picture = demo(next(parent for parent in parents if not parent.exists()), sys.argv[1:])
    except typer.Exit as stopped:
        sys.exit(stopped.exit_code)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    if picture is None:
        sys.exit(exit_status())


if __name__ == "__main__":
    main()
