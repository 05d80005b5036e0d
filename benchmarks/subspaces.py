"""How much of a gradient's energy each way of finding a basis captures, on the real gradients of a run.

    python -m benchmarks.subspaces                        # the demo's model on the Python standard library, minutes
    python -m benchmarks.subspaces --steps 120 --update-proj-gap 40

A `galore pretrain` run is made with the default decomposition. At every renewal of every layer each candidate finds a
basis from the same gradient (and the same old basis), and the energy in it is compared with the exact SVD's of the
same rank. What decides is the worst layer and renewal, not the mean. Fastest first; what misses the bar is dim.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.common.report import Sheet, limits
from galore_torch.projection import decompositions, sketches
from galore_torch.projection.decompositions import DECOMPOSITIONS, Axes, Wanted
from galore_torch.training.pretrain.presets import configure
from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run.run import new_run

BAR = 1 - limits("subspaces")["energy missed"]
"""Energy that a basis must capture, of the exact one's."""

Finder = Callable[[Tensor, Wanted], dict[str, Axes]]
Records = dict[str, list[tuple[float, float]]]
"""By candidate, for each layer and renewal: the energy captured, over the exact basis' own, and processor seconds."""


def energy(matrix: Tensor, side: str, basis: Tensor) -> float:
    """Return the squared norm of the projected matrix."""
    return float((basis.mT @ matrix if side == "left" else matrix @ basis).square().sum())


def iteration(start: str, power_iterations: int, oversampling: int, dtype: torch.dtype) -> Finder:
    """Return a subspace iteration with its own constants, from a Gaussian or the old basis, on a cut-down gradient."""

    def find(matrix: Tensor, wanted: Wanted) -> dict[str, Axes]:
        few = mock.patch.object(sketches, "OVERSAMPLING", oversampling)
        with few, mock.patch.object(decompositions, "POWER_ITERATIONS", power_iterations):
            return decompositions._warm(matrix.to(dtype), wanted if start == "old" else replace(wanted, old={}))

    return find


def sketched(matrix: Tensor, wanted: Wanted) -> dict[str, Axes]:
    """Return the basis that is found in a sketch of the gradient."""
    found = decompositions.find_bases(matrix, wanted.ranks, "sketched", seed=wanted.seed)
    return {side: Axes(basis) for side, basis in found.items()}


def candidates() -> dict[str, Finder]:
    """Return the finders that are compared, by start, power iterations, oversampling and precision."""
    found: dict[str, Finder] = {"exact SVD, float32": DECOMPOSITIONS["svd"], "a sketch, extra 16": sketched}
    constants = [(power, extra, torch.float32) for power, extra in ((1, 0), (1, 16), (1, 32), (2, 0), (2, 8), (2, 16))]
    for start in ("Gaussian", "old"):
        for power, extra, dtype in (*constants, (3, 16, torch.float32), (2, 16, torch.bfloat16)):
            name = f"{start}, power {power}, extra {extra}, {str(dtype).removeprefix('torch.')}"
            found[name] = iteration(start, power, extra, dtype)
    return found


def recorder(records: Records, default: Finder) -> Finder:
    """Return a finder that tries all candidates beside the default, and lets the run go on with the default's."""
    tried = candidates()

    def find(matrix: Tensor, wanted: Wanted) -> dict[str, Axes]:
        ((side, rank),) = wanted.ranks.items()
        exact = float(torch.linalg.svdvals(matrix)[:rank].square().sum())
        if side in wanted.old:
            kept = records.setdefault("the old basis, kept", [])
            kept.append((energy(matrix, side, wanted.old[side]) / exact, 0.0))
        for name, finder in tried.items():
            started_s = time.process_time()
            basis = finder(matrix, replace(wanted, seed=1))[side].columns_dr
            seconds = time.process_time() - started_s
            records.setdefault(name, []).append((energy(matrix, side, basis) / exact, seconds))
        return default(matrix, wanted)

    return find


def sheet(records: Records) -> Sheet:
    """Lay the records out, the fastest first."""
    rows: dict[str, dict[str, Any]] = {}
    for name, renewals in records.items():
        energies, seconds = zip(*renewals, strict=True)
        figures = {"worst": f"{min(energies):.4f}", "mean": f"{mean(energies):.4f}", "renewals": len(renewals)}
        figures["ms each"] = f"{1e3 * mean(seconds):.2f}"
        rows[name if min(energies) >= BAR else f"[dim]{name}[/]"] = figures
    rows = dict(sorted(rows.items(), key=lambda row: float(row[1]["ms each"])))
    return Sheet(title=f"energy captured, of the exact basis' (bar at the worst: {BAR})", rows=rows)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of the run.")] = 200,
    update_proj_gap: Annotated[int, typer.Option(min=1, help="Steps between two renewals of a layer.")] = 50,
    preset: Annotated[str, typer.Option(help="The model and its recipe.")] = "llama-tiny",
) -> None:
    """Run, compare and print the table."""
    records: Records = {}
    settings: dict[str, Any] = {"steps": steps, "update_proj_gap": update_proj_gap}
    settings |= {"optim": "galore-adamw", "decomposition": "warm"}
    DECOMPOSITIONS["warm"] = recorder(records, DECOMPOSITIONS["warm"])
    config, console = configure(preset, **settings), Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        result = new_run(Pretraining, config, Path(folder) / "run", console=console).train()
    console = Console()
    console.print(f"{preset}, {result.step} steps, gap {update_proj_gap}, perplexity {result.perplexity:.1f}")
    console.print(sheet(records).table())


if __name__ == "__main__":
    typer.run(main)
