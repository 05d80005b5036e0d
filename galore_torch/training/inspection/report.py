"""What an inspection shows and leaves behind: its table, ``report.html``, ``inspection.json`` and the plots."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

from rich import box
from rich.table import Table

from galore_torch.training.inspection.plots import HEADINGS, plots
from galore_torch.training.inspection.result import Inspection
from galore_torch.training.page.page import Page
from galore_torch.training.run.machine import versions


def rows(found: Inspection) -> Iterator[dict[str, str]]:
    """A row of the table for each group of modules: what stands under each heading."""
    for name, group in found.modules.items():
        at, first, recommended = group.rank - 1, found.config.snapshots.ages[0], found.recommended[name]
        captured = {age: f"{float(curve[at]):.0%}" for age, curve in group.captured.items()}
        yield {
            "module": name,
            "shape": "x".join(map(str, group.shape)),
            "stable": f"{group.stable_rank:.1f}",
            "50/90/99 %": "/".join(map(str, group.ranks)),
            "own": f"{float(group.held[at]):.0%}",
            **{f"+{age}": captured.get(age, "-") for age in _ages(found)},
            "overlap": f"{group.overlap[first]:.2f}" if first in group.overlap else "-",
            "rank": "full" if recommended.rank == len(group.held) else str(recommended.rank or "-"),
            "gap": f"{'>=' if recommended.at_least else ''}{recommended.gap or '-'}",
        }


def _ages(found: Inspection) -> list[int]:
    """The ages that have a column: the least and the greatest."""
    return sorted({found.config.snapshots.ages[0], found.config.snapshots.ages[-1]})


def texts(found: Inspection) -> list[str]:
    """What the table's columns are, how rank and gap were found and which suit all modules, and notes."""
    for_all, own, ages = found.recommended_for_all, found.config.recommendation, _ages(found)
    legend = (
        "stable: the stable rank. 50/90/99 %: the rank that holds so much of the energy. "
        f"own: what rank {found.rank} holds of its own gradient; {' and '.join(f'+{age}' for age in ages)}: of the "
        f"gradient so many steps later. overlap: of two bases {ages[0]} steps apart, 0 as of random ones."
    )
    rule = (
        f"rank: the least multiple of {own.rank_multiple} that captures {own.capture_share:.0%} of the gradient "
        f"{ages[0]} steps later. gap: the longest after which bases of that rank still capture {own.keep_share:.0%} "
        f"of what {ages[0]} steps old ones do. Rules of thumb."
    )
    gap = "" if for_all.gap is None else f", gap {'at least ' if for_all.at_least else ''}{for_all.gap}"
    rule += "" if for_all.rank is None else f" One for all modules: rank {for_all.rank}{gap}."
    return [legend, rule, *found.notes]


def table(found: Inspection) -> Table:
    """The table for a terminal of 80 columns."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for place, heading in enumerate(next(rows(found))):
        made.add_column(heading, justify="right" if place else "left", overflow="fold", no_wrap=bool(place))
    for name, *figures in map(dict.values, rows(found)):
        made.add_row(name if len(name) < 15 else name.replace(".", ".\n"), *figures)
    return made


def files(found: Inspection, command: str) -> dict[str, bytes]:
    """All files of an inspection, by name; the page says the command by which they were made."""
    snapshots, weights = found.config.snapshots, sum(len(group.histories) for group in found.modules.values())
    page = Page(
        "Gradients and their subspaces",
        f"{found.inspected.title}: {snapshots.count} snapshots of the gradients of {weights} weights, one every "
        f"{snapshots.every} steps.",
    )
    page.table(list(next(rows(found))), [list(row.values()) for row in rows(found)])
    for text in texts(found):
        page.text(text)
    made = {"inspection.json": (json.dumps(found.as_json(), indent=1) + "\n").encode()}
    for name, (figure, caption) in plots(found).items():
        if name in HEADINGS:
            page.heading(HEADINGS[name])
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
        made[f"{name}.png"] = png.getvalue()
        page.figure(figure, caption)
    page.heading("How it was made")
    page.code(command)
    page.facts({**found.inspected.facts, "losses": f"{found.losses[0]:.3f} to {found.losses[-1]:.3f}"})
    page.facts(versions())
    made["report.html"] = page.render().encode()
    return made
