"""``galore compare``: from flags to a plan, its runs and their report."""

import json as json_format
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from galore_torch.training.compare.default_command import FirstByDefault
from galore_torch.training.compare.job import FINETUNE, PRETRAIN, Amount, Job
from galore_torch.training.compare.plan import PLAN, PlannedRun, make_plan, read_plan, require_same_plan
from galore_torch.training.run.command import reported_errors
from galore_torch.training.run.files import write_whole
from galore_torch.training.run.signals import exit_status, stoppable
from galore_torch.training.settings.flags import with_settings
from galore_torch.training.settings.methods import METHODS

_FIRST = {
    PRETRAIN.subcommand: """galore compare pretrain --method full --method galore --seed 0 --seed 1
[dim]the tiny LLaMA at the preset's learning rates, over two seeds; pretrain may be left out[/]""",
    FINETUNE.subcommand: """galore compare finetune --task rte --method galore --method lora --seed 0 --seed 1 --seed 2
[dim]a task of GLUE, by the paper's recipe, over three seeds[/]""",
}
_FURTHER = {
    PRETRAIN.subcommand: """galore compare pretrain --method full --method galore --lr galore=0.005 --lr galore=0.01
[dim]learning rates to try for one method; the report shows the best[/]

galore compare pretrain --method galore --method lora --rank 64 --set lora:adapter_rank=48
[dim]a setting of one method, such as a rank at which both keep about as much state[/]""",
    FINETUNE.subcommand: """galore compare finetune --data reviews.csv --model MODEL --lr 1e-4 --lr lora=1e-3
[dim]rows of your own; a learning rate for all methods, and one for lora alone[/]

galore compare finetune --task sft --data chats.jsonl --model MODEL --set galore:rank=8 --set lora:adapter_rank=6
[dim]a causal model, at ranks at which both keep about as much state[/]""",
}


def _examples(*shown: str) -> str:
    return "\n\n".join(["[bold]Examples[/]", *shown]) + "\n"


_RUN = "Comparison"

_Methods = Annotated[
    list[str] | None,
    typer.Option(help=f"A method to compare, repeated: {', '.join(METHODS)}.", rich_help_panel=_RUN),
]
_Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A setting of one method, repeated, such as lora:adapter_rank=2.",
        metavar="METHOD:NAME=VALUE",
        rich_help_panel=_RUN,
    ),
]
_Rates = Annotated[
    list[str] | None,
    typer.Option(
        help=r"Peak learning rate to try, repeated; METHOD=X for one method. [dim]\[default: the preset's][/]",
        metavar="[METHOD=]X",
        rich_help_panel=_RUN,
    ),
]
_OthersRates = Annotated[
    list[str] | None,
    typer.Option(
        help="The same for what is never projected: embeddings, head, norms.",
        metavar="[METHOD=]X",
        rich_help_panel=_RUN,
    ),
]
_Seeds = Annotated[list[int] | None, typer.Option(help="Seed, repeated.", rich_help_panel=_RUN)]
_Out = Annotated[
    Path | None,
    typer.Option(help=r"Folder. [dim]\[default: runs/compare-NAME of preset or task][/]", rich_help_panel=_RUN),
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the runs and how much each sees; make none.", rich_help_panel=_RUN)
]
_ReportOnly = Annotated[
    bool, typer.Option("--report-only", help="Make no runs; report on those there are.", rich_help_panel=_RUN)
]
_Json = Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.", rich_help_panel=_RUN)]


def commands() -> typer.Typer:
    """``galore compare``: one command for each job, pretrain where none is named."""
    app = typer.Typer(cls=FirstByDefault, rich_markup_mode="rich", help=_HELP, epilog=_examples(*_FIRST.values()))
    for job in (PRETRAIN, FINETUNE):
        shown = _examples(_FIRST[job.subcommand], _FURTHER[job.subcommand])
        app.command(job.subcommand, epilog=shown)(_command(job))
    return app


_HELP = """Compare methods under one recipe, at equal data: every learning rate with every seed, one run after another.

Without pretrain or finetune, pretrain is meant. Each has all settings of the command of its name."""


def _command(job: Job) -> Callable[..., None]:
    presets: Any = typer.Option(help=f"What to start from: {', '.join(job.presets)}.", rich_help_panel=_RUN)

    def compare(
        *,
        preset: Annotated[str | None, presets] = None,
        method: _Methods = None,
        sets: _Sets = None,
        lr: _Rates = None,
        others_lr: _OthersRates = None,
        seed: _Seeds = None,
        out: _Out = None,
        dry_run: _DryRun = False,
        report_only: _ReportOnly = False,
        json: _Json = False,
        **given: Any,
    ) -> None:
        settings = {name: value for name, value in given.items() if value is not None}
        folder = out or Path("runs") / f"compare-{job.title(preset, settings)}"
        console = Console(stderr=json)
        with stoppable(lambda: f"Stopped. What is in {folder} is kept; the same command goes on."):
            with reported_errors(f"galore compare {job.subcommand}"):
                rates = (lr or (), others_lr or (), seed or (0,))
                runs = make_plan(job, preset, method or job.methods, *rates, settings, sets or ())
                require_same_plan(folder / PLAN, job, runs, needed=report_only)
                if dry_run:
                    _show_plan(runs, console)
                    return
                ended = report_only or _make(job, runs, folder, console)
            with reported_errors(f"galore compare {job.subcommand}"):
                _tell(job, runs, folder, console, json=json, ended=ended)

    compare.__doc__ = f"""Compare methods on {job.doing}, at equal data: every learning rate with every seed.

    The folder gets a run folder each, report.html and results.json. After Ctrl-C or a crash the same command goes on.
    """
    return with_settings(compare, job.sections, job.presets, job.shown)


def _show_plan(runs: list[PlannedRun], console: Console) -> None:
    for run in runs:
        console.print(f"{run.label}: {run.amount}", soft_wrap=True, highlight=False, markup=False)
    whole = Amount(sum(run.amount.count for run in runs), runs[0].amount.unit)
    console.print(f"{len(runs)} runs, {whole} in all", highlight=False)


def _make(job: Job, runs: list[PlannedRun], out: Path, console: Console) -> bool:
    from galore_torch.training.compare.runs import make_runs

    return make_runs(job, runs, out, console, shlex.join(["galore", *sys.argv[1:]]))


def _tell(job: Job, runs: list[PlannedRun], out: Path, console: Console, *, json: bool, ended: bool) -> None:
    from galore_torch.training.compare.report import report
    from galore_torch.training.compare.results import as_json, compared, gather, notes, table

    outcomes = gather(runs, out)
    if not ended:
        finished = sum(outcome.final is not None for outcome in outcomes)
        line = f"Stopped with {finished} of {len(runs)} runs finished. {out} is saved; the same command goes on."
        Console(stderr=True).print(line, highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(exit_status())
    comparison = compared(job, outcomes)
    results = as_json(comparison)
    write_whole(out / "results.json", json_format.dumps(results, indent=1) + "\n")
    command = read_plan(out / PLAN)["command"]
    report(comparison, out, command).write(out / "report.html")
    if json:
        print(json_format.dumps(results))
    else:
        console.print(table(comparison))
        for note in notes(comparison):
            console.print(note, highlight=False, markup=False)
        console.print(f"report {out}/report.html", soft_wrap=True, highlight=False, markup=False)
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        line = f"galore compare {job.subcommand}: {outcome.run.label} failed: {outcome.error}"
        Console(stderr=True).print(line, highlight=False, soft_wrap=True, markup=False)
    if failed:
        raise typer.Exit(1)
