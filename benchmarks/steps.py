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
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks.common import command, peers
from benchmarks.common.cases import RARELY, Training
from benchmarks.common.floor import Speeds, demand
from benchmarks.common.measuring import MIB, Call, in_turn, seconds_of
from benchmarks.common.methods import METHODS, REFERENCE, SIXTEEN_BIT
from benchmarks.common.report import Bar, Report, Sheet, judged
from benchmarks.common.rounds import WARM_UP, RunFigures, interleaved, one_by_one
from benchmarks.common.sizes import LLAMA, Llama

MEMORY_METHODS = [*SIXTEEN_BIT, "galore-8bit-per-layer/full", "galore-8bit-per-layer/fused"]
MEASURED: dict[str, dict[str, Any]] = {
    "speed": {"methods": SIXTEEN_BIT, "sequences": 16, "quick sequences": 8, "rounds": 5, "gap": RARELY},
    "memory": {"methods": MEMORY_METHODS, "sequences": 1, "quick sequences": 1, "rounds": 3, "gap": 200},
}
"""What measurements of whole steps have where options do not tell."""
MLP_BLOCK = "mlp-block"
MLP_SIZES = {True: replace(LLAMA["tiny"], sequence=512), False: replace(LLAMA["7b"], sequence=2048)}
"""Of the MLP block, with `--quick` and without; what goes through it is one sequence."""
PAPERS_GAP = 200
OURS, PEER = "galore-per-layer/fused", "galore-1.0-per-layer"
KINDS = ("gradients", "state", "the rest")
Results = Mapping[str, RunFigures]


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
        size, rounds = MLP_SIZES[given.quick], _rounds(given, "speed")
        with command.Phases(messages) as phases:
            phases.begin(MLP_BLOCK, 2 * rounds)
            return mlp_report(size, measure_mlp(size, rounds, phases.count))
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
                made.sheets.append(time_sheet(results, first, floors_s))
            else:
                phases.begin(measured, len(plan) * (1 + rounds))
                results = one_by_one(starts, rounds, phases.count)
        made.sheets.append(memory_sheet(results, first))
        made.bars += bars(results, first, measured)
        methods = {name: asdict(one) for name, one in results.items()}
        made.record[measured] = {"training": asdict(first), "methods": methods, "floors_s": floors_s}
    return made


def _rounds(given: argparse.Namespace, measured: str) -> int:
    rounds: int = given.rounds or MEASURED[measured]["rounds"]
    return min(rounds, 2) if given.quick else rounds


def kinds_bytes(one: RunFigures) -> dict[str, float]:
    """Return what the peak of an ordinary step consists of, above the weights.

    Gradients count as they are when the backward pass has ended; one that comes and goes within it is in the rest.
    """
    gradient_bytes, state_bytes = one.steps["gradient_bytes"][-1], one.kept["state_bytes"]
    rest = max(one.steps["peak_bytes"]) - gradient_bytes - state_bytes
    return dict(zip(KINDS, (gradient_bytes, state_bytes, rest), strict=True))


def over_a_gap_s(one: RunFigures, gap: int) -> float:
    """Return the seconds of a step on average over a gap in which every layer renews once."""
    return ((gap - 1) * one.step_s + one.first_s) / gap


def bars(results: Results, training: Training, measured: str) -> list[Bar]:
    """Return our figures against their bars, if this is a case that has bars; `measured` is "speed" or "memory"."""
    figures = {}
    for name, one in results.items():
        figures[f"step of {name} / {REFERENCE}'s"] = 1 / one.gain if one.beside_s else float("nan")
        figures[f"peak of {name} / {REFERENCE}'s"] = one.highest_bytes / results[REFERENCE].highest_bytes
    if OURS in results and PEER in results:
        figures[f"step of {OURS} / {PEER}'s"] = results[OURS].step_s / results[PEER].step_s
        figures[f"peak of {OURS} / {PEER}'s"] = results[OURS].highest_bytes / results[PEER].highest_bytes
    return judged("steps", {"measured": measured, **training.case()}, figures)


def time_sheet(results: Results, training: Training, floors_s: Mapping[str, float]) -> Sheet:
    """Return tokens per second of every method, against the reference and the floor."""
    rows = {}
    for name, one in results.items():
        over_gap_s = one.step_s if name.startswith(REFERENCE) else over_a_gap_s(one, PAPERS_GAP)
        rows[name] = {
            "tokens/s": training.tokens / one.step_s,
            f"of {REFERENCE}": one.gain,
            "step, s": one.step_s,
            "first, s": one.first_s,
            f"tokens/s, gap {PAPERS_GAP}": training.tokens / over_gap_s,
            "floor": f"{floors_s[name] / one.step_s:.0%}",
        }
    caption = (
        "Medians of ordinary steps. Every basis is found in the first step; "
        f"over a gap of {PAPERS_GAP} steps each costs that once. Floor: the share of the step that its "
        "matrix products and its optimizer's reads and writes take at the speeds of this machine."
    )
    return Sheet(title=training.title, rows=rows, caption=caption, drawn=("tokens/s",), unit="tokens per second")


