"""``report.html``: table, curves, learning rates and circumstances of a comparison on one page."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galore_torch.training.compare import figures
from galore_torch.training.compare.plan import OF_RUNS
from galore_torch.training.compare.results import Comparison, notes, rows
from galore_torch.training.page.page import Page
from galore_torch.training.run.machine import versions
from galore_torch.training.settings.adapter import heeded_by
from galore_torch.training.settings.methods import heeds

_COLUMNS = 38  # of a phone


def report(comparison: Comparison, out: Path, command: str) -> Page:
    """Make the page.

    Args:
        comparison: the runs and how they are judged.
        out: the comparison's folder.
        command: by which it was begun.
    """
    job, methods = comparison.job, comparison.methods
    seeds = f"{comparison.seeds} seed{'s' if comparison.seeds > 1 else ''}"
    page = Page(
        f"{len(methods)} methods, {comparison.ends[0].run.amount} each",
        f"galore {job.name} at equal data, order and length; each method at the best of the learning rates "
        f"tried, over {seeds}.",
    )
    _table(page, comparison)
    if comparison.best:
        _figures(page, comparison, out)
    page.heading("How it was made")
    page.code(in_lines(command))
    page.facts(versions(job.libraries))
    apart, shared = apart_and_shared({end.run.method: end.run.config for end in comparison.ends})
    page.heading("Settings of each method")
    page.table(
        ["", *methods],
        [[name, *(_words(values.get(method, "")) for method in methods)] for name, values in apart.items()],
        caption="empty where a setting has no effect on a method",
        words=1 + len(methods),
    )
    page.heading("Settings of all runs")
    page.facts({name: _words(value) for name, value in shared.items()})
    return page


def apart_and_shared(configs: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The settings that methods differ in, and those that they have in common.

    Args:
        configs: a configuration of each method.

    Returns:
        Of each setting that differs or that has an effect on some methods alone, its value by method; and all others
        that are set. Learning rates and seeds are in neither: runs of one method differ in them.
    """
    effective = {method: _effective(config) for method, config in configs.items()}
    apart: dict[str, dict[str, Any]] = {}
    shared: dict[str, Any] = {}
    for name in dict.fromkeys(name for settings in effective.values() for name in settings):
        values = {method: settings[name] for method, settings in effective.items() if name in settings}
        if set(values.values()) == {None}:
            continue
        if len(values) < len(configs) or len(set(values.values())) > 1:
            apart[name] = values
        else:
            shared[name] = next(iter(values.values()))
    return apart, shared


def _effective(config: Any) -> dict[str, Any]:
    """All settings that have an effect, but for learning rates and the seed."""
    adapter = config.adapter.adapter
    return {
        name: value
        for section in dataclasses.asdict(config).values()
        for name, value in section.items()
        if name not in OF_RUNS
        and heeds(name, config.optimizer, config.adapter)
        and heeded_by(adapter, name)
        and not (name == "rank" and adapter != "none")  # adapter_rank has it
    }


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


def _words(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else "none" if value is None else str(value)


def _table(page: Page, comparison: Comparison) -> None:
    job, name, beside = comparison.job, comparison.score.name or "score", comparison.score.beside_full
    spread = " ± std" if any(best.spread is not None for best in comparison.best.values()) else ""
    page.table(
        ["method", "lr / others", name + spread, beside, f"{job.unit}/s", "state, MB", "peak memory, MB", "trained"],
        rows(comparison),
        caption=f"{name} on held-out {job.held_out}; memory of the optimizer's state and of the whole process; "
        "parameters that are trained",
    )
    for note in notes(comparison):
        page.text(note)
    for end in comparison.ends:
        if end.final is None:
            page.text(f"{end.run.label}: {end.error or 'not finished'}")


def _figures(page: Page, comparison: Comparison, out: Path) -> None:
    job, score = comparison.job, comparison.score
    seeds = "; bands span the seeds" if comparison.seeds > 1 else ""
    judged = f"{score.name if score.more_is_better else 'loss'} on held-out {job.held_out}".capitalize()
    page.heading("Curves")
    page.figure(figures.losses(comparison, out, job.unit), f"Training loss by {job.unit} seen, smoothed{seeds}.")
    page.figure(figures.losses(comparison, out, "seconds"), "The same by seconds spent in training steps.")
    _add(page, "", {f"{judged} at each evaluation{seeds}.": figures.held_out(comparison, out)})
    _add(page, "Learning rates", {f"{judged} by learning rate; mean over the seeds.": figures.sensitivity(comparison)})
    overlap = "How much of the old basis is left at a renewal: 1 all of it, 0 as of a random one; means over weights."
    captured = "Share of the gradient's energy that the old basis still held at a renewal; more is better."
    renewals = {
        overlap: figures.subspaces(comparison, out, "overlap", "overlap"),
        captured: figures.subspaces(comparison, out, "captured", "captured energy"),
    }
    _add(page, "Subspaces", renewals)


def _add(page: Page, heading: str, drawn: Mapping[str, Any]) -> None:
    """Add the figures that there are by their captions, under a heading if there is any."""
    found = {caption: figure for caption, figure in drawn.items() if figure is not None}
    if found and heading:
        page.heading(heading)
    for caption, figure in found.items():
        page.figure(figure, caption)
