"""What a measured case says: the figures against their bars, as tables, as JSON and as a chart."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from benchmarks.measure import FLOOR, GALORE, OURS, Outcome
from benchmarks.shapes import LLAMA

PART_LABELS = {
    "products": "  project and project back",
    "inner": "  AdamW on the coordinates",
    "weights": "  read and write the weights",
}
PART_COLORS = {"products": "tab:orange", "inner": "tab:green", "weights": "tab:red"}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One figure and what it must not exceed.

    Attributes:
        what: The figure in words.
        value: The figure.
        at_most: Its bar.
    """

    what: str
    value: float
    at_most: float

    @property
    def kept(self) -> bool:
        """Whether the figure keeps to its bar."""
        return self.value <= self.at_most


def expected_state_bytes(outcome: Outcome) -> int:
    """Return the bytes of the bases and of AdamW's two moments of the coordinates, and of nothing else."""
    dtype: torch.dtype = getattr(torch, outcome.case.dtype)
    return LLAMA[outcome.case.shapes].state_elements() * dtype.itemsize


def bars(outcome: Outcome) -> list[Bar]:
    """Return our figures against their bars."""
    ours, galore = outcome.timings[OURS], outcome.timings[GALORE]
    floor_s = outcome.timings[FLOOR].step_s
    extra_bytes = abs(ours.state_bytes - expected_state_bytes(outcome))
    figures = [
        Bar(what="ordinary step / galore-torch 1.0's", value=ours.step_s / galore.step_s, at_most=1.0),
        Bar(what="ordinary step / the floor", value=ours.step_s / floor_s, at_most=1.25),
        Bar(
            what="renewing all layers / galore-torch 1.0's",
            value=max(ours.renewals_s) / max(galore.renewals_s),
            at_most=1 / 8,
        ),
        Bar(what="state bytes away from bases and moments", value=extra_bytes, at_most=0),
    ]
    if outcome.staggered_s:
        worst = max(outcome.staggered_s) / median(outcome.staggered_s)
        what = f"worst of {len(outcome.staggered_s)} staggered steps / the median"
        figures.append(Bar(what=what, value=worst, at_most=3.0))
    return figures


def tables(outcome: Outcome) -> Group:
    """Return the case as two tables: the contenders, and our figures against their bars."""
    case = outcome.case
    costs = Table(title=f"LLaMA {case.shapes.upper()}, {case.dtype}, rank {LLAMA[case.shapes].rank}")
    for column in ("", "step, ms", "renewing all, s", "state, MiB"):
        costs.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, timing in outcome.timings.items():
        if name == FLOOR:
            costs.add_section()
        costs.add_row(
            name if name != FLOOR else "physical floor: the sum of",
            f"{timing.step_s * 1e3:.1f}",
            ", ".join(f"{seconds:.2f}" for seconds in timing.renewals_s),
            f"{timing.state_bytes / 2**20:.1f}" if timing.state_bytes else "",
        )
    for part, seconds in outcome.timings[FLOOR].parts_s.items():
        costs.add_row(PART_LABELS[part], f"{seconds * 1e3:.1f}", "", "")

    return Group(costs, bar_table(bars(outcome)))


def bar_table(figures: Iterable[Bar]) -> Table:
    """Return figures against their bars as a table."""
    table = Table()
    for column in (OURS, "measured", "at most", ""):
        table.add_column(column, justify="left" if column in (OURS, "") else "right", no_wrap=True)
    for bar in figures:
        verdict = "[green]kept[/]" if bar.kept else "[red]missed[/]"
        table.add_row(bar.what, f"{bar.value:.4g}", f"{bar.at_most:.4g}", verdict)
    return table


def record(outcome: Outcome) -> dict[str, Any]:
    """Return the case as JSON: every raw time in seconds, the medians, and the bars."""
    contenders = {
        name: {**asdict(timing), "step_s": timing.step_s, "parts_s": timing.parts_s}
        for name, timing in outcome.timings.items()
    }
    return {
        "case": asdict(outcome.case),
        "expected_state_bytes": expected_state_bytes(outcome),
        "contenders": contenders,
        "staggered_s": outcome.staggered_s,
        "bars": [{**asdict(bar), "kept": bar.kept} for bar in bars(outcome)],
    }


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Draw the ordinary steps of every case as bars and save the picture; the floor shows its parts."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(outcomes), figsize=(4.5 * len(outcomes), 3.6), squeeze=False, layout="constrained"
    )
    for axis, outcome in zip(axes[0], outcomes, strict=True):
        for name, timing in outcome.timings.items():
            bottom_ms = 0.0
            for part, seconds in timing.parts_s.items():
                label = PART_LABELS.get(part, "").strip() or None
                color = PART_COLORS.get(part, "tab:blue" if name == OURS else "silver")
                axis.bar(name, seconds * 1e3, bottom=bottom_ms, label=label, color=color)
                bottom_ms += seconds * 1e3
        axis.set_title(f"LLaMA {outcome.case.shapes.upper()}, {outcome.case.dtype}")
        axis.set_ylabel("ordinary step, ms")
        axis.tick_params(axis="x", rotation=30)
        axis.margins(y=0.4)  # room for the legend above the bars
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
