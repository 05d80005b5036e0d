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

from rich.console import Console

from benchmarks.common import command, peers
from benchmarks.common.cases import RARELY, OptimizerStep
from benchmarks.common.measuring import MIB
from benchmarks.common.methods import OPTIMIZERS
from benchmarks.common.report import Bar, Report, Sheet, bar_sheet, judged
from benchmarks.common.rounds import WARM_UP, Advance, RunFigures, Worker, interleaved, one_by_one
from benchmarks.common.sizes import LLAMA

OURS, GALORE, APOLLO, ADAMW, FLOOR = "galore", "galore-1.0", "apollo-1.0.3", "full", "physical floor"
STEPPED = (OURS, GALORE, APOLLO, ADAMW, FLOOR)
PARTS = {
    "products_s": "  project and project back",
    "inner_s": "  AdamW on the coordinates",
    "weights_s": "  read and write the weights",
}


@dataclass(kw_only=True)
class StepTimings:
    """What was measured in one case."""

    case: OptimizerStep  # what stepped; its method is another for each
    figures: dict[str, RunFigures]  # of each of `STEPPED`; all layers renew in the first step
    renewal_s: float  # seconds of our step in which all layers renew bases that are there
    staggered_s: list[float]  # seconds of our steps in which layers take turns to renew, after the first

    def bars(self) -> list[Bar]:
        """Return our figures against their bars; our state is to be bases and moments, and nothing else."""
        ours, galore, floor = (self.figures[name] for name in (OURS, GALORE, FLOOR))
        figures = {
            "ordinary step / galore-1.0's": ours.step_s / galore.step_s,
            "ordinary step / the floor": ours.step_s / floor.step_s,
            "renewing all layers / galore-1.0's": max(ours.first_s, self.renewal_s) / galore.first_s,
            "state bytes away from bases and moments": abs(
                ours.kept["state_bytes"] - self.case.size.state_elements() * self.case.torch_dtype.itemsize
            ),
        }
        if self.staggered_s:
            figures["worst of the staggered steps / the median"] = max(self.staggered_s) / median(self.staggered_s)
        return judged("step", asdict(self.case), figures)

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
        caption = "The physical floor is the sum of the parts below it."
        unit = f"ordinary step, {self.case.dtype}, ms"
        return Sheet(
            title=self.case.title, rows=rows, caption=caption, last=1 + len(parts), drawn=("step, ms",), unit=unit
        )


def measure(case: OptimizerStep, rounds: int, stagger_steps: int, advance: Advance) -> StepTimings:
    """Measure one case: all in turn, then our renewals, of all layers at once and by turns, each alone."""

    def starts(*names: str, gap: int = RARELY, stagger: bool = False) -> dict[str, Callable[[], Worker]]:
        one = replace(case, size=replace(case.size, gap=gap), stagger=stagger)
        return {name: partial(replace(one, method=OPTIMIZERS.get(name)).start, name) for name in names}

    figures = interleaved(starts(*STEPPED), rounds, advance)
    renewing = one_by_one(starts(OURS, gap=1), 1, advance)[OURS]
    staggered_s: list[float] = []
    if stagger_steps:
        turns = one_by_one(starts(OURS, gap=case.size.gap, stagger=True), stagger_steps, advance)
        staggered_s = turns[OURS].steps["step_s"]
    return StepTimings(case=case, figures=figures, renewal_s=renewing.step_s, staggered_s=staggered_s)


def run(given: argparse.Namespace, messages: Console) -> Report:
    """Measure the cases one after the other."""
    quick = given.quick
    rounds, stagger_steps = (min(given.rounds, 5), 0) if quick else (given.rounds, given.stagger_steps)
    steps = len(STEPPED) * (1 + WARM_UP + rounds) + 2 + (1 + stagger_steps if stagger_steps else 0)
    for peer in peers.PEERS.values():
        peers.install(peer)
    report = Report(title="An optimizer's step", record={"cases": []})
    with command.Phases(messages) as phases:
        for shapes in given.shapes or (["60m"] if quick else ["60m", "350m"]):
            for dtype in given.dtype or (["bfloat16"] if quick else ["bfloat16", "float32"]):
                phases.begin(f"{shapes} {dtype}", steps)
                case = OptimizerStep(method=None, size=LLAMA[shapes], dtype=dtype, threads=given.threads)
                outcome = measure(case, rounds, stagger_steps, phases.count)
                bars = outcome.bars()
                report.record["cases"].append({**asdict(outcome), "bars": [bar.record() for bar in bars]})
                report.sheets += [outcome.costs(), bar_sheet(bars)]
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
