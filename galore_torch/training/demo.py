"""``make demo``: a tiny LLaMA pre-trained with GaLore, then with full-rank AdamW on the same tokens, side by side.

Each run is a ``galore pretrain`` in a process of its own, so that neither's memory counts for the other, with the
learning rates that suited it best. Further arguments go to both: ``python -m galore_torch.training.demo --steps 800``.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from galore_torch.training.command import STOPPED
from galore_torch.training.plots import plot_losses
from galore_torch.training.run_folder import RunFolder
from galore_torch.training.units import megabytes

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
    subprocess.run(_command("--prepare", *flags), check=True)
    results: dict[str, dict[str, Any]] = {}
    for label, optimizer in RUNS.items():
        console.rule(f"[bold]{label}", align="left")
        results[label] = _pretrain(optimizer, parent / optimizer, flags)
        if not results[label]["finished"]:
            console.print(
                f"Stopped. Go on with:  galore pretrain --resume --out {results[label]['out']}", soft_wrap=True
            )
            return None
    picture = parent / "loss.png"
    plot_losses({label: RunFolder(Path(result["out"])).metrics for label, result in results.items()}, picture)
    console.rule(align="left")
    console.print(table(results))
    console.print(f"losses drawn in {picture}", soft_wrap=True)
    return picture


def _pretrain(optimizer: str, out: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Run one pre-training in its own process, its progress on our stderr, and return its result."""
    command = _command("--json", "--optimizer", optimizer, "--out", str(out), *flags)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        # Ctrl-C reaches the whole process group: let the run save and tell, and wait for it.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            output, _ = process.communicate()
        finally:
            signal.signal(signal.SIGINT, before)
    if process.returncode not in (0, STOPPED):
        raise subprocess.CalledProcessError(process.returncode, command)
    result: dict[str, Any] = json.loads(output)
    return result


def _command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "galore_torch", "pretrain", "--preset", "llama-tiny", *flags]


def table(results: dict[str, dict[str, Any]]) -> Table:
    """The results side by side.

    Args:
        results: by label, the fields of `galore_torch.training.pretrain.RunResult`.
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
        picture = demo(next(parent for parent in parents if not parent.exists()), sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    if picture is None:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
