"""Training steps of LLaMA-7B on a CPU, in less than 24 GiB: how long they take, what memory, and of what kind.

    python -m benchmarks.llama_7b                                # 8-bit GaLore, 8-bit bases, bfloat16 weights
    python -m benchmarks.llama_7b --basis-bits 4 --weight-bits 8 --checkpointing
    python -m benchmarks.llama_7b --layers 2 --plot steps.png    # two of its layers, to try

The model is the preset llama-7b, 6.7 billion parameters, with random weights that are made layer by layer. It is
trained on one piece of real text, the same in every step, so that its loss must fall. Every basis is found in the first
step. The C library is told to give freed memory back at once, so that the peak is what the steps need at a time.
"""

import gc
import json
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks import llama_7b_floor as floors
from benchmarks import llama_7b_report as report
from benchmarks import products
from benchmarks.footprint import Footprint, give_back_at_once, stored_bytes
from benchmarks.llama_7b_model import Case, build_model, build_optimizer
from benchmarks.llama_7b_steps import Step, Steps
from benchmarks.report import bar_table
from benchmarks.screen import machine, progress_bar, told, warn_if_busy
from benchmarks.training_options import THREADS, ThreadsOption
from galore_torch.optim import state_bytes


class Gradients(str, Enum):
    """How gradients are formed."""

    FULL = "full"
    FUSED = "fused"


class BasisBits(str, Enum):
    """In what bases are kept."""

    SIXTEEN = "16"
    EIGHT = "8"
    FOUR = "4"


class WeightBits(str, Enum):
    """In what attention and MLP weights are kept."""

    SIXTEEN = "16"
    EIGHT = "8"


class Phases:
    """A progress bar for one phase after the other, each with an estimated end of its own.

    Args:
        progress: Where it is drawn.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)

    def begin(self, what: str, total: int) -> None:
        """Begin a phase of so many parts."""
        if not self._progress.console.is_terminal:
            self._progress.console.print(what, highlight=False)
        self._progress.reset(self._task, description=what, total=total)

    def advance(self) -> None:
        """Count one part."""
        self._progress.advance(self._task)


def run(case: Case, steps: int, floor_rounds: int, console: Console) -> report.Outcome:
    """Build the model, train it and time the floor.

    Args:
        case: What to train.
        steps: How many steps.
        floor_rounds: How often each part of the floor is timed; 0 leaves it out.
        console: Where progress is shown.
    """
    give_back_at_once()
    footprint = Footprint("cpu")
    footprint.forget()
    with progress_bar(console) as progress:
        phases = Phases(progress)
        phases.begin("making the weights", case.layers)
        start_s = time.perf_counter()
        model = build_model(case, phases.advance)
        building_s = time.perf_counter() - start_s
        building_bytes = footprint.base_bytes + footprint.peak_bytes()
        optimizer = build_optimizer(model, case)
        training = Steps(model, optimizer, case, footprint, phases.advance)
        taken = []
        for number in range(1, steps + 1):
            what = "finding every basis" if number == 1 else "training"
            phases.begin(f"step {number} of {steps}: {what}", case.weight_count)
            taken.append(training.step())
            console.print(_line(number, taken[-1]), highlight=False)
        training.close()
        state = report.State.of(optimizer, state_bytes(optimizer))
        del optimizer, training  # their memory is the floor's now
        gc.collect()
        floor = None
        if floor_rounds:
            phases.begin("timing the floor", floors.parts(case) * floor_rounds)
            floor = floors.measure(model, case, floor_rounds, phases.advance)
    return report.Outcome(
        case=case,
        steps=taken,
        base_bytes=footprint.base_bytes,
        building_s=building_s,
        building_bytes=building_bytes,
        weight_bytes=stored_bytes([*model.parameters(), *model.buffers()]),
        state=state,
        floor=floor,
    )


def _line(number: int, step: Step) -> str:
    return (
        f"step {number}: loss {step.loss:.4f}, {step.ordinary_s:.1f} s and {step.renewal_s:.1f} s for {step.renewed} "
        f"bases, {step.peak_bytes / report.GIB:.2f} GiB"
    )


def main(  # noqa: PLR0913 (a command's options are its arguments)
    steps: Annotated[int, typer.Option(min=1, help="Steps; the first finds every basis.")] = 3,
    gradients: Annotated[Gradients, typer.Option(help="How gradients are formed.")] = Gradients.FUSED,
    basis_bits: Annotated[BasisBits, typer.Option(help="In what bases are kept.")] = BasisBits.EIGHT,
    weight_bits: Annotated[
        WeightBits, typer.Option(help="In what attention and MLP weights are kept.")
    ] = WeightBits.SIXTEEN,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Let the backward compute activations again.")
    ] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Left out, the preset's.", show_default=False)] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens a step.")] = 256,
    layers: Annotated[int | None, typer.Option(min=1, help="Left out, all; fewer to try.", show_default=False)] = None,
    learning_rate: Annotated[float, typer.Option(help="Of every weight, constant.")] = 1e-3,
    floor_rounds: Annotated[
        int, typer.Option(min=0, help="How often each part of the floor is timed; 0 leaves it out.")
    ] = 2,
    threads: ThreadsOption = THREADS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, raw figures included.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw time and memory into this PNG file.")] = None,
) -> None:
    """Train LLaMA-7B for some steps on this machine's CPU."""
    messages = Console(stderr=True, quiet=quiet)
    torch.set_num_threads(threads)
    about = machine(threads)
    warn_if_busy(about, messages)
    products.in_float32()
    case = Case.of_preset(
        layers=layers,
        rank=rank,
        tokens=tokens,
        gradients=gradients.value,
        basis_bits=int(basis_bits.value),
        weight_bits=int(weight_bits.value),
        checkpointing=checkpointing,
        learning_rate=learning_rate,
    )
    try:
        outcome = run(case, steps, floor_rounds, messages)
    except (RuntimeError, ValueError, ImportError) as error:
        raise SystemExit(str(error)) from error
    show(outcome, about, as_json=as_json)
    if plot is not None:
        report.draw(outcome, plot)
        messages.print(f"The chart is in {plot}")


def show(outcome: report.Outcome, about: dict[str, Any], *, as_json: bool) -> None:
    """Print what was measured."""
    if as_json:
        print(json.dumps({"machine": about, **report.record(outcome)}, indent=1))
        return
    console = Console()
    console.print(told(about), highlight=False)
    console.print(report.tables(outcome))
    kept = report.bars(outcome)
    if kept:
        console.print(bar_table(kept))


if __name__ == "__main__":
    typer.run(main)
