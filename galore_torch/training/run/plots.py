"""``loss.png``: the losses of one run, or of several beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from galore_torch.training.run import records

_COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a")


def plot_losses(runs: Mapping[str, Path], picture: Path, unit: str = "tokens") -> None:
    """Draw training losses (thin: each step; bold: smoothed) and held-out losses (dots) against tokens.

    Args:
        runs: the ``metrics.jsonl`` of each run by the label it is drawn under.
        picture: where the PNG goes.
        unit: what the records count: tokens or examples.
    """
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, (label, path) in enumerate(runs.items()):
        # Where runs lie on each other, the wider one below can still be seen.
        width = 1.5 + 0.8 * (len(runs) - 1 - index)
        _draw(axes, label, records.read(path), _COLOURS[index % len(_COLOURS)], width, unit)
    axes.set_xlabel(f"{unit} seen")
    axes.set_ylabel("loss (nats per token)" if unit == "tokens" else "loss")
    axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture)


def _draw(axes: Axes, label: str, history: Sequence[records.Record], colour: str, width: float, unit: str) -> None:
    steps = [record for record in history if "loss" in record]
    evaluations = [record for record in history if "eval_loss" in record and not record.get("final")]
    tokens = [record[unit] for record in steps]
    losses = [math.nan if record["loss"] is None else record["loss"] for record in steps]
    axes.plot(tokens, losses, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smooth(losses), color=colour, linewidth=width, label=f"{label}, training")
    if evaluations:
        axes.plot(
            [record[unit] for record in evaluations],
            [math.nan if record["eval_loss"] is None else record["eval_loss"] for record in evaluations],
            color=colour,
            linestyle="none",
            marker="o",
            markersize=3 + 2 * width,
            markeredgecolor="white",
            label=f"{label}, held out{_perplexity(evaluations[-1])}",
        )


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


def _perplexity(record: records.Record) -> str:
    return f": perplexity {_number(record['perplexity'])}" if "perplexity" in record else ""


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:,.1f}"


def short(count: float) -> str:
    """A count for an axis.

    >>> short(409_600)
    '409.6 K'
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g}"
