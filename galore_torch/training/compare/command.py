"""``galore compare``: from options to a plan, its runs and their report."""

import json as json_format
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from galore_torch.training.compare.plan import JOBS, PLAN, PlannedRun, make_plan, read_plan, require_same_plan
from galore_torch.training.compare.results import as_json, compare, final_record, notes, read_end, table
from galore_torch.training.compare.runs import make_runs, print_line
from galore_torch.training.run.command import FAILED, Command, Json, option, reported_errors, this_command
from galore_torch.training.run.files import write_whole
from galore_torch.training.run.job_command import Amount, JobCommand
from galore_torch.training.run.names import trackers
from galore_torch.training.run.processes import gathered, is_first
from galore_torch.training.run.signals import NOTHING_WRITTEN, Screen, stoppable
from galore_torch.training.settings.config import TrainConfig
from galore_torch.training.settings.fields import given_settings
from galore_torch.training.settings.methods import METHODS

_HELP = """Compare methods under one recipe, at equal data: every learning rate with every seed, one run after another.

Without pretrain or finetune, pretrain is meant. Each has all settings of the command of its name."""

_EXAMPLES = {
    "pretrain": {
        "--method full --method galore --seed 0 --seed 1": "the tiny LLaMA at the preset's learning rates, over two "
        "seeds; pretrain may be left out",
        "--method full --method galore --lr galore=0.005 --lr galore=0.01": "learning rates to try for one method; the "
        "report shows the best",
        "--method galore --method lora --rank 64 --set lora:adapter_rank=48": "a setting of one method, such as a rank "
        "at which both keep about as much state",
    },
    "finetune": {
        "--task rte --method galore --method lora --seed 0 --seed 1 --seed 2": "a task of GLUE, by the paper's recipe, "
        "over three seeds",
        "--data reviews.csv --model MODEL --lr 1e-4 --lr lora=1e-3": "rows of your own; a learning rate for all "
        "methods, and one for lora alone",
        "--task sft --data chats.jsonl --model MODEL --set galore:rank=8 --set lora:adapter_rank=6": "a causal model, "
        "at ranks at which both keep about as much state",
    },
}


def _examples(shown: int, *names: str) -> str:
    """The first examples of each job, for the end of a help."""
    lines = [
        f"galore compare {name} {options}\n[dim]{what}[/]"
        for name in names
        for options, what in list(_EXAMPLES[name].items())[:shown]
    ]
    return "\n\n".join(["[bold]Examples[/]", *lines]) + "\n"


_METHOD = option(f"A method to compare, repeated: {', '.join(METHODS)}.")
_SET = option("A setting of one method, repeated, such as lora:adapter_rank=2.", "--set", metavar="METHOD:NAME=VALUE")
_LR_HELP = r"Peak learning rate to try, repeated; METHOD=X for one method. [dim]\[default: the preset's][/]"
_LR = option(_LR_HELP, metavar="[METHOD=]X")
_OTHERS_LR = option("The same for what is never projected: embeddings, head, norms.", metavar="[METHOD=]X")


class _PretrainByDefault(TyperGroup):
    """Puts the first command's name before options that follow none; ``--help`` remains the group's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = [next(iter(self.commands)), *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


def commands() -> typer.Typer:
    """``galore compare``: one command for each job, pretrain where none is named."""
    app = typer.Typer(cls=_PretrainByDefault, rich_markup_mode="rich", help=_HELP, epilog=_examples(1, *JOBS))
    for name, job in JOBS.items():
        app.command(name, cls=Command, epilog=_examples(3, name))(_command(job))
    return app


def _command(job: JobCommand) -> Callable[..., None]:
    presets = option(f"What to start from: {', '.join(job.presets.presets)}.")

    def command(
        *,
        preset: Annotated[str | None, presets] = None,
        method: Annotated[list[str] | None, _METHOD] = None,
        sets: Annotated[list[str] | None, _SET] = None,
        lr: Annotated[list[str] | None, _LR] = None,
        others_lr: Annotated[list[str] | None, _OTHERS_LR] = None,
        seed: Annotated[list[int] | None, option("Seed, repeated.")] = None,
        out: Annotated[Path | None, option(r"Folder. [dim]\[default: runs/compare-NAME of preset or task][/]")] = None,
        dry_run: Annotated[bool, option("Print the runs and how much each sees; make none.", "--dry-run")] = False,
        report_only: Annotated[bool, option("Make no runs; report on those there are.", "--report-only")] = False,
        json: Json = False,
        **given: Any,
    ) -> None:
        given = given_settings(given)
        folder = out or Path("runs") / f"compare-{given.get('task') or preset or job.presets.default(given)}"
        console = Screen(stderr=json, quiet=not is_first())
        runs: list[PlannedRun] = []
        with stoppable(lambda: _stopped(runs, folder)), reported_errors(f"galore compare {job.name}"):
            rates = (lr or (), others_lr or (), seed or (0,))
            runs += make_plan(job, preset, method or job.methods, *rates, given, sets or ())
            require_same_plan(folder / PLAN, job, runs, needed=report_only)
            if dry_run:
                _show_plan(runs, console)
                return
            if not report_only:
                runs[0].config.require_there()
                for run in runs:
                    TrainConfig.require_there(run.config)  # libraries; what else there must be is the same for all
                trackers(runs[0].config.schedule.report_to)
                make_runs(job, runs, folder, console, this_command())
            failed = is_first() and _report(job, runs, folder, console, json=json)
            if gathered(failed)[0]:  # in all processes, so that all launchers start them anew
                raise typer.Exit(FAILED)

    doing = job.presets.config.doing
    command.__doc__ = f"""Compare methods on {doing}, at equal data: every learning rate with every seed.

    The folder gets a run folder each, report.html and results.json. After Ctrl-C or a crash the same command goes on.
    """
    return job.with_settings(command)


def _stopped(runs: Sequence[PlannedRun], out: Path) -> str:
    if not (out / PLAN).exists():
        return NOTHING_WRITTEN
    finished = sum(final_record(run, out) is not None for run in runs)
    return f"Stopped with {finished} of {len(runs)} runs finished. {out} is saved; the same command goes on."


def _show_plan(runs: Sequence[PlannedRun], console: Console) -> None:
    for run in runs:
        print_line(console, f"{run.label}: {run.amount}")
    whole = Amount(sum(run.amount.count for run in runs), runs[0].amount.unit)
    print_line(console, f"{len(runs)} runs, {whole} in all")


def _report(job: JobCommand, runs: Sequence[PlannedRun], out: Path, console: Console, *, json: bool) -> bool:
    """Write the report and show its table; returns whether a run has failed."""
    from galore_torch.training.compare.report import report  # and with it matplotlib and Transformers

    comparison = compare(job, [read_end(run, out) for run in runs])
    results = as_json(comparison)
    write_whole(out / "results.json", json_format.dumps(results, indent=1) + "\n")
    report(comparison, out, read_plan(out / PLAN)["command"]).write(out / "report.html")
    if json:
        print(json_format.dumps(results))
    else:
        console.print(table(comparison))
        for line in (*notes(comparison), f"report {out}/report.html"):
            print_line(console, line)
    failed = [end for end in comparison.ends if end.error]
    for end in failed:
        print_line(Console(stderr=True), f"galore compare {job.name}: {end.run.label} failed: {end.error}")
    return bool(failed)
