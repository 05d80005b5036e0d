"""What the runs of a comparison came to: the best learning rate of each method, and the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from galore_torch.training import records
from galore_torch.training.compare_plan import Job, PlannedRun
from galore_torch.training.compare_runs import error_file
from galore_torch.training.run_folder import RunFolder

_FULL_RANK = ("full", "full-per-layer")


@dataclass(frozen=True)
class Outcome:
    """One run's end: its final record, or why there is none."""

    run: PlannedRun
    final: dict[str, Any] | None
    error: str | None


def gather(runs: Sequence[PlannedRun], out: Path) -> list[Outcome]:
    """Read how each run ended."""
    found = []
    for run in runs:
        failed = error_file(out / run.folder)
        error = failed.read_text(encoding="utf-8").strip() if failed.exists() else None
        found.append(Outcome(run, records.final(RunFolder(out / run.folder).metrics), error))
    return found


@dataclass(frozen=True)
class Setting:
    """A method at one pair of learning rates, over its seeds.

    Attributes:
        loss: mean held-out loss, nats per token; infinite if a run's is not finite.
        score: mean of the score.
        spread: its standard deviation over the seeds; None for one seed.
    """

    method: str
    lr: float
    others_lr: float
    outcomes: list[Outcome]
    loss: float
    score: float
    spread: float | None
    tokens_per_second: float
    state_bytes: int
    peak_memory_bytes: int


def settings_of(job: Job, outcomes: Sequence[Outcome], method: str) -> list[Setting]:
    """A method's learning rates with their results; those without a finished run are left out."""
    groups: dict[tuple[float, float], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.run.method == method and outcome.final is not None:
            groups.setdefault((outcome.run.lr, outcome.run.others_lr), []).append(outcome)
    return [_setting(job, method, rates, group) for rates, group in groups.items()]


def _setting(job: Job, method: str, rates: tuple[float, float], group: list[Outcome]) -> Setting:
    finals = [outcome.final for outcome in group if outcome.final is not None]
    scores = [_finite(final.get(job.score)) for final in finals]
    return Setting(
        method=method,
        lr=rates[0],
        others_lr=rates[1],
        outcomes=group,
        loss=statistics.fmean(_finite(final.get(job.loss)) for final in finals),
        score=statistics.fmean(scores),
        spread=statistics.stdev(scores) if len(scores) > 1 and all(map(math.isfinite, scores)) else None,
        tokens_per_second=statistics.fmean(final["tokens_per_second"] for final in finals),
        state_bytes=max(final["state_bytes"] for final in finals),
        peak_memory_bytes=max(final["peak_memory_bytes"] for final in finals),
    )


def _finite(value: float | None) -> float:
    return math.inf if value is None else value


def best_settings(job: Job, outcomes: Sequence[Outcome]) -> dict[str, Setting]:
    """Each method at the learning rates of least mean held-out loss, of those that most seeds finished."""
    best = {}
    for method in dict.fromkeys(outcome.run.method for outcome in outcomes):
        found = settings_of(job, outcomes, method)
        if found:
            best[method] = min(found, key=lambda each: (-len(each.outcomes), each.loss))
    return best


def edges(best: Setting, outcomes: Sequence[Outcome]) -> str | None:
    """A sentence if the best learning rate is the least or the greatest of several that were tried."""
    said = []
    runs = [outcome.run for outcome in outcomes if outcome.run.method == best.method]
    apart = any(run.others_lr != run.lr for run in runs)
    for name, own, tried in (
        ("learning rate", best.lr, sorted({run.lr for run in runs})),
        ("learning rate of the others", best.others_lr, sorted({run.others_lr for run in runs if apart})),
    ):
        if len(tried) > 1 and own in (tried[0], tried[-1]):
            which = "least" if own == tried[0] else "greatest"
            said.append(f"{best.method}: its best {name}, {own:g}, is the {which} tried; a better one may lie beyond.")
    return " ".join(said) or None


def rows(best: dict[str, Setting], outcomes: Sequence[Outcome]) -> list[list[str]]:
    """The table's cells: method, learning rates, score, ratio to full rank, tokens/s, state and peak in MB."""
    full = next((best[name] for name in _FULL_RANK if name in best), None)
    cells = []
    for method in dict.fromkeys(outcome.run.method for outcome in outcomes):
        row = best.get(method)
        if row is None:
            failed = any(outcome.error for outcome in outcomes if outcome.run.method == method)
            cells.append([method, "", "failed" if failed else "unfinished", "", "", "", ""])
            continue
        rates = f"{row.lr:g}" if row.others_lr == row.lr else f"{row.lr:g}/{row.others_lr:g}"
        spread = "" if row.spread is None else f" ±{row.spread:,.2f}"
        ratio = "" if full is None else f"{row.score / full.score:.3f}"
        memory = [f"{count / 1e6:,.1f}" for count in (row.state_bytes, row.peak_memory_bytes)]
        score = f"{row.score:,.2f}{spread}" if math.isfinite(row.score) else "not finite"
        cells.append([method, rates, score, ratio, f"{row.tokens_per_second:,.0f}", *memory])
    return cells


def table(job: Job, best: dict[str, Setting], outcomes: Sequence[Outcome]) -> Table:
    """The comparison for a terminal of 80 columns."""
    drawn = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column("method", overflow="fold")
    for column in ("lr/others", job.score, "/full", "tok/s", "state MB", "peak MB"):
        drawn.add_column(column, justify="right", overflow="fold")
    for row in rows(best, outcomes):
        drawn.add_row(*row)
    return drawn


def as_json(job: Job, best: dict[str, Setting], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything for ``results.json``."""
    return {
        "job": job.subcommand,
        "score": job.score,
        "best": {name: {"lr": row.lr, "others_lr": row.others_lr} for name, row in best.items()},
        "notes": [note for row in best.values() if (note := edges(row, outcomes))],
        "runs": [
            {
                "folder": str(outcome.run.folder), "method": outcome.run.method, "lr": outcome.run.lr,
                "others_lr": outcome.run.others_lr, "seed": outcome.run.seed, "final": outcome.final,
                "error": outcome.error,
            }
            for outcome in outcomes
        ],
    }  # fmt: skip
