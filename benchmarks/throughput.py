"""How fast whole training steps of a LLaMA are, under every method, beside full-rank AdamW and the physical floor.

    python -m benchmarks.throughput                              # LLaMA 350M in bfloat16: an hour on 2 cores
    python -m benchmarks.throughput --quick                      # a tiny model, a minute
    python -m benchmarks.throughput --preset llama-60m --methods fused/step --methods galore-1.0 --plot speed.png
    python -m benchmarks.throughput --mlp-block                  # the linear layers of one MLP of LLaMA-7B alone

The tokens are random and of the preset's sequence length. Each method has a process of its own, and they step in turn.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import mlp_block, peers, products, training_report
from benchmarks.floor import Speeds, demand
from benchmarks.methods import METHODS, REFERENCE, SIXTEEN_BIT
from benchmarks.report import Bar, bar_table
from benchmarks.screen import machine, progress_bar, told, warn_if_busy
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
from benchmarks.turns import WARM_UP, Figures, interleaved

LEAST_GAIN = {"fused/step": 1.15, "full/step": 0.95, "projected/step": 0.95}
"""Tokens per second over the reference's, at least: LLaMA 350M in bfloat16, 4,096 tokens a step, on a CPU."""


def bars(results: dict[str, Figures], training: Training) -> list[Bar]:
    """Return our figures against their bars, if this is the case that has bars."""
    if (training.hidden, training.layers, training.tokens, training.rank) != (1024, 24, 4096, 256):
        return []
    if training.dtype != "bfloat16" or training.device != "cpu":
        return []
    kept = [
        Bar(what=f"step of {name} / {REFERENCE}'s", value=1 / results[name].gain, at_most=1 / least)
        for name, least in LEAST_GAIN.items()
        if name in results
    ]
    peer, ours = "galore-1.0/per-layer", "fused/backward"
    if peer in results and ours in results:
        ratio = results[ours].step_s / results[peer].step_s
        kept.append(Bar(what=f"step of {ours} / {peer}'s", value=ratio, at_most=1.0))
    return kept


def run(asked: list[Training], rounds: int, console: Console) -> tuple[dict[str, Figures], Speeds]:
    """Measure the methods and this machine's speeds, with a progress bar and its estimated end."""
    speeds = Speeds(training=asked[0])
    with progress_bar(console) as progress:
        task = progress.add_task("starting", total=len(asked) * (1 + WARM_UP + rounds))

        def advance(doing: str) -> None:
            progress.update(task, description=doing, advance=1)

        figures = interleaved(asked, rounds, advance, speeds.measure)
    return figures, speeds


def show_mlp_block(rounds: int, threads: int, *, small: bool, as_json: bool, messages: Console) -> None:
    """Measure the linear layers of one MLP block alone, and print them."""
    about = machine(threads)
    torch.set_num_threads(threads)
    block = mlp_block.SMALL if small else mlp_block.LLAMA_7B
    with progress_bar(messages) as progress:
        task = progress.add_task("MLP block", total=rounds)
        seconds = mlp_block.measure(block, rounds, lambda: progress.update(task, advance=1))
    if as_json:
        print(json.dumps({"machine": about, **mlp_block.record(block, seconds)}, indent=1))
        return
    console = Console()
    console.print(told(about), highlight=False)
    console.print(mlp_block.table(block, seconds), bar_table([] if small else [mlp_block.bar(seconds)]))


def main(  # noqa: PLR0913 (a command's options are its arguments)
    preset: PresetOption = LLAMA_350M,
    tokens: TokensOption = None,
    batch: BatchOption = None,
    dtype: DtypeOption = Dtype.BFLOAT16,
    rank: RankOption = None,
    methods: MethodsOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Ordinary steps of each method.")] = 5,
    device: DeviceOption = Device.CPU,
    threads: ThreadsOption = THREADS,
    only_mlp_block: Annotated[
        bool, typer.Option("--mlp-block", help="Time the linear layers of one MLP block of LLaMA-7B instead.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The smallest model, few tokens and steps.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, raw figures included.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw speed and memory into this PNG file.")] = None,
) -> None:
    """Time whole training steps of every method, in turn."""
    messages = Console(stderr=True, quiet=quiet)
    about = machine(threads)
    warn_if_busy(about, messages)
    products.in_float32()
    rounds = min(rounds, 2) if quick else rounds
    if only_mlp_block:
        show_mlp_block(rounds, threads, small=quick, as_json=as_json, messages=messages)
        return
    names = [one.value for one in methods or []] or SIXTEEN_BIT
    if batch is not None and not methods:  # all that can
        names = [name for name in names if not METHODS[name].in_backward]
    fields: dict[str, Any] = {"gap": 10**9, "stagger": False, "device": device.value, "threads": threads}
    try:
        asked = trainings(
            names,
            preset="llama-tiny" if quick else preset.value,
            sequences=8 if quick else 16,
            tokens=tokens,
            batch=batch,
            dtype=dtype.value,
            rank=rank,
            **fields,
        )
        peers.install(peers.GALORE_1)
        torch.set_num_threads(threads)
        figures, speeds = run(asked, rounds, messages)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from error
    floors_s = {one.method: speeds.floor_s(demand(one)) for one in asked}
    show(figures, asked, floors_s, about, as_json=as_json)
    if plot is not None:
        training_report.draw(figures, asked[0], plot, times=True)
        messages.print(f"The chart is in {plot}")


def show(
    figures: dict[str, Figures],
    asked: list[Training],
    floors_s: dict[str, float],
    about: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Print what was measured."""
    kept = bars(figures, asked[0])
    if as_json:
        record = training_report.record(figures, asked, floors_s)
        record["bars"] = [{"what": bar.what, "value": bar.value, "at_most": bar.at_most} for bar in kept]
        print(json.dumps({"machine": about, **record}, indent=1))
        return
    console = Console()
    console.print(told(about), highlight=False)
    console.print(training_report.time_table(figures, asked[0], floors_s))
    console.print(training_report.memory_table(figures, asked[0], heading="Memory of the process"))
    if kept:
        console.print(bar_table(kept))


if __name__ == "__main__":
    typer.run(main)
