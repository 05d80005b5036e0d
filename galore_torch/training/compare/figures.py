"""The figures of a comparison's report: losses, held-out results, learning rates and subspaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from galore_torch.training.compare.results import LOSS, Comparison, Score, Summary
from galore_torch.training.run import records
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.plots import add_legend, count_by, known, line_style, new_axes, smooth
from galore_torch.training.run.records import Record

_POINTS = 200  # of a drawn curve, at most
_TICKS = 6  # learning rates that an axis names one by one, at most
_BINS = 40  # of a drawn mean over renewals, at most


def _thinned(values: Sequence[float]) -> list[float]:
    """At most `_POINTS` values, each the mean of its neighbours."""
    size = math.ceil(len(values) / _POINTS)
    return [sum(values[at : at + size]) / len(values[at : at + size]) for at in range(0, len(values), size)]


def _mean(seeds: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*seeds, strict=True)]


def _band(axes: Axes, index: int, method: str, along: list[float], seeds: list[list[float]]) -> None:
    """A method's mean over the seeds, and a band from the least to the greatest of them."""
    style = line_style(index, len(along))
    axes.plot(along, _mean(seeds), label=method, **style)
    if len(seeds) > 1:
        low, high = ([limit(at) for at in zip(*seeds, strict=True)] for limit in (min, max))
        axes.fill_between(along, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _histories(summary: Summary, out: Path, field: str) -> list[list[Record]]:
    """Of each seed, the records that have a field, as long as the shortest of them."""
    seeds = [
        [record for record in records.read(RunFolder(out / end.run.folder).metrics) if field in record]
        for end in summary.ends
    ]
    seeds = [[record for record in history if not record.get("final")] for history in seeds]
    return [history[: min(map(len, seeds))] for history in seeds]


def _loss_label(score: Score) -> str:
    return "loss" if score.more_is_better else "loss (nats per token)"


def _held_out_label(score: Score) -> str:
    return f"held-out {score.name if score.more_is_better else _loss_label(score)}"


def losses(comparison: Comparison, out: Path, by: str) -> Figure:
    """Training losses of each method at its best, smoothed, by the tokens or examples seen or by seconds."""
    figure, axes = new_axes("seconds of training", _loss_label(comparison.score))
    top = -math.inf
    for index, (method, best) in enumerate(comparison.best.items()):
        seeds = _histories(best, out, "loss")
        along = _mean([_thinned([record[by] for record in steps]) for steps in seeds])
        drawn = [smooth(_thinned(known(record["loss"] for record in steps))) for steps in seeds]
        _band(axes, index, method, along, drawn)
        mean = _mean(drawn)
        top = max([top, *filter(math.isfinite, mean[len(mean) // 20 :])])
    if math.isfinite(top):  # the first steps' losses would take up half of the figure
        axes.set_ylim(top=top + 0.02 * (top - axes.get_ylim()[0]))
    axes.set_xlim(left=0)
    if by != "seconds":
        count_by(axes, by)
    add_legend(figure)
    return figure


def held_out(comparison: Comparison, out: Path) -> Figure | None:
    """What decides which learning rate is best, at each evaluation; None if no run has several."""
    score, unit = comparison.score, comparison.job.unit
    field = score.name if score.more_is_better else LOSS
    figure, axes = new_axes("", _held_out_label(score))
    several = False
    for index, (method, best) in enumerate(comparison.best.items()):
        seeds = _histories(best, out, field)
        along = [float(record[unit]) for record in seeds[0]]
        _band(axes, index, method, along, [known(record[field] for record in history) for history in seeds])
        several |= len(along) > 1
    count_by(axes, unit)
    add_legend(figure)
    return figure if several else None


def sensitivity(comparison: Comparison) -> Figure | None:
    """What decides which learning rate is best, by learning rate, at whichever rate of the others suits it best.

    Returns:
        The figure, or None if no method has several learning rates.
    """
    figure, axes = new_axes("learning rate", _held_out_label(comparison.score))
    better = max if comparison.score.more_is_better else min
    found: dict[str, dict[float, float]] = {}
    for index, (method, summaries) in enumerate(comparison.tried.items()):
        found[method] = {}
        for each in summaries:
            value = comparison.decisive(each)
            if math.isfinite(value):
                found[method][each.run.lr] = better(value, found[method].get(each.run.lr, value))
        points = sorted(found[method].items())
        axes.plot(*zip(*points, strict=True), label=method, **line_style(index, len(points)))
    axes.set_xscale("log")
    tried = sorted({each.run.lr for summaries in comparison.tried.values() for each in summaries})
    if len(tried) <= _TICKS:
        axes.set_xticks(tried, [f"{lr:g}" for lr in tried])
        axes.xaxis.minorticks_off()
    add_legend(figure)
    return figure if any(len(by_lr) > 1 for by_lr in found.values()) else None


def subspaces(comparison: Comparison, out: Path, field: str) -> Figure | None:
    """A field of ``subspaces.jsonl`` by step, averaged over weights, seeds and as many steps as a layer's turn takes.

    Returns:
        The figure, or None if no method has renewed a basis.
    """
    figure, axes = new_axes("step", "overlap" if field == "overlap" else "captured energy")
    for index, (method, best) in enumerate(comparison.best.items()):
        found = [record for end in best.ends for record in records.read(RunFolder(out / end.run.folder).subspaces)]
        renewals = [(record["step"], record[field]) for record in found if record[field] is not None]
        if renewals:
            gap = best.run.config.optimizer.update_proj_gap
            width = max(gap, math.ceil(max(renewals)[0] / _BINS))
            bins: dict[int, list[tuple[int, float]]] = {}
            for step, value in renewals:
                bins.setdefault((step - 1) // width, []).append((step, value))
            points = [_mean(bins[number]) for number in sorted(bins)]
            axes.plot(*zip(*points, strict=True), label=method, **line_style(index, len(points)))
    axes.set_ylim(0, 1)
    add_legend(figure)
    return figure if axes.lines else None
