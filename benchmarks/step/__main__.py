"""What an optimizer's step costs on the weights of the paper's LLaMA models, beside its peers and the physical floor.

    make bench                                       # all shapes and dtypes: about half an hour on 2 cores
    make bench ARGS="--quick"                        # the small shapes in bfloat16, a minute
    make bench ARGS="--shapes 350m --dtype bfloat16 --plot step.png"

Weights and gradients are random and of the true shapes; there is no model and no data. Each optimizer has a process of
its own, and they step in turn, so that what else the machine does falls on all of them alike. Read down a table: what a
step costs, then the floor, which is the sum of the parts below it and which no implementation can do without.
"""

import argparse

from rich.console import Console

from benchmarks.common import command, peers
from benchmarks.common.memory import MIB
from benchmarks.common.report import Report, Sheet, bar_sheet
from benchmarks.step.measure import FLOOR, StepCase, StepTimings, measure

PARTS = {
    "products": "  project and project back",
    "inner": "  AdamW on the coordinates",
    "weights": "  read and write the weights",
}


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
            phases.begin(f"{case.shapes} {case.dtype}", case.units)
            outcome = measure(case, phases.count)
            report.record["cases"].append(outcome.record())
            report.sheets += [costs(outcome), bar_sheet(outcome.bars())]
    return report


def costs(outcome: StepTimings) -> Sheet:
    """Return what each optimizer costs in an ordinary step; the floor's parts come last."""
    rows: dict[str, dict[str, str | float]] = {}
    for name, timing in outcome.timings.items():
        rows[name] = {"step, ms": 1e3 * timing.step_s}
        if name != FLOOR:
            rows[name]["renewing all, s"] = ", ".join(f"{seconds:.2f}" for seconds in timing.renewals_s)
            rows[name]["state, MiB"] = timing.state_bytes / MIB
    parts = outcome.timings[FLOOR].parts_s
    rows |= {PARTS[part]: {"step, ms": 1e3 * seconds} for part, seconds in parts.items()}
    case = outcome.case
    return Sheet(
        title=f"LLaMA {case.shapes.upper()}, {case.dtype}, rank {case.size.rank}",
        rows=rows,
        caption="The physical floor is the sum of the parts below it.",
        last=1 + len(parts),
        drawn=("step, ms",),
        unit=f"ordinary step of {case.shapes}, {case.dtype}, ms",
    )


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
