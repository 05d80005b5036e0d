"""``galore compare``: from flags to a plan, its runs and their report."""

from __future__ import annotations

import json as json_format
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from galore_torch.training.compare_plan import PRETRAIN, PlannedRun, make_plan, require_same_plan, write_plan
from galore_torch.training.files import write_whole
from galore_torch.training.guard import STOPPED, stoppable
from galore_torch.training.methods import METHODS
from galore_torch.training.presets import DEFAULT_PRESET, PRESETS
from galore_torch.training.telling import told

EXAMPLES = """[bold]Examples[/]

galore compare --method full --method galore --seed 0 --seed 1
[dim]the tiny LLaMA at the preset's learning rates, over two seeds[/]

galore compare --method full --method galore --lr galore=0.005 --lr galore=0.01 --lr full=0.0005 --lr full=0.001
[dim]each method at learning rates of its own; the report shows the best[/]
"""

_RUN = "Comparison"
_METHODS = ("full", "galore")


def compare(
    *,
    preset: Annotated[
        str | None,
        typer.Option(help=f"Model and recipe: {', '.join(PRESETS)}.", rich_help_panel=_RUN),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=rf"A method to compare, repeated: {', '.join(METHODS)}. [dim]\[default: full and galore][/]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    lr: Annotated[
        list[str] | None,
        typer.Option(
            help=r"Peak learning rate to try, repeated; METHOD=X for one method. [dim]\[default: the preset's][/]",
            metavar="[METHOD=]X",
            rich_help_panel=_RUN,
        ),
    ] = None,
    others_lr: Annotated[
        list[str] | None,
        typer.Option(
            help="The same for what is never projected: embeddings, head, norms.",
            metavar="[METHOD=]X",
            rich_help_panel=_RUN,
        ),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed, repeated.", rich_help_panel=_RUN)] = None,
    out: Annotated[
        Path | None, typer.Option(help=r"Folder. [dim]\[default: runs/compare-PRESET][/]", rich_help_panel=_RUN)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs and their tokens; make none.", rich_help_panel=_RUN)
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Make no runs; report on those there are.", rich_help_panel=_RUN)
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the results as one JSON object.", rich_help_panel=_RUN)
    ] = False,
    **given: Any,
) -> None:
    """Compare methods under one recipe, at equal tokens: every learning rate with every seed, one run after another.

    The folder gets a run folder each, report.html and results.json. After Ctrl-C or a crash the same command goes on.
    """  # fmt: skip
    console = Console(stderr=json)
    folder = out or Path("runs") / f"compare-{preset or DEFAULT_PRESET}"
    with stoppable(lambda: f"Stopped. What is in {folder} is kept; the same command goes on."):
        given = {name: value for name, value in given.items() if value is not None}
        with told("galore compare"):
            runs = make_plan(PRETRAIN, preset, method or _METHODS, lr or (), others_lr or (), seed or (0,), given)
            require_same_plan(folder / "plan.json", PRETRAIN, runs)
        if dry_run:
            _show_plan(runs, console)
            return
        _compare(runs, folder, console, json=json, report_only=report_only)


def _show_plan(runs: list[PlannedRun], console: Console) -> None:
    for run in runs:
        console.print(f"{run.label}: {run.tokens:,} tokens", soft_wrap=True, highlight=False)
    console.print(f"{len(runs)} runs, {sum(run.tokens for run in runs):,} tokens in all", highlight=False)


def _compare(runs: list[PlannedRun], out: Path, console: Console, *, json: bool, report_only: bool) -> None:
    from galore_torch.training.compare_report import report
    from galore_torch.training.compare_results import as_json, best_settings, edges, gather, table
    from galore_torch.training.compare_runs import make_runs

    plan = out / "plan.json"
    ended = True
    if not report_only:
        write_plan(plan, PRETRAIN, runs, shlex.join(["galore", *sys.argv[1:]]))
        ended = make_runs(PRETRAIN, runs, out, console)
    outcomes = gather(runs, out)
    if not ended:
        finished = sum(outcome.final is not None for outcome in outcomes)
        line = f"Stopped with {finished} of {len(runs)} runs finished. {out} is saved; the same command goes on."
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
        raise typer.Exit(STOPPED)
    best = best_settings(PRETRAIN, outcomes)
    results = as_json(PRETRAIN, best, outcomes)
    write_whole(out / "results.json", json_format.dumps(results, indent=1) + "\n")
    command = json_format.loads(plan.read_text(encoding="utf-8"))["command"] if plan.exists() else "galore compare"
    report(PRETRAIN, best, outcomes, out, command).write(out / "report.html")
    if json:
        print(json_format.dumps(results))
    else:
        console.print(table(PRETRAIN, best, outcomes))
        for row in best.values():
            note = edges(row, outcomes)
            if note:
                console.print(note, highlight=False)
        console.print(f"report {out}/report.html", soft_wrap=True, highlight=False)
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        line = f"galore compare: {outcome.run.label} failed: {outcome.error}"
        Console(stderr=True).print(line, highlight=False, soft_wrap=True, markup=False)
    if failed:
        raise typer.Exit(1)
