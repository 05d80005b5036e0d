"""``report.html``: table, curves, learning rates and circumstances of a comparison on one page."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galore_torch.training.compare import figures
from galore_torch.training.compare.plan import OF_RUNS
from galore_torch.training.compare.results import Comparison, notes, rows
from galore_torch.training.page.page import Page
from galore_torch.training.run.machine import versions
from galore_torch.training.settings.methods import has_effect


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


def in_lines(command: str) -> str:
    """A command with a line for each option, which a phone shows whole; to a shell it is the same."""
    return " ".join(("\\\n  " if word.startswith("-") else "") + shlex.quote(word) for word in shlex.split(command))


def apart_and_shared(configs: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The settings that differ, or have an effect on some methods alone, by method; and all others that are set.

    Learning rates and seeds are in neither: runs of one method differ in them.
    """
    effective = {method: _effective(config) for method, config in configs.items()}
    apart: dict[str, dict[str, Any]] = {}
    shared: dict[str, Any] = {}
    for name in dict.fromkeys(itertools.chain(*effective.values())):
        values = {method: settings[name] for method, settings in effective.items() if name in settings}
        first = next(iter(values.values()))
        if len(values) < len(configs) or any(value != first for value in values.values()):
            apart[name] = values
        elif first is not None:
            shared[name] = first
    return {name: values for name, values in apart.items() if set(values.values()) != {None}}, shared


def _effective(config: Any) -> dict[str, Any]:
    """All settings that have an effect, but for those of `OF_RUNS`; an adapter has the rank as its own."""
    adapter = config.adapter.adapter
    hidden = {*OF_RUNS, *(["rank"] if adapter != "none" else [])}
    settings = dict(itertools.chain(*(section.items() for section in dataclasses.asdict(config).values())))
    return {
        name: value
        for name, value in settings.items()
        if name not in hidden and has_effect(name, config.optimizer, config.adapter)
    }


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
    unfinished = (f"{end.run.label}: {end.error or 'not finished'}" for end in comparison.ends if end.final is None)
    for text in (*notes(comparison), *unfinished):
        page.text(text)


def _figures(page: Page, comparison: Comparison, out: Path) -> None:
    job, score = comparison.job, comparison.score
    seeds = "; bands span the seeds" if comparison.seeds > 1 else ""
    judged = f"{score.name if score.more_is_better else 'loss'} on held-out {job.held_out}".capitalize()
    sections = {
        "Curves": {
            f"Training loss by {job.unit} seen, smoothed{seeds}.": figures.losses(comparison, out, job.unit),
            "The same by seconds spent in training steps.": figures.losses(comparison, out, "seconds"),
            f"{judged} at each evaluation{seeds}.": figures.held_out(comparison, out),
        },
        "Learning rates": {f"{judged} by learning rate; mean over the seeds.": figures.sensitivity(comparison)},
        "Subspaces": {
            "Overlap with the basis before: 1 the same subspace, 0 as random ones; means over weights.": (
                figures.subspaces(comparison, out, "overlap")
            ),
            "Share of the gradient's energy that the old basis still held at a renewal; more is better.": (
                figures.subspaces(comparison, out, "captured")
            ),
        },
    }
    for heading, drawn in sections.items():
        found = {caption: figure for caption, figure in drawn.items() if figure is not None}
        if found:
            page.heading(heading)
        for caption, figure in found.items():
            page.figure(figure, caption)
