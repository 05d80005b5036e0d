"""The pictures of an inspection."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from galore_torch.training.inspection.result import Inspection
from galore_torch.training.inspection.watch import Look, Watch
from galore_torch.training.run.plots import GRAY, add_legend, line_style, new_axes

Line = tuple[Sequence[float], Sequence[float]]


def pictures(found: Inspection) -> dict[str, tuple[Figure, str]]:
    """All pictures, in the order of a page.

    Args:
        found: the figures.

    Returns:
        Figure and caption by the name of the file without its suffix.
    """
    rank = found.rank
    ages = found.config.looks.ages
    drawn = {
        "spectra": (
            _spectra(found),
            "Share of a gradient's energy in its own strongest directions (solid), and in those of the gradient "
            f"{ages[0]} steps earlier (dotted), by the share of all directions that a rank is; means over weights and "
            "looks.",
        ),
        "ages": (
            _ages(found),
            f"Share of a gradient's energy that a basis of rank {rank} captures, by the age of the basis. At age 0 the "
            "basis is the gradient's own and so holds its noise too; the level line is what a random basis captures.",
        ),
        "overlap": (
            _by_age(found),
            f"Overlap of a basis of rank {rank} with the later gradient's own, by its age: 1 the same subspace, 0 as "
            "random ones.",
        ),
        "stable_rank": (
            _over_steps(found),
            "Stable rank of the gradients by step, mean over the layers: 1 if one direction holds all.",
        ),
        "layers": (_by_layer(found), "Stable rank of the gradients by layer, mean over the steps."),
    }
    if found.renewals:
        drawn["run"] = (
            _of_run(found),
            "What the run itself recorded at its renewals: share of the gradient that the old basis still captured "
            "(solid), and overlap of the new basis with the old (dotted).",
        )
    return drawn


def _plot(figure: Figure, axes: Axes, lines: Mapping[str, Line]) -> None:
    for index, (label, (along, up)) in enumerate(lines.items()):
        axes.plot(along, up, label=label, **line_style(index, len(along)))
    add_legend(figure)


def _spectra(found: Inspection) -> Figure:
    figure, axes = new_axes("rank, as a share of the shorter side", "share of the energy")
    first = found.config.looks.ages[0]
    for index, (name, kind) in enumerate(found.kinds.items()):
        side = len(kind.held)
        along = [place / side for place in range(side + 1)]
        look = line_style(index)
        axes.plot(along, [0, *kind.held.tolist()], label=name, **look)
        if first in kind.captured:
            axes.plot(along, [0, *kind.captured[first].tolist()], **{**look, "linestyle": ":", "linewidth": 1})
    for share in {kind.rank / len(kind.held) for kind in found.kinds.values()}:
        axes.axvline(share, color=GRAY, linewidth=0.8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.01)
    add_legend(figure)
    return figure


def _ages(found: Inspection) -> Figure:
    figure, axes = new_axes("age of the basis, in steps", "share of the energy captured")
    lines: dict[str, Line] = {}
    for name, kind in found.kinds.items():
        at = kind.rank - 1
        lines[name] = (
            [0, *kind.captured],
            [float(kind.held[at]), *(float(curve[at]) for curve in kind.captured.values())],
        )
    _plot(figure, axes, lines)
    for chance in {kind.rank / len(kind.held) for kind in found.kinds.values()}:
        axes.axhline(chance, color=GRAY, linewidth=0.8)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.01)
    return figure


def _by_age(found: Inspection) -> Figure:
    figure, axes = new_axes("age of the basis, in steps", "overlap")
    _plot(figure, axes, {name: (list(kind.overlap), list(kind.overlap.values())) for name, kind in found.kinds.items()})
    axes.axhline(0, color=GRAY, linewidth=0.8)
    axes.set_xlim(left=0)
    return figure


def _over_steps(found: Inspection) -> Figure:
    figure, axes = new_axes("step", "stable rank")
    _plot(figure, axes, {name: by_step(found.watches[name], lambda look: look.stable_rank) for name in found.kinds})
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def by_step(watches: Sequence[Watch], figure: Callable[[Look], float]) -> Line:
    """A figure of every look, on average over weights.

    Args:
        watches: the weights'.
        figure: of a look.

    Returns:
        The steps, and the means.
    """
    values: dict[int, list[float]] = {}
    for watch in watches:
        for look in watch.looks:
            values.setdefault(look.step, []).append(figure(look))
    steps = sorted(values)
    return steps, [fmean(values[step]) for step in steps]


def layer_of(weight: str) -> int | None:
    """The number of the layer that a weight is in, if its name has one.

    >>> layer_of("model.layers.3.self_attn.q_proj.weight")
    3
    """
    number = re.search(r"\.(\d+)\.", weight)
    return int(number[1]) if number else None


def _by_layer(found: Inspection) -> Figure:
    figure, axes = new_axes("layer", "stable rank")
    lines: dict[str, Line] = {}
    for name in found.kinds:
        values: dict[int, list[float]] = {}
        for watch in found.watches[name]:
            layer = layer_of(watch.name)
            if layer is not None and watch.looks:
                values.setdefault(layer, []).append(fmean(look.stable_rank for look in watch.looks))
        layers = sorted(values)
        lines[name] = (layers, [fmean(values[layer]) for layer in layers])
    _plot(figure, axes, lines)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _of_run(found: Inspection) -> Figure:
    figure, axes = new_axes("step of the run", "captured; overlap")
    for index, (name, renewals) in enumerate(found.renewals.items()):
        steps = [one.step for one in renewals]
        look = line_style(index, len(steps))
        axes.plot(steps, [one.captured for one in renewals], label=name, **look)
        axes.plot(steps, [one.overlap for one in renewals], **{**look, "linestyle": ":"})
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.01)
    add_legend(figure)
    return figure
