"""How fast whole training steps of a LLaMA are, and how much memory they take, under every method.

    python -m benchmarks.steps                                   # LLaMA 350M in bfloat16: an hour on 2 cores
    python -m benchmarks.steps --quick                           # a tiny model, a minute
    python -m benchmarks.steps --measure memory --preset llama-60m --methods galore-8bit/full --plot memory.png
    python -m benchmarks.steps --measure speed --methods galore/fused --methods galore-1.0
    python -m benchmarks.steps --measure mlp-block               # the linear layers of one MLP of LLaMA-7B alone

A method is called as by `galore pretrain --method`; after the slash it says how its gradients are formed. Each has a
process of its own; the tokens are random and of the preset's sequence length.

* Speed, beside full-rank AdamW and the physical floor: all step in turn, 16 sequences a step, and no layer renews.
* Memory above the weights, and what it consists of: methods run one by one, one sequence a step, with the library's
  defaults; renewals by turns are among the steps. On a CPU the peak is the resident set of the process, and its C
  library has to give freed memory back at once, so that what is measured is what a method needs at a time; on a GPU
  it is what torch has allocated.
"""

import argparse
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from benchmarks.common import command, peers
from benchmarks.common.floor import Speeds, demand
from benchmarks.common.methods import METHODS, REFERENCE, SIXTEEN_BIT
from benchmarks.common.optimizer_step import RARELY
from benchmarks.common.report import Report
from benchmarks.common.rounds import WARM_UP, interleaved, one_by_one
from benchmarks.common.sizes import LLAMA
from benchmarks.common.training import Training
from benchmarks.steps import mlp_block, report

MEMORY_METHODS = [*SIXTEEN_BIT, "galore-8bit-per-layer/full", "galore-8bit-per-layer/fused"]
MEASURED: dict[str, dict[str, Any]] = {
    "speed": {"methods": SIXTEEN_BIT, "sequences": 16, "quick sequences": 8, "rounds": 5, "gap": RARELY},
    "memory": {"methods": MEMORY_METHODS, "sequences": 1, "quick sequences": 1, "rounds": 3, "gap": 200},
}
"""What measurements of whole steps have where options do not tell."""
MLP_BLOCK = "mlp-block"


def trainings(given: argparse.Namespace, measured: str) -> list[Training]:
    """Return what the command line asks for: the reference, then the other methods."""
    own = MEASURED[measured]
    size = LLAMA["tiny" if given.quick else given.preset.removeprefix("llama-")]
    size = replace(size, rank=given.rank or size.rank, gap=own["gap"])
    tokens = given.tokens or size.sequence * own["quick sequences" if given.quick else "sequences"]
    names = given.methods or own["methods"]
    if given.batch is not None and not given.methods:  # all that can
        names = [name for name in names if METHODS[name].update == "step"]
    return [
        Training(
            name=name,
            method=METHODS[name],
            size=size,
            tokens=tokens,
            batch=given.batch or max(1, tokens // size.sequence),
            stagger=measured == "memory",
            dtype=given.dtype,
            device=given.device,
            threads=given.threads,
            thrifty=measured == "memory",
        )
        for name in dict.fromkeys([REFERENCE, *names])
    ]


def run(given: argparse.Namespace, messages: Console) -> Report:
    """Measure what is asked for."""
    if given.measure == MLP_BLOCK:
        size, rounds = mlp_block.SMALL if given.quick else mlp_block.LLAMA_7B, _rounds(given, "speed")
        with command.Phases(messages) as phases:
            phases.begin(MLP_BLOCK, 2 * rounds)
            return mlp_block.report(size, mlp_block.measure(size, rounds, phases.count))
    plans = {measured: trainings(given, measured) for measured in ([given.measure] if given.measure else MEASURED)}
    for training in (one for plan in plans.values() for one in plan):
        if training.method.peer:
            peers.install(training.method.peer)
    made = Report(title=next(iter(plans.values()))[0].title)
    for measured, plan in plans.items():
        first, rounds, starts = plan[0], _rounds(given, measured), {one.name: one.start for one in plan}
        floors_s: dict[str, float] = {}
        with command.Phases(messages) as phases:
            if measured == "speed":
                phases.begin(measured, len(plan) * (1 + WARM_UP + rounds))
                speeds = Speeds(training=first)
                results = interleaved(starts, rounds, phases.count, first.device, speeds.measure)
                floors_s = {one.name: speeds.floor_s(demand(one)) for one in plan}
                made.sheets.append(report.time_sheet(results, first, floors_s))
            else:
                phases.begin(measured, len(plan) * (1 + rounds))
                results = one_by_one(starts, rounds, phases.count)
        made.sheets.append(report.memory_sheet(results, first))
        made.bars += report.bars(results, first, measured)
        methods = {name: asdict(one) for name, one in results.items()}
        made.record[measured] = {"training": asdict(first), "methods": methods, "floors_s": floors_s}
    return made


def _rounds(given: argparse.Namespace, measured: str) -> int:
    rounds: int = given.rounds or MEASURED[measured]["rounds"]
    return min(rounds, 2) if given.quick else rounds


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = command.parser(__doc__, "benchmarks.steps")
    add, number, presets = made.add_argument, command.at_least(1), [f"llama-{name}" for name in LLAMA]
    every = f"repeat for more; {REFERENCE} is always measured: {', '.join(METHODS)}"
    add("--measure", choices=[*MEASURED, MLP_BLOCK], help=f"left out: {' and '.join(MEASURED)}")
    add("--preset", choices=presets, default="llama-350m", help="which LLaMA (llama-350m)")
    add("--tokens", type=number, help="tokens a step")
    add("--batch", type=number, help="sequences at once; left out, all of a step")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights (bfloat16)")
    add("--rank", type=number, help="left out, the preset's")
    add("--methods", action="append", choices=list(METHODS), metavar="METHOD", help=every)
    add("--rounds", type=number, help="ordinary steps of each method (speed 5, memory 3)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the steps run (cpu)")
    add("--quick", action="store_true", help="the smallest model, few tokens and steps")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Measure whole training steps of every method, and print them."""
    command.run(parser().parse_args(arguments), run)


if __name__ == "__main__":
    main()
