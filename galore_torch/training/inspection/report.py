"""What an inspection shows and leaves behind, of its `figures`: table, ``report.html``, JSON file and plots."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from galore_torch.training.page.page import Page
from galore_torch.training.run.command import table_of
from galore_torch.training.run.machine import versions
from galore_torch.training.run.plots import GRAY, add_legend, line_style, new_axes
from galore_torch.units import readable

Found = Mapping[str, Any]
"""What `galore_torch.training.inspection.figures.figures` gives."""

Line = tuple[Sequence[float], Sequence[float]]

BY_IT = "To train by it"
"""How the line begins that ends by the flags of the recommendation."""

_HEADINGS = {"spectra": "Energy by rank", "ages": "Bases as they age", "stable_rank": "Stable rank", "run": "The run"}
_CAPTIONS = {
    "spectra": "Share of a gradient's energy in its own strongest directions (solid), and in those of the gradient "
    "{first} steps earlier (dotted), by the share of all directions that a rank is; means over weights and snapshots. "
    "Upright: rank {rank}.",
    "ages": "Share of a gradient's energy that a basis of rank {rank} captures, by the age of the basis. At age 0 the "
    "basis is the gradient's own and so holds its noise too; the level line is what a random basis captures.",
    "overlap": "Overlap of a basis of rank {rank} with the later gradient's own, by its age: 1 the same subspace, 0 as "
    "random ones.",
    "stable_rank": "Stable rank of the gradients by step, mean over the layers: 1 if one direction holds all.",
    "layers": "Stable rank of the gradients by layer, mean over the steps.",
    "run": "What the run itself recorded at its renewals: share of the gradient that the old basis still captured "
    "(solid, filled), and overlap of the new basis with the old (dotted, hollow).",
}


def rows(found: Found) -> Iterator[dict[str, str]]:
    """A row of the table for each group of modules: what stands under each heading."""
    for name, own in found["modules"].items():
        advice, captured = own["recommended"], {age: f"{share:.0%}" for age, share in own["captured"].items()}
        overlap = own["overlap"].get(str(found["ages"][0]))
        yield {
            "module": name,
            "rank": "full" if advice["rank"] == _side(own) else str(advice["rank"] or "-"),
            "gap": f"{'>=' if advice['at_least'] else ''}{advice['gap'] or '-'}",
            "shape": "x".join(map(str, own["shape"])),
            "stable": f"{own['stable_rank']:.1f}",
            "50/90/99 %": "/".join(map(str, own["rank_that_holds"].values())),
            "own": f"{own['own']:.0%}",
            **{f"+{age}": captured.get(str(age), "-") for age in _ages(found)},
            "overlap": "-" if overlap is None else f"{overlap:.2f}",
        }


def _ages(found: Found) -> list[int]:
    """The ages that have a column: the least and the greatest."""
    return sorted({found["ages"][0], found["ages"][-1]})


def _side(own: Found) -> int:
    return int(min(own["shape"][-2:]))


def texts(found: Found) -> list[str]:
    """What the table's columns are, how rank and gap were found, by which flags to train by them, and notes."""
    for_all, own, ages = found["recommended"], found["settings"]["recommendation"], _ages(found)
    legend = (
        "stable: the stable rank. 50/90/99 %: the rank that holds so much of the energy. "
        f"own: what rank {found['rank']} holds of its own gradient; {' and '.join(f'+{age}' for age in ages)}: of the "
        f"gradient so many steps later. overlap: of two bases {ages[0]} steps apart, 0 as of random ones."
    )
    rule = (
        f"rank: the least multiple of {own['rank_multiple']} that captures {own['capture_share']:.0%} of the gradient "
        f"{ages[0]} steps later. gap: the longest after which bases of that rank still capture {own['keep_share']:.0%} "
        f"of what {ages[0]} steps old ones do. Rules of thumb."
    )
    if for_all["rank"] is not None and own["state_budget"] is not None:
        rule += (
            f" Within {own['state_budget']} of optimizer state, ranks go where they capture most for their bytes, "
            f"at most as many: {readable(for_all['state_bytes'])}."
        )
    elif for_all["rank"] is not None:
        least = "at least " if for_all["gap_is_at_least"] else ""
        gap = "" if for_all["gap"] is None else f", gap {least}{for_all['gap']}"
        rule += f" One for all modules: rank {for_all['rank']}{gap}."
    by_it = [f"{BY_IT}, with --lr tuned for it: {for_all['flags']}"] if for_all["flags"] else []
    return [legend, rule, *by_it, *found["notes"]]


def table(found: Found) -> Table:
    """The table for a terminal."""
    rest = [list(row.values()) for row in rows(found)]
    cells = [[name if len(name) < 15 else name.replace(".", ".\n"), *figures] for name, *figures in rest]
    return table_of(next(rows(found)), cells)


