"""What the runs of a comparison came to: the best learning rate of each method, and the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from galore_torch.training.compare.job import Job
from galore_torch.training.compare.plan import PlannedRun
from galore_torch.training.compare.runs import error_file
from galore_torch.training.compare.score import LOSS, Score, shown
from galore_torch.training.run import records
from galore_torch.training.run.folder import RunFolder

_FULL_RANK = ("full", "full-per-layer")


@dataclass(frozen=True)
class Outcome:
    """One run's end: its final record, or why there is none, and the digest of what it was trained on."""

    run: PlannedRun
    final: dict[str, Any] | None
    error: str | None
    digest: str | None = None


def gather(runs: Sequence[PlannedRun], out: Path) -> list[Outcome]:
    """Read how each run ended."""
    found = []
    for run in runs:
        folder = RunFolder(out / run.folder)
        failed = error_file(folder.root)
        error = failed.read_text(encoding="utf-8", errors="replace").strip() if failed.exists() else None
        digest = folder.text_digest() if folder.text.exists() else None
        found.append(Outcome(run, records.final(folder.metrics), error, digest))
    return found


@dataclass(frozen=True)
class Setting:
    """A method at one pair of learning rates, over its seeds.

    Attributes:
        loss: mean held-out loss; infinite if a run's is not finite.
        score: mean of the score; infinite if a run's is not finite.
        spread: its standard deviation over the seeds; None for one seed.
        pace: tokens or examples a second.
    """

    method: str
    lr: float
    others_lr: float
    outcomes: list[Outcome]
    loss: float
    score: float
    spread: float | None
    pace: float
    state_bytes: int
    peak_memory_bytes: int
    trained_parameters: int


@dataclass(frozen=True)
class Comparison:
    """All runs with how they are judged.

    Attributes:
        job: what they are of.
        outcomes: of every planned run.
        score: by what methods are compared; None until a run has ended.
        best: by method, its best setting; methods without a finished run are left out.
    """

    job: Job
    outcomes: list[Outcome]
    score: Score | None
    best: dict[str, Setting]

    @property
    def methods(self) -> list[str]:
        """All that were planned."""
        return list(dict.fromkeys(outcome.run.method for outcome in self.outcomes))

    def settings_of(self, method: str) -> list[Setting]:
        """A method's learning rates with their results; those without a finished run are left out."""
        return _settings_of(self.job, self.score, self.outcomes, method)

    def criterion(self, setting: Setting) -> float:
        """What decides which learning rate is best: the task's score, of which more is better, or the loss."""
        assert self.score is not None
        return setting.score if self.score.more_is_better else setting.loss


def compared(job: Job, outcomes: list[Outcome]) -> Comparison:
    """Judge each method at its best learning rates, of those that most seeds finished.

    Best is the mean over the seeds of a task's score, at equal scores the loss; without such a score, the loss alone.
    """
    finals = [outcome.final for outcome in outcomes if outcome.final is not None]
    score = Score(next(iter(job.scores(finals[0])))) if finals else None
    more = score is not None and score.more_is_better
    best = {}
    for method in dict.fromkeys(outcome.run.method for outcome in outcomes):
        found = _settings_of(job, score, outcomes, method)
        if found:
            best[method] = min(
                found, key=lambda each: (-len(each.outcomes), -_least(each.score) if more else 0.0, each.loss)
            )
    return Comparison(job, outcomes, score, best)


def _least(score: float) -> float:
    return score if math.isfinite(score) else -math.inf


