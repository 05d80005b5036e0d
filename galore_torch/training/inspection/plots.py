"""The plots of an inspection."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from galore_torch.training.inspection.modules import ModuleGroup
from galore_torch.training.inspection.result import Inspection
from galore_torch.training.run.plots import GRAY, add_legend, line_style, new_axes

Line = tuple[Sequence[float], Sequence[float]]

HEADINGS = {"spectra": "Energy by rank", "ages": "Bases as they age", "stable_rank": "Stable rank", "run": "The run"}
"""The sections of the page, by the first plot of each."""

_CAPTIONS = {
    "spectra": "Share of a gradient's energy in its own strongest directions (solid), and in those of the gradient "
    "{first} steps earlier (dotted), by the share of all directions that a rank is; means over weights and snapshots.",
    "ages": "Share of a gradient's energy that a basis of rank {rank} captures, by the age of the basis. At age 0 the "
    "basis is the gradient's own and so holds its noise too; the level line is what a random basis captures.",
    "overlap": "Overlap of a basis of rank {rank} with the later gradient's own, by its age: 1 the same subspace, 0 as "
    "random ones.",
    "stable_rank": "Stable rank of the gradients by step, mean over the layers: 1 if one direction holds all.",
    "layers": "Stable rank of the gradients by layer, mean over the steps.",
    "run": "What the run itself recorded at its renewals: share of the gradient that the old basis still captured "
    "(solid), and overlap of the new basis with the old (dotted).",
}


def plots(found: Inspection) -> dict[str, tuple[Figure, str]]:
    """All plots with their captions, in the order of the page, by the name of the file without its suffix."""
    first, groups, recorded = found.config.snapshots.ages[0], found.modules, found.recorded
    chance = {group.rank / len(group.held) for group in groups.values()}
    share, energy, age = (0, 1.01), "share of the energy", "age of the basis, in steps"

    def lines(line: Callable[[ModuleGroup], Line]) -> dict[str, Line]:
        return {name: line(group) for name, group in groups.items()}

    def renewals(figure: str) -> dict[str, Line]:
        return {name: ([one["step"] for one in own], [one[figure] for one in own]) for name, own in recorded.items()}

    drawn = {
        "spectra": _draw(
            ("rank, as a share of the shorter side", energy),
            lines(lambda group: _by_rank(group.held)),
            dotted=lines(lambda group: _by_rank(group.captured[first]) if first in group.captured else ([], [])),
            upright=chance,
            xlim=(0, 1),
            ylim=share,
        ),
        "ages": _draw((age, f"{energy} captured"), lines(_by_age), level=chance, ylim=share),
        "overlap": _draw(
            (age, "overlap"),
            lines(lambda group: (list(group.overlap), list(group.overlap.values()))),
            level=[0],
            ylim=(None, None),
        ),
        "stable_rank": _draw(("step", "stable rank"), lines(_stable_ranks), xlim=None),
        "layers": _draw(("layer", "stable rank"), lines(lambda group: _stable_ranks(group, by_layer=True)), xlim=None),
    }
    if recorded:
        labels = ("step of the run", "captured; overlap")
        drawn["run"] = _draw(labels, renewals("captured"), dotted=renewals("overlap"), ylim=share)
    return {name: (figure, _CAPTIONS[name].format(first=first, rank=found.rank)) for name, figure in drawn.items()}


def _draw(
    labels: tuple[str, str],
    lines: Mapping[str, Line],
    *,
    dotted: Mapping[str, Line] | None = None,
    level: Iterable[float] = (),
    upright: Iterable[float] = (),
    xlim: tuple[float, float | None] | None = (0, None),
    ylim: tuple[float | None, float | None] = (0, None),
) -> Figure:
    """Lines by name, dotted ones of the same color, level and upright ones; whole numbers along what has no limit."""
    figure, axes = new_axes(*labels)
    for index, (name, line) in enumerate(lines.items()):
        style = line_style(index, len(line[0]))
        axes.plot(*line, label=name, **style)
        if dotted:
            axes.plot(*dotted[name], **{**style, "linestyle": ":", "linewidth": 1})
    for value in level:
        axes.axhline(value, color=GRAY, linewidth=0.8)
    for value in upright:
        axes.axvline(value, color=GRAY, linewidth=0.8)
    axes.set_ylim(*ylim)
    if xlim is None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_xlim(*xlim)
    add_legend(figure)
    return figure


def _by_rank(shares: Tensor) -> Line:
    return [place / len(shares) for place in range(len(shares) + 1)], [0, *shares.tolist()]


def _by_age(group: ModuleGroup) -> Line:
    return [0, *group.captured], [float(curve[group.rank - 1]) for curve in (group.held, *group.captured.values())]


def _stable_ranks(group: ModuleGroup, *, by_layer: bool = False) -> Line:
    """The means of the stable ranks of a group's gradients, by step or by layer."""
    values: dict[int, list[float]] = {}
    for history in group.histories:
        for snapshot in history.snapshots:
            along = _layer(history.name) if by_layer else snapshot.step
            if along is not None:
                values.setdefault(along, []).append(snapshot.stable_rank)
    return sorted(values), [fmean(values[along]) for along in sorted(values)]


def _layer(weight: str) -> int | None:
    number = re.search(r"\.(\d+)\.", weight)
    return int(number[1]) if number else None
