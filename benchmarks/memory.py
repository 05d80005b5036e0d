"""How much memory whole training steps of a LLaMA take above the weights, under every method, and what it consists of.

    python -m benchmarks.memory                                  # LLaMA 350M in bfloat16, one sequence: minutes
    python -m benchmarks.memory --quick                          # a tiny model
    python -m benchmarks.memory --preset llama-60m --methods fused/backward/8bit --plot memory.png

Each method runs alone in a process of its own, with the library's defaults; renewals by turns are among the steps. On a
CPU the peak is the resident set of the process, and its C library is told to give freed memory back at once, so that
what is measured is what a method needs at a time; on a GPU it is what torch has allocated.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import peers, training_report
from benchmarks.footprint import AT_ONCE_BYTES
from benchmarks.methods import REFERENCE
from benchmarks.report import Bar, bar_table
from benchmarks.screen import machine, progress_bar, told
from benchmarks.training import Training
from benchmarks.training_options import (
    LLAMA_350M,
    THREADS,
    BatchOption,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    MethodsOption,
    PresetOption,
    RankOption,
    ThreadsOption,
    TokensOption,
    trainings,
)
from benchmarks.turns import Figures, one_by_one

DEFAULT_METHODS = (
    "adamw/per-layer",
    "galore-1.0",
    "galore-1.0/per-layer",
    "full/step",
    "projected/step",
    "fused/step",
    "full/backward",
    "fused/backward",
    "full/backward/8bit",
    "fused/backward/8bit",
)
AT_MOST = {"full/backward/8bit": 0.40, "fused/backward/8bit": 0.40, "fused/step": 0.60}
"""Peak over the reference's: LLaMA 350M in bfloat16, rank 256, one sequence of 256."""

THRIFTY = {"MALLOC_MMAP_THRESHOLD_": str(AT_ONCE_BYTES), "MALLOC_TRIM_THRESHOLD_": str(AT_ONCE_BYTES)}
"""Makes glibc return freed memory at once."""


def bars(results: dict[str, Figures], training: Training) -> list[Bar]:
    """Return our figures against their bars, if this is the case that has bars."""
    if (training.hidden, training.layers, training.tokens, training.rank) != (1024, 24, 256, 256):
        return []
    if training.dtype != "bfloat16":
        return []
    reference = results[REFERENCE].highest_bytes
    kept = [
        Bar(what=f"peak of {name} / {REFERENCE}'s", value=results[name].highest_bytes / reference, at_most=at_most)
        for name, at_most in AT_MOST.items()
        if name in results
    ]
    peer, ours = "galore-1.0/per-layer", "fused/backward"
    if peer in results and ours in results:
        ratio = results[ours].highest_bytes / results[peer].highest_bytes
        kept.append(Bar(what=f"peak of {ours} / {peer}'s", value=ratio, at_most=1.0))
    return kept


def run(asked: list[Training], steps: int, console: Console) -> dict[str, Figures]:
    """Measure the methods, with a progress bar and its estimated end."""
    with progress_bar(console) as progress:
        task = progress.add_task("starting", total=len(asked) * (1 + steps))

        def advance(doing: str) -> None:
            progress.update(task, description=doing, advance=1)

        return one_by_one(asked, steps, advance, THRIFTY)


def main(  # noqa: PLR0913 (a command's options are its arguments)
    preset: PresetOption = LLAMA_350M,
    tokens: TokensOption = None,
    batch: BatchOption = None,
    dtype: DtypeOption = Dtype.BFLOAT16,
    rank: RankOption = None,
    methods: MethodsOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each method after the first.")] = 3,
    device: DeviceOption = Device.CPU,
    threads: ThreadsOption = THREADS,
    quick: Annotated[bool, typer.Option("--quick", help="The smallest model and few steps.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, raw figures included.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the memory into this PNG file.")] = None,
) -> None:
    """Measure the peak memory of every method, one after the other. Without --tokens a step is one sequence."""
    messages = Console(stderr=True, quiet=quiet)
    about = machine(threads)
    chosen = "llama-tiny" if quick else preset.value
    fields: dict[str, Any] = {"gap": 200, "stagger": True, "device": device.value, "threads": threads}
    try:
        asked = trainings(
            [one.value for one in methods or []] or DEFAULT_METHODS,
            preset=chosen,
            sequences=1,
            tokens=tokens,
            batch=batch,
            dtype=dtype.value,
            rank=rank,
            **fields,
        )
        peers.install(peers.GALORE_1)
        results = run(asked, min(rounds, 2) if quick else rounds, messages)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from error
    show(results, asked, about, as_json=as_json)
    if plot is not None:
        training_report.draw(results, asked[0], plot, times=False)
        messages.print(f"The chart is in {plot}")


def show(results: dict[str, Figures], asked: list[Training], about: dict[str, Any], *, as_json: bool) -> None:
    """Print what was measured."""
    kept = bars(results, asked[0])
    if as_json:
        record = training_report.record(results, asked)
        record["bars"] = [{"what": bar.what, "value": bar.value, "at_most": bar.at_most} for bar in kept]
        print(json.dumps({"machine": about, **record}, indent=1))
        return
    console = Console()
    console.print(told(about), highlight=False)
    console.print(training_report.memory_table(results, asked[0]))
    if kept:
        console.print(bar_table(kept))


if __name__ == "__main__":
    typer.run(main)