def memory_sheet(results: Results, training: Training) -> Sheet:
    """Return the peak memory of every method and what it consists of, in MiB."""
    weights = next(iter(results.values())).kept["weight_bytes"]
    rows = {
        name: {
            "peak": round(max(one.steps["peak_bytes"]) / MIB),
            f"of {REFERENCE}": one.highest_bytes / results[REFERENCE].highest_bytes,
            "first": round(one.first["peak_bytes"] / MIB),
            **{kind: round(size / MIB) for kind, size in kinds_bytes(one).items()},
        }
        for name, one in results.items()
    }
    caption = (
        f"MiB above the weights, which take {weights / MIB:,.0f}. Peak: of the steps after the first; the ratio is "
        "that of the highest of all. Gradients: when the backward pass has ended. The rest: activations and what comes "
        "and goes."
    )
    return Sheet(title=training.title, rows=rows, caption=caption, drawn=KINDS, unit="peak memory above weights, MiB")


def measure_mlp(size: Llama, rounds: int, advance: Callable[[], None]) -> dict[str, list[float]]:
    """Return the seconds of a pass through an MLP's linear layers, plain and fused in turn; each calls `advance`."""
    from galore_torch import GaLoreAdamW, attach, param_groups

    (layers, plain), (fused_layers, fused) = _mlp_pass(size), _mlp_pass(size)
    passes = {"plain": plain, "fused": fused}
    groups = param_groups(fused_layers, size.rank, "all-linear", decomposition="random")  # any basis will do
    optimizer = GaLoreAdamW(groups, lr=1e-4)
    seconds: dict[str, list[float]] = {kind: [] for kind in passes}
    with attach(fused_layers, optimizer, gradients="fused"):
        for _ in range(2):  # the first finds the bases; from the second on it is known which layers share an input
            fused()
            optimizer.step()
            optimizer.zero_grad()
        plain()
        for kind in in_turn(list(passes), rounds):
            layers.zero_grad()
            fused_layers.zero_grad()
            seconds[kind].append(seconds_of(passes[kind], "cpu"))
            advance()
    return seconds


def _mlp_pass(size: Llama) -> tuple[nn.Module, Call]:
    """The three layers in bfloat16, gate and up with an input that they share and down with its own, and a pass.

    A pass goes forward and backward; no other operation takes part.
    """
    narrow, wide = size.hidden, size.intermediate
    widths = ((narrow, wide), (narrow, wide), (wide, narrow))
    layers = nn.ModuleList(nn.Linear(*both, bias=False, dtype=torch.bfloat16) for both in widths)
    x, y = (torch.randn(size.sequence, width).bfloat16().requires_grad_() for width in (narrow, wide))
    grads = [torch.randn(size.sequence, width).bfloat16() for _, width in widths]

    def go() -> None:
        x.grad = y.grad = None
        torch.autograd.backward([layer(of) for layer, of in zip(layers, (x, x, y), strict=True)], grads)

    return layers, go


def mlp_report(size: Llama, seconds: dict[str, list[float]]) -> Report:
    """Return the medians, and their ratio against its bar, if it has one.

    By arithmetic it is that of the operations of the products: forward, gradients of inputs and of weights, each m n.
    """
    m, n = size.hidden, size.intermediate
    by_arithmetic = {"plain": 1.0, "fused": (2 * m * n + size.rank * (m + n)) / (3 * m * n)}
    medians = {kind: median(times) for kind, times in seconds.items()}
    rows = {
        kind: {"seconds": one, "of plain": one / medians["plain"], "by arithmetic": by_arithmetic[kind]}
        for kind, one in medians.items()
    }
    title = f"MLP of {size.hidden} x {size.intermediate}, bfloat16, rank {size.rank}, {size.sequence} tokens"
    caption = "Forward and backward of three linear layers."
    return Report(
        title=title,
        record={"mlp-block": {"size": asdict(size), "seconds": seconds}},
        sheets=[Sheet(title=title, rows=rows, caption=caption, drawn=("seconds",), unit="seconds")],
        bars=judged("mlp_block", asdict(size), {"MLP block, fused / plain": rows["fused"]["of plain"]}),
    )


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
