"""What an optimizer's step costs on the weights of the paper's LLaMA models, beside its peers and the physical floor.

    make bench                                       # all shapes and dtypes: about half an hour on 2 cores
    make bench ARGS="--quick"                        # the small shapes in bfloat16, a minute
    make bench ARGS="--shapes 350m --dtype bfloat16 --plot step.png"

Weights and gradients are random and of the true shapes; there is no model and no data. Each contender has a process of
its own, and they step in turn, so that what else the machine does falls on all of them alike.
"""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import peers, report
from benchmarks.measure import Case, Outcome, measure
from benchmarks.screen import machine, progress_bar, told, warn_if_busy


class Shapes(str, Enum):
    """The models of `LLAMA`."""

    LLAMA_60M = "60m"
    LLAMA_350M = "350m"


class Dtype(str, Enum):
    """The precisions of the paper's runs and of exact comparisons."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


def run(cases: list[Case], console: Console) -> list[Outcome]:
    """Measure the cases one after the other, with a progress bar and its estimated end."""
    outcomes = []
    with progress_bar(console) as progress:
        for case in cases:
            title = f"{case.shapes} {case.dtype}"
            task = progress.add_task(title, total=case.units)

            def advance(doing: str, task: Any = task, title: str = title) -> None:
                progress.update(task, description=f"{title}: {doing}", advance=1)

            outcomes.append(measure(case, advance))
            progress.remove_task(task)
    return outcomes


def main(
    shapes: Annotated[list[Shapes] | None, typer.Option(help="Weights of which LLaMA; repeat for more.")] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="Of weights and gradients; repeat for more.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Ordinary steps of each contender.")] = 15,
    stagger_steps: Annotated[int, typer.Option(min=0, help="Steps with staggered renewal; 0: none.")] = 400,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch in each process.")] = torch.get_num_threads(),
    quick: Annotated[bool, typer.Option("--quick", help="60m in bfloat16 and few steps.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, raw times included, in place of tables.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the ordinary steps into this PNG file.")] = None,
) -> None:
    """Time a step and a renewal of every contender and print our figures against their bars."""
    if quick:
        shapes, dtype = shapes or [Shapes.LLAMA_60M], dtype or [Dtype.BFLOAT16]
        rounds, stagger_steps = min(rounds, 5), 0
    cases = [
        Case(shapes=shape.value, dtype=name.value, rounds=rounds, stagger_steps=stagger_steps, threads=threads)
        for shape in shapes or Shapes
        for name in dtype or Dtype
    ]
    about = machine(threads)
    messages = Console(stderr=True, quiet=quiet)
    warn_if_busy(about, messages)
    try:
        for peer in peers.PEERS.values():
            peers.install(peer)
        outcomes = run(cases, messages)
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    if as_json:
        print(json.dumps({"machine": about, "cases": [report.record(outcome) for outcome in outcomes]}, indent=1))
    else:
        console = Console()
        console.print(told(about), highlight=False)
        console.print(*(report.tables(outcome) for outcome in outcomes), sep="\n")
    if plot is not None:
        report.draw(outcomes, plot)
        messages.print(f"The chart is in {plot}")


if __name__ == "__main__":
    typer.run(main)
