"""``report.html``: table, curves, learning rates and circumstances of a comparison on one page."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from galore_torch.training.compare.plan import OF_RUNS
from galore_torch.training.compare.results import Comparison, Summary, notes, rows, short, shown
from galore_torch.training.page.page import Page
from galore_torch.training.run import records
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.machine import versions
from galore_torch.training.run.plots import add_legend, count_by, known, line_style, new_axes, smooth
from galore_torch.training.run.records import Record
from galore_torch.training.settings.methods import has_effect

_POINTS = 200  # of a drawn curve, at most
_TICKS = 6  # learning rates that an axis names one by one, at most
_BINS = 40  # of a drawn mean over renewals, at most

Curves = tuple[Sequence[float], Sequence[Sequence[float]]]
"""What is along, and what is up for each seed."""


def report(comparison: Comparison, out: Path, command: str) -> Page:
    """Make the page.

    Args:
        comparison: the runs and how they are judged.
        out: the comparison's folder.
        command: by which it was begun.
    """
    job, methods = comparison.job, comparison.methods
    seeds = f"{comparison.seeds} seed{'s' if comparison.seeds > 1 else ''}"
    page = Page(
        f"{len(methods)} methods, {comparison.ends[0].run.amount} each",
        f"galore {job.name} at equal data, order and length; each method at the best of the learning rates "
        f"tried, over {seeds}.",
    )
    _table(page, comparison)
    if comparison.best:
        _figures(page, comparison, out)
        _all_runs(page, comparison)
    page.heading("How it was made")
    page.code(in_lines(command))
    page.facts(versions(job.libraries))
    apart, shared = apart_and_shared({end.run.method: end.run.config for end in comparison.ends})
    page.heading("Settings of each method")
    page.table(
        ["", *methods],
        [[name, *(_words(values.get(method, "")) for method in methods)] for name, values in apart.items()],
        caption="empty where a setting has no effect on a method",
        words=1 + len(methods),
    )
    page.heading("Settings of all runs")
    page.facts({name: _words(value) for name, value in shared.items()})
    return page


def in_lines(command: str) -> str:
    """A command with a line for each option, which a phone shows whole; to a shell it is the same."""
    return " ".join(("\\\n  " if word.startswith("-") else "") + shlex.quote(word) for word in shlex.split(command))


def apart_and_shared(configs: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The settings that differ, or have an effect on some methods alone, by method; and all others that are set.

    Learning rates and seeds are in neither: runs of one method differ in them.
    """
    effective = {method: _effective(config) for method, config in configs.items()}
    apart: dict[str, dict[str, Any]] = {}
    shared: dict[str, Any] = {}
    for name in dict.fromkeys(itertools.chain(*effective.values())):
        values = {method: settings[name] for method, settings in effective.items() if name in settings}
        different = set(values.values())
        if len(different) > 1 or (len(values) < len(configs) and different != {None}):
            apart[name] = values
        elif different != {None}:
            (shared[name],) = different
    return apart, shared


def _effective(config: Any) -> dict[str, Any]:
    """All settings that have an effect, but for those of `OF_RUNS`; an adapter has the rank as its own."""
    hidden = {*OF_RUNS, *(["rank"] if config.adapter.adapter != "none" else [])}
    return {
        name: value
        for section in dataclasses.asdict(config).values()
        for name, value in section.items()
        if name not in hidden and has_effect(name, config.optimizer, config.adapter)
    }


