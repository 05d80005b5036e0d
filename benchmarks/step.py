"""What an optimizer's step costs on the weights of the paper's LLaMA models, beside its peers and the physical floor.

    make bench                                       # all shapes and dtypes: about half an hour on 2 cores
    make bench ARGS="--quick"                        # the small shapes in bfloat16, a minute
    make bench ARGS="--shapes 350m --dtype bfloat16 --plot step.png"

Weights and gradients are random and of the true shapes; there is no model and no data. Each optimizer has a process of
its own, and they step in turn, so that what else the machine does falls on all of them alike. Read down a table: what a
step costs, then the floor, which is the sum of the parts below it and which no implementation can do without.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import command, peers
from benchmarks.common.bars import Bar, judged
from benchmarks.common.memory import MIB
from benchmarks.common.methods import OPTIMIZERS
from benchmarks.common.optimizer_step import RARELY, OptimizerStep
from benchmarks.common.report import Report, Sheet, bar_sheet
from benchmarks.common.rounds import WARM_UP, Advance, RunFigures, interleaved, one_by_one
from benchmarks.common.sizes import LLAMA
from benchmarks.common.worker import Worker

OURS, GALORE, APOLLO, ADAMW, FLOOR = "galore", "galore-1.0", "apollo-1.0.3", "full", "physical floor"
STEPPED = (OURS, GALORE, APOLLO, ADAMW, FLOOR)
PARTS = {
    "products_s": "  project and project back",
    "inner_s": "  AdamW on the coordinates",
    "weights_s": "  read and write the weights",
}


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """What is timed."""

    shapes: str  # key of `LLAMA`
    dtype: str  # name of the torch dtype of weights and gradients
    rounds: int  # rounds in which every optimizer takes one ordinary step
    stagger_steps: int  # steps of ours with staggered renewal after the first one; 0 leaves them out
    threads: int  # threads of torch in each process

    @property
    def expected_state_bytes(self) -> int:
        """The bytes of the bases and of AdamW's two moments of the coordinates, and of nothing else."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return LLAMA[self.shapes].state_elements() * dtype.itemsize

    def starts(self, *names: str, gap: int = RARELY, stagger: bool = False) -> dict[str, Callable[[], Worker]]:
        """Return what starts the processes of some optimizers, or of the floor, with so many steps to a renewal."""
        one = OptimizerStep(
            method=None,
            size=replace(LLAMA[self.shapes], gap=gap),
            dtype=self.dtype,
            stagger=stagger,
            threads=self.threads,
        )
        return {name: partial(replace(one, method=OPTIMIZERS.get(name)).start, name) for name in names}


@dataclass(kw_only=True)
class StepTimings:
    """What was measured in one case."""

    case: StepCase
    figures: dict[str, RunFigures]  # of each of `STEPPED`; all layers renew in the first step
    renewal_s: float  # seconds of our step in which all layers renew bases that are there
    staggered_s: list[float]  # seconds of our steps in which layers take turns to renew, after the first

    def bars(self) -> list[Bar]:
        """Return our figures against their bars."""
        ours, galore, floor = (self.figures[name] for name in (OURS, GALORE, FLOOR))
        figures = {
            "ordinary step / galore-1.0's": ours.step_s / galore.step_s,
            "ordinary step / the floor": ours.step_s / floor.step_s,
            "renewing all layers / galore-1.0's": max(ours.first_s, self.renewal_s) / galore.first_s,
            "state bytes away from bases and moments": abs(ours.kept["state_bytes"] - self.case.expected_state_bytes),
        }
        if self.staggered_s:
            figures["worst of the staggered steps / the median"] = max(self.staggered_s) / median(self.staggered_s)
        return judged("step", asdict(self.case), figures)

    def record(self) -> dict[str, Any]:
        """Return the case as JSON: every raw time in seconds, the medians, and the bars."""
        medians = {name: {"step_s": one.step_s, "parts_s": one.parts_s} for name, one in self.figures.items()}
        bars = [bar.record() for bar in self.bars()]
        return {
            **asdict(self),
            "expected_state_bytes": self.case.expected_state_bytes,
            "medians": medians,
            "bars": bars,
        }

    def costs(self) -> Sheet:
        """Return what each optimizer costs in an ordinary step; the floor's parts come last."""
        rows: dict[str, dict[str, str | float]] = {}
        for name, one in self.figures.items():
            rows[name] = {"step, ms": 1e3 * one.step_s}
            if name in (OURS, GALORE, APOLLO):
                renewals_s = [one.first_s, *([self.renewal_s] if name == OURS else [])]
                rows[name]["renewing all, s"] = ", ".join(f"{seconds:.2f}" for seconds in renewals_s)
            if name != FLOOR:
                rows[name]["state, MiB"] = one.kept["state_bytes"] / MIB
        parts = self.figures[FLOOR].parts_s
        rows |= {PARTS[part]: {"step, ms": 1e3 * seconds} for part, seconds in parts.items()}
        shapes, dtype = self.case.shapes, self.case.dtype
        return Sheet(
            title=f"LLaMA {shapes.upper()}, {dtype}, rank {LLAMA[shapes].rank}",
            rows=rows,
            caption="The physical floor is the sum of the parts below it.",
            last=1 + len(parts),
            drawn=("step, ms",),
            unit=f"ordinary step of {shapes}, {dtype}, ms",
        )


