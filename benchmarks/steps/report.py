"""What whole training steps came to: time and memory as tables, against their bars, as JSON and as panels."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from benchmarks.common.bars import Bar, judged
from benchmarks.common.console import GIB, MIB, Panel, table
from benchmarks.common.methods import REFERENCE
from benchmarks.steps.measure import Figures
from benchmarks.steps.training import Training

PAPERS_GAP = 200
KINDS = ("gradients", "optimizer state", "activations and the rest")
Results = Mapping[str, Figures]


def bars(results: Results, training: Training, measured: str) -> list[Bar]:
    """Return our figures against their bars, if this is a case that has bars; `measured` is "speed" or "memory"."""
    figures = {}
    for name, one in results.items():
        figures[f"step of {name} / {REFERENCE}'s"] = 1 / one.gain if one.beside_s else float("nan")
        figures[f"peak of {name} / {REFERENCE}'s"] = one.highest_bytes / results[REFERENCE].highest_bytes
    ours, peer = results.get("fused/backward"), results.get("galore-1.0/per-layer")
    if ours and peer:
        figures["step of fused/backward / galore-1.0/per-layer's"] = ours.step_s / peer.step_s
        figures["peak of fused/backward / galore-1.0/per-layer's"] = ours.highest_bytes / peer.highest_bytes
    return judged("steps", training.case(measured), figures)


def kinds_bytes(figures: Figures) -> dict[str, int]:
    """Return what the peak of an ordinary step consists of, above the weights.

    Gradients count as they are when the backward pass has ended; one that comes and goes within it is in the rest.
    """
    known = figures.gradient_bytes + figures.state_bytes
    sizes = (figures.gradient_bytes, figures.state_bytes, max(figures.peak_bytes) - known)
    return dict(zip(KINDS, sizes, strict=True))


def time_table(results: Results, training: Training, floors_s: Mapping[str, float]) -> Table:
    """Return tokens per second of every method, against the reference and the floor."""
    headings = ("", "tokens/s", f"/ {REFERENCE}", "step, s", "first\nstep, s", f"tokens/s\ngap {PAPERS_GAP}", "floor")
    rows = [
        (
            name,
            f"{training.tokens / one.step_s:,.0f}",
            f"{one.gain:.2f}",
            f"{one.step_s:.2f}",
            f"{one.first_s:.2f}",
            f"{training.tokens / (one.step_s if name.startswith(REFERENCE) else one.over_a_gap_s(PAPERS_GAP)):,.0f}",
            f"{floors_s[name] / one.step_s:.0%}",
        )
        for name, one in results.items()
    ]
    caption = (
        "Medians of ordinary steps. Every basis is found in the first step; "
        f"over a gap of {PAPERS_GAP} steps each costs that once. Floor: the share of the step that its "
        "matrix products and its optimizer's reads and writes take at the speeds of this machine."
    )
    return table(training.title, headings, rows, caption=caption)


def memory_table(results: Results, training: Training) -> Table:
    """Return the peak memory of every method and what it consists of, in MiB."""
    weights = next(iter(results.values())).weight_bytes
    headings = ("memory, MiB", "peak", f"/ {REFERENCE}", "first\nstep", "gradients", "state", "the rest")
    rows = [
        (
            name,
            f"{max(one.peak_bytes) / MIB:,.0f}",
            f"{one.highest_bytes / results[REFERENCE].highest_bytes:.2f}",
            *(f"{size / MIB:,.0f}" for size in (one.first_peak_bytes, *kinds_bytes(one).values())),
        )
        for name, one in results.items()
    ]
    caption = (
        f"Above the weights, which take {weights / MIB:,.0f} MiB. Peak: of the steps after the first; the ratio is "
        "that of the highest of all. Gradients: when the backward pass has ended. The rest: activations and what comes "
        "and goes."
    )
    return table(training.title, headings, rows, caption=caption)


def record(results: Results, training: Training, floors_s: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return every raw figure as JSON, in seconds and bytes."""
    methods = {
        name: {**asdict(figures), "kinds_bytes": kinds_bytes(figures), "highest_bytes": figures.highest_bytes}
        for name, figures in results.items()
    }
    for name, floor_s in (floors_s or {}).items():
        methods[name] |= {"step_s": results[name].step_s, "gain": results[name].gain, "floor_s": floor_s}
    return {"training": asdict(training), "methods": methods}


def time_panel(results: Results, training: Training) -> Panel:
    """Return tokens per second as bars."""
    speeds = [training.tokens / one.step_s for one in results.values()]
    notes = [f"{one.gain:.2f}" for one in results.values()]
    label = f"tokens per second, and over {REFERENCE}'s"
    return Panel(label=label, names=list(results), parts={"tokens/s": speeds}, notes=notes)


def memory_panel(results: Results) -> Panel:
    """Return the peak memory by kind as stacked bars."""
    kinds = {kind: [kinds_bytes(one)[kind] / GIB for one in results.values()] for kind in KINDS}
    return Panel(label="peak memory above the weights, GiB", names=list(results), parts=kinds)
