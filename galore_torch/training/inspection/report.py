"""What an inspection leaves behind: ``report.html``, ``inspection.json`` and the pictures, in one move."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

from rich import box
from rich.table import Table

from galore_torch.training.inspection.drawing import pictures
from galore_torch.training.inspection.result import Inspection
from galore_torch.training.page.page import Page
from galore_torch.training.run.machine import versions

_SHOWN = ("spectra", "ages", "overlap", "stable_rank", "layers", "run")
_LETTERS = 14  # of a kind's name in a line of the terminal
_HEADINGS = {"spectra": "Energy by rank", "ages": "Bases as they age", "stable_rank": "Stable rank", "run": "The run"}


def columns(found: Inspection) -> list[str]:
    """The headings of the table."""
    ages = found.config.looks.ages
    aged = [f"+{ages[0]}"] if len(ages) == 1 else [f"+{ages[0]}", f"+{ages[-1]}"]
    return ["kind", "shape", "stable", "50/90/99 %", "own", *aged, "overlap", "rank", "gap"]


def rows(found: Inspection) -> Iterator[list[str]]:
    """A row of the table for each kind."""
    ages = found.config.looks.ages
    for name, kind in found.kinds.items():
        at, advice = kind.rank - 1, found.advice[name]
        aged = [
            f"{float(kind.captured[age][at]):.0%}" if age in kind.captured else "-"
            for age in dict.fromkeys((ages[0], ages[-1]))
        ]
        yield [
            name,
            "x".join(map(str, kind.shape)),
            f"{kind.stable_rank:.1f}",
            "/".join(map(str, kind.ranks)),
            f"{float(kind.held[at]):.0%}",
            *aged,
            f"{kind.overlap[ages[0]]:.2f}" if ages[0] in kind.overlap else "-",
            "-" if advice.rank is None else "full" if advice.rank == len(kind.held) else str(advice.rank),
            "-" if advice.gap is None else f"{'>=' if advice.at_least else ''}{advice.gap}",
        ]


def legend(found: Inspection) -> str:
    """What the table's columns are."""
    ages = found.config.looks.ages
    aged = f"+{ages[0]}" if len(ages) == 1 else f"+{ages[0]} and +{ages[-1]}"
    return (
        "stable: the stable rank. 50/90/99 %: the rank that holds so much of the energy. "
        f"own: what rank {found.rank} holds of its own gradient; {aged}: of the gradient so many steps later. "
        f"overlap: of two bases {ages[0]} steps apart, 0 as of random ones."
    )


def rule(found: Inspection) -> str:
    """How rank and gap were found, and which suit all kinds."""
    rank, gap, at_least = found.one_for_all
    own = found.config.recommendation
    first = found.config.looks.ages[0]
    told = (
        f"rank: the least multiple of {own.rank_multiple} that captures {own.capture_share:.0%} of the gradient "
        f"{first} steps later. gap: the longest after which bases of that rank still capture {own.keep_share:.0%} "
        f"of what {first} steps old ones do. Rules of thumb."
    )
    if rank is None:
        return told
    until = "" if gap is None else f", gap {'at least ' if at_least else ''}{gap}"
    return f"{told} One for all kinds: rank {rank}{until}."


def table(found: Inspection) -> Table:
    """The table for a terminal of 80 columns."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for place, heading in enumerate(columns(found)):
        words = place < 1
        made.add_column(heading, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for name, *figures in rows(found):
        made.add_row(name if len(name) <= _LETTERS else name.replace(".", ".\n"), *figures)
    return made


def page(found: Inspection, command: str, drawn: dict[str, tuple[object, str]]) -> Page:
    """Make the page.

    Args:
        found: the figures.
        command: by which they were made.
        drawn: pictures with their captions.
    """
    looks = found.config.looks
    made = Page(
        "Gradients and their subspaces",
        f"{found.subject.title}: {looks.looks} looks at the gradients of "
        f"{sum(map(len, found.watches.values()))} weights, one every {looks.every} steps.",
    )
    made.table(columns(found), rows(found))
    made.text(legend(found))
    made.text(rule(found))
    for note in found.notes:
        made.text(note)
    for name in _SHOWN:
        if name not in drawn:
            continue
        if name in _HEADINGS:
            made.heading(_HEADINGS[name])
        figure, caption = drawn[name]
        made.figure(figure, caption)  # type: ignore[arg-type]
    made.heading("How it was made")
    made.code(command)
    made.facts({**found.subject.facts, "losses": f"{found.losses[0]:.3f} to {found.losses[-1]:.3f}"})
    made.facts(versions())
    return made


def files(found: Inspection, command: str) -> dict[str, bytes]:
    """All files of an inspection, by name.

    Args:
        found: the figures.
        command: by which they were made.
    """
    drawn = pictures(found)
    made: dict[str, bytes] = {"inspection.json": (json.dumps(found.as_json(), indent=1) + "\n").encode()}
    for name, (figure, _) in drawn.items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
        made[f"{name}.png"] = png.getvalue()
    made["report.html"] = page(found, command, dict(drawn)).render().encode()
    return made