def _words(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else "none" if value is None else str(value)


def _table(page: Page, comparison: Comparison) -> None:
    job, name, beside = comparison.job, comparison.score.name or "score", comparison.score.beside_full
    spread = " ± std" if any(best.spread is not None for best in comparison.best.values()) else ""
    page.table(
        ["method", "lr / others", name + spread, beside, f"{job.unit}/s", "state, MB", "peak memory, MB", "trained"],
        rows(comparison),
        caption=f"{name} on held-out {job.held_out}; memory of the optimizer's state and of the whole process; "
        "parameters that are trained",
    )
    unfinished = (f"{end.run.label}: {end.error or 'not finished'}" for end in comparison.ends if end.final is None)
    for text in (*notes(comparison), *unfinished):
        page.text(text)


def _all_runs(page: Page, comparison: Comparison) -> None:
    job, name = comparison.job, comparison.score.name
    cells, ends = [], [end for end in comparison.ends if end.final is not None]
    for end in ends:
        final: Record = end.final or {}
        scored = shown(name, job.scores(final)[name]), shown("loss", final["eval_loss"])
        cells.append([end.run.label, *scored, short(final[f"{job.unit}_per_second"])])
    page.heading("All runs")
    page.table(["run", name, "loss", f"{job.unit}/s"], cells, links=[end.run.folder.as_posix() for end in ends])


def _figures(page: Page, comparison: Comparison, out: Path) -> None:
    unit, seeds = comparison.job.unit, "; bands span the seeds" if comparison.seeds > 1 else ""
    judged = f"{comparison.score.decisive} on held-out {comparison.job.held_out}".capitalize()
    old = "Share of the gradient's energy that the old basis still held at a renewal; more is better."
    new = "Overlap with the basis before: 1 the same subspace, 0 as random ones; means over weights."
    for heading, drawn in {
        "Curves": {
            f"Training loss by {unit} seen, smoothed{seeds}.": losses(comparison, out, unit),
            "The same by seconds spent in training steps.": losses(comparison, out, "seconds"),
            f"{judged} at each evaluation{seeds}.": held_out(comparison, out),
        },
        "Learning rates": {f"{judged} by learning rate{seeds and '; mean over the seeds'}.": sensitivity(comparison)},
        "Subspaces": {new: subspaces(comparison, out, "overlap"), old: subspaces(comparison, out, "captured")},
    }.items():
        if any(drawn.values()):
            page.heading(heading)
        for caption, figure in drawn.items():
            if figure is not None:
                page.figure(figure, caption)


def _thinned(values: Sequence[float]) -> list[float]:
    """At most `_POINTS` values, each the mean of its neighbours."""
    size = math.ceil(len(values) / _POINTS)
    return [fmean(values[at : at + size]) for at in range(0, len(values), size)]


def _mean(seeds: Sequence[Sequence[float]]) -> list[float]:
    return list(map(fmean, zip(*seeds, strict=True)))


def _draw(figure: Figure, axes: Axes, drawn: Mapping[str, Curves]) -> Figure:
    """By method the mean over the seeds, and a band from the least to the greatest of them."""
    for index, (method, (along, seeds)) in enumerate(drawn.items()):
        style = line_style(index, len(along))
        axes.plot(along, _mean(seeds), label=method, **style)
        if len(seeds) > 1:
            low, high = (list(map(limit, *seeds)) for limit in (min, max))
            axes.fill_between(along, low, high, color=style["color"], alpha=0.2, linewidth=0)
    add_legend(figure)
    return figure


def _histories(best: Summary, out: Path, field: str) -> list[list[Record]]:
    """Of each seed, the records of steps that have a field, as long as the shortest of them."""
    runs = [records.read(RunFolder(out / end.run.folder).metrics) for end in best.ends]
    seeds = [[record for record in run if field in record and not record.get("final")] for run in runs]
    return [history[: min(map(len, seeds))] for history in seeds]


def losses(comparison: Comparison, out: Path, by: str) -> Figure:
    """Training losses of each method at its best, smoothed, by the tokens or examples seen or by seconds."""
    figure, axes = new_axes("seconds of training", comparison.score.loss)
    drawn: dict[str, Curves] = {}
    for method, best in comparison.best.items():
        seeds = _histories(best, out, "loss")
        along = _mean([_thinned([record[by] for record in steps]) for steps in seeds])
        drawn[method] = along, [smooth(_thinned(known(record["loss"] for record in steps))) for steps in seeds]
    _draw(figure, axes, drawn)
    axes.set_xlim(left=0)
    if by != "seconds":
        count_by(axes, by)
    return figure


def held_out(comparison: Comparison, out: Path) -> Figure | None:
    """What decides which learning rate is best, at each evaluation; None if no run has several."""
    unit, field = comparison.job.unit, comparison.score.field
    figure, axes = new_axes("", f"held-out {comparison.score.decisive}")
    drawn: dict[str, Curves] = {}
    for method, best in comparison.best.items():
        seeds = _histories(best, out, field)
        along = [record[unit] for record in seeds[0]]
        drawn[method] = along, [known(record[field] for record in history) for history in seeds]
    _draw(figure, axes, drawn)
    count_by(axes, unit)
    return figure if any(len(along) > 1 for along, _ in drawn.values()) else None


def sensitivity(comparison: Comparison) -> Figure | None:
    """What decides which learning rate is best, by learning rate, at whichever rate of the others suits it best.

    Returns:
        The figure, or None if no method has several learning rates.
    """
    figure, axes = new_axes("learning rate (logarithmic)", f"held-out {comparison.score.decisive}")
    better = max if comparison.score.more_is_better else min
    found: dict[str, dict[float, float]] = {method: {} for method in comparison.tried}
    for method, summaries in comparison.tried.items():
        for each in summaries:
            value, lr = comparison.decisive(each), each.run.lr
            if math.isfinite(value):
                found[method][lr] = better(value, found[method].get(lr, value))
    _draw(figure, axes, {method: (sorted(by), [[by[lr] for lr in sorted(by)]]) for method, by in found.items()})
    axes.set_xscale("log")
    tried = sorted({each.run.lr for summaries in comparison.tried.values() for each in summaries})
    if len(tried) <= _TICKS:
        axes.set_xticks(tried, [f"{lr:g}" for lr in tried])
        axes.xaxis.minorticks_off()
    return figure if any(len(by_lr) > 1 for by_lr in found.values()) else None


def subspaces(comparison: Comparison, out: Path, field: str) -> Figure | None:
    """A field of ``subspaces.jsonl`` by step, averaged over weights, seeds and as many steps as a layer's turn takes.

    Returns:
        The figure, or None if no method has renewed a basis.
    """
    figure, axes = new_axes("step", "overlap" if field == "overlap" else "captured energy")
    drawn: dict[str, Curves] = {}
    for method, best in comparison.best.items():
        found = [record for end in best.ends for record in records.read(RunFolder(out / end.run.folder).subspaces)]
        renewals = [(record["step"], record[field]) for record in found if record[field] is not None]
        if renewals:
            width = max(best.run.config.optimizer.update_proj_gap, math.ceil(max(renewals)[0] / _BINS))
            bins: dict[int, list[tuple[int, float]]] = {}
            for step, value in renewals:
                bins.setdefault((step - 1) // width, []).append((step, value))
            steps, values = zip(*(_mean(bins[number]) for number in sorted(bins)), strict=True)
            drawn[method] = steps, [values]
    axes.set_ylim(0, 1)
    _draw(figure, axes, drawn)
    return figure if drawn else None
