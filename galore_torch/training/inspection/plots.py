"""The plots of an inspection."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from galore_torch.training.inspection.history import GradientHistory
from galore_torch.training.inspection.modules import ModuleGroup
from galore_torch.training.inspection.result import Inspection
from galore_torch.training.run.plots import GRAY, add_legend, line_style, new_axes

Line = tuple[Sequence[float], Sequence[float]]


class Plot(NamedTuple):
    """A plot, with the heading of the section of the page that it begins, if it begins one, and its caption."""

    heading: str
    figure: Figure
    caption: str


def plots(found: Inspection) -> dict[str, Plot]:
    """All plots, in the order of the page, by the name of the file without its suffix."""
    groups, rank, first = found.modules, found.rank, found.config.snapshots.ages[0]
    chance = {group.rank / len(group.held) for group in groups.values()}
    made: dict[str, Plot] = {}

    def plot(
        name: str, heading: str, labels: str, line: Callable[[ModuleGroup], Line], caption: str, **how: Any
    ) -> None:
        made[name] = Plot(heading, _draw(labels, {name: line(group) for name, group in groups.items()}, **how), caption)

    plot(
        "spectra",
        "Energy by rank",
        "rank, as a share of the shorter side; share of the energy",
        lambda group: _by_rank(group.held.tolist()),
        f"Share of a gradient's energy in its own strongest directions (solid), and in those of the gradient {first} "
        "steps earlier (dotted), by the share of all directions that a rank is; means over weights and snapshots.",
        dotted={name: _by_rank(one.captured[first].tolist()) for name, one in groups.items() if first in one.captured},
        upright=chance,
        xlim=(0, 1),
        ylim=(0, 1.01),
    )
    plot(
        "ages",
        "Bases as they age",
        "age of the basis, in steps; share of the energy captured",
        lambda one: ([0, *one.captured], [float(c[one.rank - 1]) for c in (one.held, *one.captured.values())]),
        f"Share of a gradient's energy that a basis of rank {rank} captures, by the age of the basis. At age 0 the "
        "basis is the gradient's own and so holds its noise too; the level line is what a random basis captures.",
        level=chance,
        ylim=(0, 1.01),
    )
    plot(
        "overlap",
        "",
        "age of the basis, in steps; overlap",
        lambda group: (list(group.overlap), list(group.overlap.values())),
        f"Overlap of a basis of rank {rank} with the later gradient's own, by its age: 1 the same subspace, 0 as "
        "random ones.",
        level=[0],
        ylim=(None, None),
    )
    plot(
        "stable_rank",
        "Stable rank",
        "step; stable rank",
        lambda group: _means((one.step, one.stable_rank) for history in group.histories for one in history.snapshots),
        "Stable rank of the gradients by step, mean over the layers: 1 if one direction holds all.",
        xlim=None,
    )
    plot(
        "layers",
        "",
        "layer; stable rank",
        lambda group: _means(_by_layer(group.histories)),
        "Stable rank of the gradients by layer, mean over the steps.",
        xlim=None,
    )
    if found.recorded:
        captured, overlap = (
            {name: ([one["step"] for one in own], [one[of] for one in own]) for name, own in found.recorded.items()}
            for of in ("captured", "overlap")
        )
        made["run"] = Plot(
            "The run",
            _draw("step of the run; captured; overlap", captured, dotted=overlap, ylim=(0, 1.01)),
            "What the run itself recorded at its renewals: share of the gradient that the old basis still captured "
            "(solid), and overlap of the new basis with the old (dotted).",
        )
    return made


def _draw(
    labels: str,
    lines: Mapping[str, Line],
    *,
    dotted: Mapping[str, Line] | None = None,
    level: Iterable[float] = (),
    upright: Iterable[float] = (),
    xlim: tuple[float, float | None] | None = (0, None),
    ylim: tuple[float | None, float | None] = (0, None),
) -> Figure:
    """Lines by name, with dotted ones of the same color, level and upright ones for reference, and limits.

    Along steps and layers, which have no `xlim`, only whole numbers are shown.
    """
    figure, axes = new_axes(*labels.split("; ", 1))
    for index, (name, line) in enumerate(lines.items()):
        style = line_style(index, len(line[0]))
        axes.plot(*line, label=name, **style)
        if dotted and name in dotted:
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


def _by_rank(shares: list[float]) -> Line:
    return [place / len(shares) for place in range(len(shares) + 1)], [0, *shares]


def _by_layer(histories: Iterable[GradientHistory]) -> Iterable[tuple[int, float]]:
    for one in histories:
        layer = layer_of(one.name)
        if layer is not None and one.snapshots:
            yield layer, fmean(snapshot.stable_rank for snapshot in one.snapshots)


def _means(points: Iterable[tuple[int, float]]) -> Line:
    """The mean of all points at the same place along."""
    values: dict[int, list[float]] = {}
    for along, up in points:
        values.setdefault(along, []).append(up)
    return sorted(values), [fmean(values[along]) for along in sorted(values)]


def layer_of(weight: str) -> int | None:
    """The number of the layer that a weight is in, if its name has one.

    >>> layer_of("model.layers.3.self_attn.q_proj.weight")
    3
    """
    number = re.search(r"\.(\d+)\.", weight)
    return int(number[1]) if number else None