def _settings_of(job: Job, score: Score | None, outcomes: Sequence[Outcome], method: str) -> list[Setting]:
    groups: dict[tuple[float, float], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.run.method == method and outcome.final is not None:
            groups.setdefault((outcome.run.lr, outcome.run.others_lr), []).append(outcome)
    return [] if score is None else [_setting(job, score, method, rates, group) for rates, group in groups.items()]


def _setting(job: Job, score: Score, method: str, rates: tuple[float, float], group: list[Outcome]) -> Setting:
    finals = [outcome.final for outcome in group if outcome.final is not None]
    scores = [_finite(job.scores(final).get(score.name)) for final in finals]
    return Setting(
        method=method,
        lr=rates[0],
        others_lr=rates[1],
        outcomes=group,
        loss=statistics.fmean(_finite(final.get(LOSS)) for final in finals),
        score=statistics.fmean(scores),
        spread=statistics.stdev(scores) if len(scores) > 1 and all(map(math.isfinite, scores)) else None,
        pace=statistics.fmean(final[f"{job.unit}_per_second"] for final in finals),
        state_bytes=max(final["state_bytes"] for final in finals),
        peak_memory_bytes=max(final["peak_memory_bytes"] for final in finals),
        trained_parameters=max(final["trained_parameters"] for final in finals),
    )


def _finite(value: float | None) -> float:
    return math.inf if value is None or not math.isfinite(value) else value


def notes(comparison: Comparison) -> list[str]:
    """What a reader has to know of the figures: best rates at the edge of those tried, seeds missing, other data."""
    said = [note for row in comparison.best.values() if (note := edges(row, comparison.outcomes))]
    for row in comparison.best.values():
        planned = len({outcome.run.seed for outcome in comparison.outcomes})
        if len(row.outcomes) < planned:
            said.append(f"{row.method}: {len(row.outcomes)} of {planned} seeds have ended at {row.lr:g}.")
    if len({outcome.digest for outcome in comparison.outcomes if outcome.final and outcome.digest}) > 1:
        said.append("The data changed between the runs: they have not seen the same. Compare anew in another folder.")
    return said


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


def rows(comparison: Comparison) -> list[list[str]]:
    """The table's cells: method, learning rates, score, beside full rank, pace, state and peak in MB, parameters."""
    score, best = comparison.score, comparison.best
    full = next((best[name] for name in _FULL_RANK if name in best), None)
    cells = []
    for method in comparison.methods:
        row = best.get(method)
        if row is None or score is None:
            failed = any(outcome.error for outcome in comparison.outcomes if outcome.run.method == method)
            cells.append([method, "", "failed" if failed else "unfinished", *[""] * 5])
            continue
        rates = f"{row.lr:g}" if row.others_lr == row.lr else f"{row.lr:g}/{row.others_lr:g}"
        beside = "" if full is None else score.compared(row.score, full.score)
        memory = [_short(count / 1e6) for count in (row.state_bytes, row.peak_memory_bytes)]
        scored = shown(score.name, row.score, row.spread)
        cells.append([method, rates, scored, beside, _short(row.pace), *memory, f"{row.trained_parameters:,}"])
    return cells


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 100 else f"{value:.3g}"


def table(comparison: Comparison) -> Table:
    """The comparison for a terminal of 80 columns, without the count of parameters."""
    score = comparison.score
    drawn = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column("method", overflow="fold")
    beside = "points" if score is not None and score.more_is_better else "/full"
    pace = {"tokens": "tok/s", "examples": "rows/s"}[comparison.job.unit]
    for column in ("lr/others", "score" if score is None else score.name, beside, pace, "state MB", "peak MB"):
        drawn.add_column(column, justify="right", overflow="fold")
    for row in rows(comparison):
        drawn.add_row(*row[:-1])
    return drawn


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything for ``results.json``."""
    return {
        "job": comparison.job.subcommand,
        "score": None if comparison.score is None else comparison.score.name,
        "best": {name: {"lr": row.lr, "others_lr": row.others_lr} for name, row in comparison.best.items()},
        "notes": notes(comparison),
        "runs": [
            {
                "folder": str(outcome.run.folder), "method": outcome.run.method, "lr": outcome.run.lr,
                "others_lr": outcome.run.others_lr, "seed": outcome.run.seed, "final": outcome.final,
                "error": outcome.error,
            }
            for outcome in comparison.outcomes
        ],
    }  # fmt: skip
