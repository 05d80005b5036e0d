"""``galore finetune``: from flags to a run, and from its result to the screen."""

from __future__ import annotations

import dataclasses
import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from galore_torch.training.finetune.presets import PRESETS, configure
from galore_torch.training.run.errors import told, writes_told
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.stopping import RunLeft, exit_status, left_of, stoppable
from galore_torch.training.run.units import duration, megabytes
from galore_torch.training.settings.methods import TUNING, described

if TYPE_CHECKING:
    from galore_torch.training.finetune.run import FinetuneResult

SHOWN = "glue-rank4"
"""The preset whose values ``--help`` shows."""

EPILOG = f"""[bold]Examples[/]

galore finetune --task rte
[dim]RoBERTa on a task of GLUE, by the paper's recipe at rank 4[/]

galore finetune --data reviews.csv --text-column review --label-column stars --model MODEL
[dim]rows of your own: classes or numbers, as the labels are[/]

galore finetune --task sft --data chats.jsonl --model FOLDER --gguf-file NAME.gguf
[dim]a causal model on messages, prompt and completion, or text[/]

galore finetune --resume --out runs/rte
[dim]go on after Ctrl-C[/]

{described(TUNING)}"""

_RUN = "Run"


def finetune(
    *,
    preset: Annotated[
        str | None,
        typer.Option(help=f"Recipe to start from: {', '.join(PRESETS)}; by default the task's.", rich_help_panel=_RUN),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help=f"What is trained, and how: {', '.join(TUNING)}.", rich_help_panel=_RUN)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings.", rich_help_panel=_RUN)] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make.", rich_help_panel=_RUN)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, by its own settings.", rich_help_panel=_RUN)
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel=_RUN)
    ] = False,
    **given: Any,
) -> None:
    """Fine-tune a model: classes or numbers of texts, or a causal model on examples.

    The run folder gets config.toml, metrics.jsonl, predictions.jsonl, the model with its tokenizer and loss.png.
    Ctrl-C finishes the step, saves a checkpoint and says how to go on.
    """
    others = {"preset": preset, "method": method, "config": config}
    left = RunLeft("galore finetune")
    with stoppable(left):
        _finetune(others, given, out=out, resume=resume, json=json, left=left)


def _finetune(
    others: dict[str, Any], given: dict[str, Any], *, out: Path | None, resume: bool, json: bool, left: RunLeft
) -> None:
    """What `finetune` does with its options, ``others`` being those that name settings by the dozen."""
    console = Console(stderr=json)
    with told("galore finetune"):
        if resume:
            folder = RunFolder.to_resume(out, {**others, **given})
        else:
            settings = configure(others["preset"], others["config"], method=others["method"], **given)
            folder = out or Path("runs") / f"{settings.data.task}-{others['method'] or settings.title}"
            RunFolder(folder).require_new()
        left.at_work_in(folder, resumed=resume)
        with console.status("Loading Transformers"):
            from galore_torch.training.finetune.run import new_run, resumed_run
        run = resumed_run(folder, console=console) if resume else new_run(settings, folder, console=console)
    with writes_told("galore finetune", lambda: left_of(run.folder, "galore finetune")):
        result = run.train()
    if json:
        print(json_format.dumps(dataclasses.asdict(result)))
    else:
        show(result, console)
    if not result.finished:
        raise typer.Exit(exit_status())


def show(result: FinetuneResult, console: Console) -> None:
    """Print what a run came to, and what to do with it."""
    if not result.finished:
        console.print(
            f"Stopped after step {result.step:,}. It is saved in {result.checkpoint}; go on with:", markup=False
        )
        console.print(f"  galore finetune --resume --out {result.out}", soft_wrap=True, highlight=False, markup=False)
        return
    scores = "  ".join(f"{name} {value:.4f}" for name, value in result.scores.items())
    console.print(
        f"{scores}  optimizer state {megabytes(result.state_bytes)}  "
        f"peak memory {megabytes(result.peak_memory_bytes)}  {duration(result.seconds)} of training",
        soft_wrap=True,
    )
    console.print(f"model {result.out}/model  predictions {result.out}/predictions.jsonl", soft_wrap=True, markup=False)
