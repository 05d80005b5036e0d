"""The figures of a comparison's report: losses, held-out results, learning rates and subspaces."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from galore_torch.training.compare.results import Comparison, Summary
from galore_torch.training.run import records
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.plots import add_legend, count_by, known, line_style, new_axes, smooth
from galore_torch.training.run.records import Record

_POINTS = 200  # of a drawn curve, at most
_TICKS = 6  # learning rates that an axis names one by one, at most
_BINS = 40  # of a drawn mean over renewals, at most

Curves = tuple[Sequence[float], Sequence[Sequence[float]]]
"""What is along, and what is up for each seed."""


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
    means = [list(line.get_ydata()) for line in axes.lines]
    late = [loss for mean in means for loss in mean[len(mean) // 20 :] if math.isfinite(loss)]
    if late:  # the first steps' losses would take up half of the figure
        axes.set_ylim(top=max(late) + 0.02 * (max(late) - axes.get_ylim()[0]))
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
    count_by(axes, unit)
    _draw(figure, axes, drawn)
    return figure if any(len(along) > 1 for along, _ in drawn.values()) else None


def sensitivity(comparison: Comparison) -> Figure | None:
    """What decides which learning rate is best, by learning rate, at whichever rate of the others suits it best.

    Returns:
        The figure, or None if no method has several learning rates.
    """
    figure, axes = new_axes("learning rate", f"held-out {comparison.score.decisive}")
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