def files(found: Found, command: str) -> dict[str, bytes]:
    """All files of an inspection, by name; the page says the command by which they were made."""
    steps, every = (found["settings"]["snapshots"][name] for name in ("steps", "every"))
    lead = f"{found['subject']}: snapshots of the gradients of {len(found['weights'])} weights, one every {every} steps"
    page = Page("Gradients and their subspaces", f"{lead} of {steps}.")
    page.table(list(next(rows(found))), [list(row.values()) for row in rows(found)])
    for text in texts(found):
        said, colon, flags = text.partition(": ") if text.startswith(BY_IT) else (text, "", "")
        page.text(said + colon)
        if flags:  # alone, to be copied
            page.code(flags)
    made = {"inspection.json": (json.dumps(found, indent=1) + "\n").encode()}
    for name, figure in _plots(found).items():
        if name in _HEADINGS:
            page.heading(_HEADINGS[name])
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
        made[f"{name}.png"] = png.getvalue()
        page.figure(figure, _CAPTIONS[name].format(first=found["ages"][0], rank=found["rank"]))
    page.heading("How it was made")
    page.code(command)
    page.facts({**found["facts"], "losses": f"{found['losses'][0]:.3f} to {found['losses'][-1]:.3f}"})
    page.facts(versions())
    made["report.html"] = page.render().encode()
    return made


def _plots(found: Found) -> dict[str, Figure]:
    """All plots, in the order of the page, by the name of the file without its suffix."""
    chance = {own["rank"] / _side(own) for own in found["modules"].values()}
    share, energy, age = (0, 1.01), "share of the energy", "age of the basis, in steps"

    def lines(line: Callable[[Found], Line]) -> dict[str, Line]:
        return {name: line(own) for name, own in found["modules"].items()}

    def spectrum(own: Found, shares: Sequence[float] | None) -> Line:
        ranks = [rank / _side(own) for rank in own["by_rank"]["rank"]]
        return ([0, *ranks], [0, *shares]) if shares else ([], [])

    def by_age(shares: Mapping[str, float]) -> Line:
        return list(map(int, shares)), list(shares.values())

    def renewals(figure: str) -> dict[str, Line]:
        return lines(lambda own: ([one["step"] for one in own["run"]], [one[figure] for one in own["run"]]))

    drawn = {
        "spectra": _draw(
            ("rank, as a share of the shorter side", energy),
            lines(lambda own: spectrum(own, own["by_rank"]["own"])),
            dotted=lines(lambda own: spectrum(own, own["by_rank"]["captured"].get(str(found["ages"][0])))),
            upright=chance,
            xlim=(0, 1),
            ylim=share,
        ),
        "ages": _draw(
            (age, f"{energy} captured"),
            lines(lambda own: by_age({"0": own["own"], **own["captured"]})),
            level=chance,
            ylim=share,
        ),
        "overlap": _draw((age, "overlap"), lines(lambda own: by_age(own["overlap"])), level=[0], ylim=(None, None)),
        "stable_rank": _draw(("step", "stable rank"), _stable_ranks(found, lambda _, step: step), xlim=None),
        "layers": _draw(("layer", "stable rank"), _stable_ranks(found, lambda weight, _: _layer(weight)), xlim=None),
    }
    if any(own["run"] for own in found["modules"].values()):
        labels = ("step of the run", "captured; overlap")
        drawn["run"] = _draw(labels, renewals("captured"), dotted=renewals("overlap"), ylim=share, xlim=None)
    return drawn


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
            axes.plot(*dotted[name], **{**style, "linestyle": ":", "linewidth": 1, "markerfacecolor": "none"})
    for value in level:
        axes.axhline(value, color=GRAY, linewidth=0.8)
    for value in upright:
        axes.axvline(value, color=GRAY, linewidth=0.8)
    axes.set_ylim(*ylim)
    if xlim is None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    else:
        axes.set_xlim(*xlim)
    add_legend(figure)
    return figure


def _stable_ranks(found: Found, along: Callable[[str, int], int | None]) -> dict[str, Line]:
    """The means of the stable ranks of each group's gradients, along something that a weight's name or step says."""
    values: dict[str, dict[int, list[float]]] = {name: {} for name in found["modules"]}
    for weight, own in found["weights"].items():
        for snapshot in own["snapshots"]:
            place = along(weight, snapshot["step"])
            if place is not None:
                values[own["module"]].setdefault(place, []).append(snapshot["stable_rank"])
    return {name: (sorted(by), [fmean(by[at]) for at in sorted(by)]) for name, by in values.items()}


def _layer(weight: str) -> int | None:
    number = re.search(r"\.(\d+)\.", weight)
    return int(number[1]) if number else None
