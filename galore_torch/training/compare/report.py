"""``report.html``: curves, table, learning rates and circumstances of a comparison on one page."""

from __future__ import annotations

import shlex
from pathlib import Path

from galore_torch.training.compare import figures
from galore_torch.training.compare.results import Comparison, notes, rows
from galore_torch.training.compare.settings import apart_and_shared
from galore_torch.training.page.page import Page
from galore_torch.training.run.machine import versions

_COLUMNS = 38  # of a phone


def report(comparison: Comparison, out: Path, command: str) -> Page:
    """Make the page.

    Args:
        comparison: the runs and how they are judged.
        out: the comparison's folder.
        command: by which it was begun.
    """
    job, first = comparison.job, comparison.outcomes[0].run
    seeds = len({outcome.run.seed for outcome in comparison.outcomes})
    page = Page(
        f"{len(comparison.methods)} methods, {first.amount} each",
        f"galore {job.subcommand} at equal data, order and length; each method at the best of the learning rates "
        f"tried, over {seeds} seed{'s' if seeds > 1 else ''}.",
    )
    _table(page, comparison)
    if comparison.best:
        _figures(page, comparison, out)
    page.heading("How it was made")
    page.code(in_lines(command))
    page.facts(versions(job.libraries))
    apart, shared = apart_and_shared({outcome.run.method: outcome.run.config for outcome in comparison.outcomes})
    page.heading("Settings of each method")
    page.table(
        ["", *comparison.methods],
        [[name, *(_told(values.get(method, "")) for method in comparison.methods)] for name, values in apart.items()],
        caption="empty where a setting says nothing to a method",
        words=1 + len(comparison.methods),
    )
    page.heading("Settings of all runs")
    page.facts({name: _told(value) for name, value in shared.items()})
    return page


def in_lines(command: str) -> str:
    r"""A command in lines that a phone shows whole, none cut inside an option and its value; shells read it the same.

    >>> print(in_lines("galore compare --method full --method galore --lr 0.001 --dry-run"))
    galore compare --method full \
      --method galore --lr 0.001 --dry-run
    """
    parts: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("-"):
            parts.append([])
        parts[-1].append(word)
    lines = [shlex.join(parts[0])]
    for part in map(shlex.join, parts[1:]):
        if len(lines[-1]) + len(part) < _COLUMNS:
            lines[-1] += f" {part}"
        else:
            lines.append(f"  {part}")
    return " \\\n".join(lines)


def _told(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _table(page: Page, comparison: Comparison) -> None:
    job, score = comparison.job, comparison.score
    name = "score" if score is None else score.name
    beside = "" if score is None else score.beside_full
    page.table(
        ["method", "lr / others", f"{name} ± std", beside, f"{job.unit}/s", "state, MB", "peak memory, MB", "trained"],
        rows(comparison),
        caption=f"{name} on held-out {job.held_out}; memory of the optimizer's state and of the whole process; "
        "parameters that are trained",
    )
    for note in notes(comparison):
        page.text(note)
    for outcome in comparison.outcomes:
        if outcome.final is None:
            page.text(f"{outcome.run.label}: {outcome.error or 'not finished'}")


def _figures(page: Page, comparison: Comparison, out: Path) -> None:
    job, score = comparison.job, comparison.score
    assert score is not None
    page.heading("Curves")
    page.figure(
        figures.curves(comparison, out, job.unit), f"Training loss by {job.unit} seen, smoothed; bands span the seeds."
    )
    page.figure(figures.curves(comparison, out, "seconds"), "The same by seconds spent in training steps.")
    judged = f"{score.name if score.more_is_better else 'loss'} on held-out {job.held_out}".capitalize()
    on_the_way = figures.held_out(comparison, out)
    if on_the_way is not None:
        page.figure(on_the_way, f"{judged} at each evaluation; bands span the seeds.")
    by_rate = figures.sensitivity(comparison)
    if by_rate is not None:
        page.heading("Learning rates")
        page.figure(by_rate, f"{judged} by learning rate; the mean over the seeds.")
    made = {
        "How much of the basis before is left at a renewal: 1 all of it, 0 as of a random one. "
        "Means over weights and seeds.": figures.subspaces(comparison, out, "overlap", "overlap"),
        "Share of the gradient's energy that the basis before still held at a renewal; "
        "the greater, the less is lost.": figures.subspaces(comparison, out, "captured", "captured energy"),
    }
    if any(made.values()):
        page.heading("Subspaces")
    for caption, figure in made.items():
        if figure is not None:
            page.figure(figure, caption)
