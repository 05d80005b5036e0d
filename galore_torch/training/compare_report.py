"""``report.html``: curves, table, learning rates and circumstances of a comparison on one page."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from galore_torch.training import records
from galore_torch.training.compare_plan import Job
from galore_torch.training.compare_results import Outcome, Setting, edges, rows, settings_of
from galore_torch.training.page import FIGURE_SIZE, Page, line_look
from galore_torch.training.plots import smooth
from galore_torch.training.run_folder import RunFolder

_POINTS = 200  # of a drawn curve, at most


def report(job: Job, best: dict[str, Setting], outcomes: Sequence[Outcome], out: Path, command: str) -> Page:
    """Make the page.

    Args:
        job: what the runs are of.
        best: by method, its best setting.
        outcomes: of all runs.
        out: the comparison's folder.
        command: by which it was begun.
    """
    run = outcomes[0].run
    seeds = len({outcome.run.seed for outcome in outcomes})
    page = Page(
        f"{len(rows(best, outcomes))} methods, {run.tokens:,} tokens each",
        f"galore {job.subcommand} at equal data, batches and steps; each method at the best of the learning rates "
        f"tried, over {seeds} seed{'s' if seeds > 1 else ''}.",
    )
    page.table(
        ["method", "lr / others", f"{job.score} ± std", "ratio to full", "tokens/s", "state, MB", "peak memory, MB"],
        rows(best, outcomes),
        caption=f"{job.score} on held-out text; memory of the optimizer's state and of the whole process",
    )
    for row in best.values():
        note = edges(row, outcomes)
        if note:
            page.text(note)
    for outcome in outcomes:
        if outcome.final is None:
            page.text(f"{outcome.run.label}: {outcome.error or 'not finished'}")
    if best:
        page.heading("Loss")
        page.figure(_curves(best, out, "tokens"), "Training loss by tokens seen, smoothed; bands span the seeds.")
        page.figure(_curves(best, out, "seconds"), "The same by seconds spent in training steps.")
        page.heading("Learning rates")
        page.figure(_sensitivity(job, best, outcomes), "Held-out loss by learning rate; the mean over the seeds.")
    page.heading("How it was made")
    page.code(command)
    page.facts(versions())
    config = dataclasses.asdict(run.config)
    optimizer = config.pop("optimizer")
    config.pop("adapter", None)
    config["schedule"].pop("seed")
    shared = {name: optimizer[name] for name in ("rank", "gap", "scale", "weight_decay")}
    page.heading("Settings of all runs")
    page.facts({name: value for section in [*config.values(), shared] for name, value in section.items()})
    return page


def versions() -> dict[str, str]:
    """What the runs were made with: versions, and the processor's name."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "galore-torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # noqa: PERF203
            found[name] = "not installed as a package"
    return {**found, "processor": _processor()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=FIGURE_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.grid(color="#7d8590", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("loss (nats per token)")
    return figure, axes


def _thinned(values: Sequence[float]) -> list[float]:
    """At most `_POINTS` values, each the mean of its neighbours, smoothed."""
    size = math.ceil(len(values) / _POINTS)
    return [sum(values[at : at + size]) / len(values[at : at + size]) for at in range(0, len(values), size)]


def _curves(best: dict[str, Setting], out: Path, by: str) -> Figure:
    figure, axes = _axes()
    top = -math.inf
    for index, (method, row) in enumerate(best.items()):
        seeds = []
        for outcome in row.outcomes:
            history = records.read(RunFolder(out / outcome.run.folder).metrics)
            steps = [record for record in history if "loss" in record]
            losses = [math.nan if record["loss"] is None else record["loss"] for record in steps]
            seeds.append((_thinned([record[by] for record in steps]), smooth(_thinned(losses))))
        along = [sum(values) / len(values) for values in zip(*(x for x, _ in seeds), strict=True)]
        losses_at = list(zip(*(losses for _, losses in seeds), strict=True))
        mean = [sum(values) / len(values) for values in losses_at]
        look = line_look(index)
        axes.plot(along, mean, label=method, linewidth=1.5, **look)
        if len(seeds) > 1:
            low, high = [min(values) for values in losses_at], [max(values) for values in losses_at]
            axes.fill_between(along, low, high, color=look["color"], alpha=0.2, linewidth=0)
        early = mean[len(mean) // 20 :]
        top = max([top, *(value for value in early if math.isfinite(value))])
    if math.isfinite(top):
        axes.set_ylim(top=top)
    axes.set_xlabel("tokens seen" if by == "tokens" else "seconds of training")
    axes.legend()
    return figure


def _sensitivity(job: Job, best: dict[str, Setting], outcomes: Sequence[Outcome]) -> Figure:
    figure, axes = _axes()
    for index, method in enumerate(best):
        least: dict[float, float] = {}  # by learning rate, at whichever rate of the others was best with it
        for each in settings_of(job, outcomes, method):
            if math.isfinite(each.loss):
                least[each.lr] = min(each.loss, least.get(each.lr, math.inf))
        lrs = sorted(least)
        losses = [least[lr] for lr in lrs]
        axes.plot(lrs, losses, marker="o", markersize=4, label=method, **line_look(index))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend()
    return figure
