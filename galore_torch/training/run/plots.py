"""Axes, colors and legends of all figures, and ``loss.png``: the losses of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from galore_torch.training.run import records

COLORS = ("#2b83c6", "#d9661f", "#2f9155", "#9a62d0", "#d1508f", "#178a96", "#a8743a", "#7d8590")
"""Colors of lines that stand out from white and from near-black alike, by at least 3 to 1."""

GRAY = COLORS[-1]
"""Of grids and reference lines."""

FIGURE_SIZE = (5.8, 3.6)
"""Width and height in inches of a figure on a page: its letters are then as large as the text's, on a phone too."""

_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_MARKED = 20  # points of a line that are still marked one by one
_LEGEND_LETTERS = 40  # of the labels in a row, at most


def line_style(index: int, points: int = _MARKED + 1) -> dict[str, Any]:
    """How the n-th line of a figure is drawn: a color, a marker for few points, dashes once the colors are used up.

    Args:
        index: of the line, from 0.
        points: how many the line has.

    Returns:
        Keywords of `matplotlib.axes.Axes.plot`.

    >>> line_style(8, points=3)
    {'color': '#2b83c6', 'linestyle': '--', 'linewidth': 1.5, 'clip_on': False, 'marker': 's', 'markersize': 4}
    """
    dashes, color = divmod(index, len(COLORS))
    style = {"color": COLORS[color], "linestyle": _DASHES[dashes % len(_DASHES)], "linewidth": 1.5}
    style["clip_on"] = False  # else a point at an end of an axis is cut in two
    marks = {"marker": _MARKERS[(color + dashes) % len(_MARKERS)], "markersize": 4}
    return style | (marks if points <= _MARKED else {})


def new_axes(xlabel: str, ylabel: str, *, size: tuple[float, float] = FIGURE_SIZE) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes.

    Args:
        xlabel: what is along, with its unit.
        ylabel: what is up, with its unit.
        size: width and height in inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.grid(color=GRAY, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def add_legend(figure: Figure) -> None:
    """Name the labelled lines above the axes, where they hide nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        columns = max(1, min(4, _LEGEND_LETTERS // max(map(len, labels))))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)


def count_by(axes: Axes, unit: str) -> None:
    """Let the axis along begin at 0 and count tokens or examples in thousands, millions or billions."""
    axes.set_xlabel(f"{unit} seen")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda count, _: short(count))


def plot_losses(label: str, metrics: Path, picture: Path, unit: str = "tokens") -> None:
    """Draw training losses (thin: each step; bold: smoothed) and held-out losses (diamonds) against tokens.

    Args:
        label: what was trained.
        metrics: the run's ``metrics.jsonl``.
        picture: where the PNG goes.
        unit: what the records count: tokens or examples.
    """
    figure, axes = new_axes("", "loss (nats per token)" if unit == "tokens" else "loss", size=(8, 4.8))
    history = records.read(metrics)
    steps = [record for record in history if "loss" in record]
    seen, losses = [record[unit] for record in steps], known(record["loss"] for record in steps)
    axes.plot(seen, losses, color=COLORS[0], alpha=0.25, linewidth=0.8)
    axes.plot(seen, smooth(losses), label=f"{label}, training", **line_style(0))
    evaluations = [record for record in history if "eval_loss" in record and not record.get("final")]
    if evaluations:
        score = evaluations[-1].get("perplexity", 0)
        judged = ": perplexity not finite" if score is None else f": perplexity {score:,.1f}" if score else ""
        axes.plot(
            [record[unit] for record in evaluations],
            known(record["eval_loss"] for record in evaluations),
            label=f"{label}, held out{judged}",
            **{**line_style(1), "linestyle": "none", "marker": "D", "markersize": 6, "markeredgecolor": "white"},
        )
    count_by(axes, unit)
    add_legend(figure)
    figure.savefig(picture, dpi=150)


def known(values: Iterable[float | None]) -> list[float]:
    """Values for an axis: what a record has as null, because it was not finite, is a gap."""
    return [math.nan if value is None else value for value in values]


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean over a window around each step, a twentieth of the run wide, narrower towards both ends.

    >>> smooth([4.0, 1.0, 4.0] * 20)[28:31]
    [3.0, 3.0, 3.0]
    """
    half = len(losses) // 40
    smoothed = []
    for step in range(len(losses)):
        reach = min(half, step, len(losses) - 1 - step)  # as far to the left as to the right, so that nothing lags
        window = losses[step - reach : step + reach + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def short(count: float) -> str:
    """A count for an axis.

    >>> short(409_600)
    '409.6 K'
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g}"
