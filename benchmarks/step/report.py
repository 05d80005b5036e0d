"""What a measured case says: its figures against their bars, as a table, as JSON and as a panel of the chart."""

from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from rich.table import Table

from benchmarks.common.bars import Bar, judged
from benchmarks.common.console import MIB, Panel, table
from benchmarks.step.measure import GALORE, OURS, Outcome
from benchmarks.step.worker import FLOOR

PART_LABELS = {
    "products": "project and project back",
    "inner": "AdamW on the coordinates",
    "weights": "read and write the weights",
}


def expected_state_bytes(outcome: Outcome) -> int:
    """Return the bytes of the bases and of AdamW's two moments of the coordinates, and of nothing else."""
    dtype: torch.dtype = getattr(torch, outcome.case.dtype)
    return outcome.case.size.state_elements() * dtype.itemsize


def bars(outcome: Outcome) -> list[Bar]:
    """Return our figures against their bars."""
    ours, galore, floor = (outcome.timings[name] for name in (OURS, GALORE, FLOOR))
    figures = {
        "ordinary step / galore-torch 1.0's": ours.step_s / galore.step_s,
        "ordinary step / the floor": ours.step_s / floor.step_s,
        "renewing all layers / galore-torch 1.0's": max(ours.renewals_s) / max(galore.renewals_s),
        "state bytes away from bases and moments": abs(ours.state_bytes - expected_state_bytes(outcome)),
    }
    if outcome.staggered_s:
        worst, middle = max(outcome.staggered_s), median(outcome.staggered_s)
        figures["worst of the staggered steps / the median"] = worst / middle
    return judged("step", asdict(outcome.case), figures)


def title(outcome: Outcome) -> str:
    """Name what was stepped."""
    return f"LLaMA {outcome.case.shapes.upper()}, {outcome.case.dtype}, rank {outcome.case.size.rank}"


def costs(outcome: Outcome) -> Table:
    """Return what each contender costs, as a table; the floor's parts come last."""
    rows = [
        (
            name if name != FLOOR else "physical floor: the sum of",
            f"{timing.step_s * 1e3:.1f}",
            ", ".join(f"{seconds:.2f}" for seconds in timing.renewals_s),
            f"{timing.state_bytes / MIB:.1f}" if timing.state_bytes else "",
        )
        for name, timing in outcome.timings.items()
    ]
    parts = outcome.timings[FLOOR].parts_s.items()
    rows += [(f"  {PART_LABELS[part]}", f"{seconds * 1e3:.1f}", "", "") for part, seconds in parts]
    return table(title(outcome), ("", "step, ms", "renewing all, s", "state, MiB"), rows, last=1 + len(parts))


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


def panel(outcome: Outcome) -> Panel:
    """Return the ordinary steps as stacked bars; the floor shows its parts."""
    labels = {"step": "a step", **PART_LABELS}
    heights = {
        label: [timing.parts_s.get(part, 0.0) * 1e3 for timing in outcome.timings.values()]
        for part, label in labels.items()
    }
    return Panel(label=f"ordinary step, ms\n{title(outcome)}", names=list(outcome.timings), parts=heights)
