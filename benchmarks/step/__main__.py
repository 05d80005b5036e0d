"""What an optimizer's step costs on the weights of the paper's LLaMA models, beside its peers and the physical floor.

    make bench                                       # all shapes and dtypes: about half an hour on 2 cores
    make bench ARGS="--quick"                        # the small shapes in bfloat16, a minute
    make bench ARGS="--shapes 350m --dtype bfloat16 --plot step.png"

Weights and gradients are random and of the true shapes; there is no model and no data. Each contender has a process of
its own, and they step in turn, so that what else the machine does falls on all of them alike.
"""

import argparse

from rich.console import Console

from benchmarks.common import console, peers
from benchmarks.step import report
from benchmarks.step.measure import Case, measure


def run(given: argparse.Namespace, messages: Console) -> console.Report:
    """Measure the cases one after the other."""
    quick = given.quick
    cases = [
        Case(
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
    outcomes = []
    with console.Phases(messages) as phases:
        for case in cases:
            phases.begin(f"{case.shapes} {case.dtype}", case.units)
            outcomes.append(measure(case, phases.count))
    return console.Report(
        title="An optimizer's step",
        record={"cases": [report.record(outcome) for outcome in outcomes]},
        tables=[each for one in outcomes for each in (report.costs(one), console.bar_table(report.bars(one)))],
        bars=[],
        panels=[report.panel(outcome) for outcome in outcomes],
    )


def main(arguments: list[str] | None = None) -> None:
    """Time a step and a renewal of every contender and print our figures against their bars."""
    command = console.parser(__doc__, "benchmarks.step")
    number = console.at_least
    command.add_argument(
        "--shapes", action="append", choices=["60m", "350m"], help="weights of which LLaMA; repeatable"
    )
    command.add_argument("--dtype", action="append", choices=["bfloat16", "float32"], help="of all; repeatable")
    command.add_argument("--rounds", type=number(1), default=15, help="ordinary steps of each contender (15)")
    command.add_argument("--stagger-steps", type=number(0), default=400, help="steps with staggered renewal (400)")
    command.add_argument("--quick", action="store_true", help="60m in bfloat16 and few steps")
    console.run(command.parse_args(arguments), run)


if __name__ == "__main__":
    main()