def measure(case: StepCase, advance: Advance) -> StepTimings:
    """Measure one case: all in turn, then our renewals, of all layers at once and by turns, each alone."""
    figures = interleaved(case.starts(*STEPPED), case.rounds, advance)
    renewing = one_by_one(case.starts(OURS, gap=1), 1, advance)[OURS]
    staggered_s: list[float] = []
    if case.stagger_steps:
        starts = case.starts(OURS, gap=LLAMA[case.shapes].gap, stagger=True)
        staggered_s = one_by_one(starts, case.stagger_steps, advance)[OURS].steps["step_s"]
    return StepTimings(case=case, figures=figures, renewal_s=renewing.step_s, staggered_s=staggered_s)


def run(given: argparse.Namespace, messages: Console) -> Report:
    """Measure the cases one after the other."""
    quick = given.quick
    cases = [
        StepCase(
            shapes=shapes,
            dtype=dtype,
            rounds=min(given.rounds, 5) if quick else given.rounds,
            stagger_steps=0 if quick else given.stagger_steps,
            threads=given.threads,
        )
        for shapes in given.shapes or (["60m"] if quick else ["60m", "350m"])
        for dtype in given.dtype or (["bfloat16"] if quick else ["bfloat16", "float32"])
    ]
    for peer in peers.PEERS.values():
        peers.install(peer)
    report = Report(title="An optimizer's step", record={"cases": []})
    with command.Phases(messages) as phases:
        for case in cases:
            steps = len(STEPPED) * (1 + WARM_UP + case.rounds) + 2
            phases.begin(f"{case.shapes} {case.dtype}", steps + (1 + case.stagger_steps if case.stagger_steps else 0))
            outcome = measure(case, phases.count)
            report.record["cases"].append(outcome.record())
            report.sheets += [outcome.costs(), bar_sheet(outcome.bars())]
    return report


def main(arguments: list[str] | None = None) -> None:
    """Time a step and a renewal of every optimizer and print our figures against their bars."""
    made, number = command.parser(__doc__, "benchmarks.step"), command.at_least
    add = made.add_argument
    add("--shapes", action="append", choices=["60m", "350m"], help="weights of which LLaMA; repeatable")
    add("--dtype", action="append", choices=["bfloat16", "float32"], help="of all; repeatable")
    add("--rounds", type=number(1), default=15, help="ordinary steps of each optimizer (15)")
    add("--stagger-steps", type=number(0), default=400, help="steps with staggered renewal (400)")
    add("--quick", action="store_true", help="60m in bfloat16 and few steps")
    command.run(made.parse_args(arguments), run)


if __name__ == "__main__":
    main()
