"""What whole training steps came to: time and memory as tables, as JSON and as a chart."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.methods import REFERENCE
from benchmarks.training import Training
from benchmarks.turns import Figures

GIB = 2**30
PAPERS_GAP = 200
KINDS = {"gradients": "tab:orange", "optimizer state": "tab:blue", "activations and the rest": "silver"}


def title(training: Training) -> str:
    """Name what was trained."""
    sequences = f"{training.batch} x {training.sequence}"
    times = f"{training.micro_batches} times " if training.micro_batches > 1 else ""
    return (
        f"LLaMA {training.hidden} wide, {training.layers} layers, {training.dtype}, rank {training.rank}, "
        f"{times}{sequences} tokens a step"
    )


def kinds_bytes(figures: Figures) -> dict[str, int]:
    """Return what the peak of an ordinary step consists of, above the weights.

    Gradients count as they are when the backward pass has ended; one that comes and goes within it is in the rest.
    """
    known = figures.gradient_bytes + figures.state_bytes
    sizes = (figures.gradient_bytes, figures.state_bytes, max(figures.peak_bytes) - known)
    return dict(zip(KINDS, sizes, strict=True))


def _table(heading: str, *columns: str) -> Table:
    """Return an empty table that fits 80 columns: the first column is words, the others are figures."""
    table = Table(title=heading, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def time_table(results: Mapping[str, Figures], training: Training, floors_s: Mapping[str, float]) -> Table:
    """Return tokens per second of every method, against the reference and the floor."""
    headings = ("tokens/s", f"/ {REFERENCE}", "step, s", "first\nstep, s", f"tokens/s\ngap {PAPERS_GAP}", "floor")
    table = _table(title(training), "", *headings)
    for name, figures in results.items():
        table.add_row(
            name,
            f"{training.tokens / figures.step_s:,.0f}",
            f"{figures.gain:.2f}",
            f"{figures.step_s:.2f}",
            f"{figures.first_s:.2f}",
            f"{training.tokens / _on_average_s(name, figures):,.0f}",
            f"{floors_s[name] / figures.step_s:.0%}",
        )
    table.caption = (
        "Medians of ordinary steps. Every basis is found in the first step; "
        f"over a gap of {PAPERS_GAP} steps each costs that once. Floor: the share of the step that its "
        "matrix products and its optimizer's reads and writes take at the speeds of this machine."
    )
    return table


def _on_average_s(name: str, figures: Figures) -> float:
    return figures.step_s if name.startswith(REFERENCE) else figures.over_a_gap_s(PAPERS_GAP)


def memory_table(results: Mapping[str, Figures], training: Training, heading: str = "") -> Table:
    """Return the peak memory of every method and what it consists of, in MiB."""
    weights = next(iter(results.values())).weight_bytes
    headings = ("peak", f"/ {REFERENCE}", "first\nstep", "gradients", "state", "the rest")
    table = _table(heading or title(training), "memory, MiB", *headings)
    reference = results[REFERENCE].highest_bytes
    for name, figures in results.items():
        sizes = (figures.first_peak_bytes, *kinds_bytes(figures).values())
        table.add_row(
            name,
            f"{max(figures.peak_bytes) / 2**20:,.0f}",
            f"{figures.highest_bytes / reference:.2f}",
            *(f"{size / 2**20:,.0f}" for size in sizes),
        )
    table.caption = (
        f"Above the weights, which take {weights / 2**20:,.0f} MiB. Peak: of the steps after the first; the ratio is "
        "that of the highest of all. Gradients: when the backward pass has ended. The rest: activations and what comes "
        "and goes."
    )
    return table


def record(
    results: Mapping[str, Figures], trainings: list[Training], floors_s: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return every raw figure as JSON, in seconds and bytes."""
    methods = {
        name: {**asdict(figures), "kinds_bytes": kinds_bytes(figures), "highest_bytes": figures.highest_bytes}
        for name, figures in results.items()
    }
    for name, floor_s in (floors_s or {}).items():
        figures = results[name]
        methods[name] |= {"step_s": figures.step_s, "gain": figures.gain, "floor_s": floor_s}
    return {"training": asdict(trainings[0]), "methods": methods}


def draw(results: Mapping[str, Figures], training: Training, path: Path, *, times: bool) -> None:
    """Draw the methods as bars and save the picture: tokens per second if asked for, and memory by kind."""
    import matplotlib.pyplot as plt

    names = list(results)[::-1]  # the first on top
    panels = 2 if times else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(6 * panels, 1.8 + 0.35 * len(names)), sharey=True, squeeze=False, layout="constrained"
    )
    if times:
        axis = axes[0][0]
        bars = axis.barh(names, [training.tokens / results[name].step_s for name in names], color="tab:blue")
        axis.bar_label(bars, labels=[f"{results[name].gain:.2f}" for name in names], padding=3)
        axis.set_xlabel(f"tokens per second, and over {REFERENCE}'s")
        axis.margins(x=0.12)
    axis = axes[0][-1]
    lefts = [0.0] * len(names)
    for kind, color in KINDS.items():
        widths = [kinds_bytes(results[name])[kind] / GIB for name in names]
        axis.barh(names, widths, left=lefts, label=kind, color=color)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axis.set_xlabel("peak memory above the weights, GiB")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS), fontsize="small")
    figure.suptitle(title(training), fontsize="medium")
    figure.savefig(path, dpi=150)
    plt.close(figure)
