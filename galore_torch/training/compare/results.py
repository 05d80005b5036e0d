"""What the runs of a comparison came to: each method's score at its best learning rate, and the table."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from galore_torch.training.compare.plan import PlannedRun
from galore_torch.training.run import records
from galore_torch.training.run.command import table_of
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.job_command import JobCommand

_FULL_RANK = ("full", "full-per-layer")


@dataclass(frozen=True)
class Score:
    """What methods are compared by: perplexity, of which less is better, or a task's score, of which more is."""

    name: str
    more_is_better: bool
    field: str  # of a record, which decides which learning rate is best
    loss: str  # for an axis, as the next
    decisive: str  # what decides which learning rate is best
    beside_full: str  # how a method is put beside full rank, for a column

    @classmethod
    def of(cls, name: str) -> Score:
        """The score of a name."""
        if name == "perplexity":
            return cls(name, False, "eval_loss", "loss (nats per token)", "loss (nats per token)", "ratio to full")
        return cls(name, True, name, "loss", name, "points to full")

    def beside(self, own: float, full: float) -> str:
        """A method's score beside that of full rank.

        >>> Score.of("perplexity").beside(15.0, 10.0), Score.of("accuracy").beside(0.875, 0.9)
        ('1.500', '-2.5')
        """
        if not math.isfinite(own + full):
            return ""
        return f"{100 * (own - full):+.1f}" if self.more_is_better else f"{own / full:.3f}"


def shown(name: str, value: float | None, spread: float | None = None) -> str:
    """A score for people, with its spread over seeds if there is one.

    >>> shown("perplexity", 1234.567, 1.5), shown("accuracy", 0.91)
    ('1,234.57 ±1.50', '0.9100')
    """
    digits, value = ",.2f" if name == "perplexity" else ".4f", _finite(value)
    if not math.isfinite(value):
        return "not finite"
    return f"{value:{digits}}" + ("" if spread is None else f" ±{spread:{digits}}")


def _finite(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


@dataclass(frozen=True)
class RunEnd:
    """How a run ended: its final record, or why there is none, and the digest of what it was trained on."""

    run: PlannedRun
    final: records.Record | None
    error: str | None
    digest: str | None = None


def final_record(run: PlannedRun, out: Path) -> records.Record | None:
    """The record of a finished run."""
    return records.final(RunFolder(out / run.folder).metrics)


def beside(folder: Path, suffix: str) -> Path:
    """A file beside a run's folder: what its process wrote (``.log``), or why it failed (``.error``)."""
    return folder.with_name(f"{folder.name}{suffix}")


def read_end(run: PlannedRun, out: Path) -> RunEnd:
    """Read how a run ended."""
    folder = RunFolder(out / run.folder)
    failed = beside(folder.root, ".error")
    error = failed.read_text(encoding="utf-8", errors="replace").strip() if failed.exists() else None
    return RunEnd(run, final_record(run, out), error, folder.digest_of() if folder.text.exists() else None)


@dataclass(frozen=True)
class Summary:
    """A method at one pair of learning rates, over its seeds."""

    run: PlannedRun  # one of them: method and learning rates are those of all
    ends: list[RunEnd]  # of its finished runs
    loss: float  # mean held-out loss; infinite if a run's is not finite
    score: float  # mean of the score; infinite if a run's is not finite
    spread: float | None  # its standard deviation over the seeds; None for one seed

    def values(self, field: str) -> list[Any]:
        """A field of the final records, by seed."""
        return [end.final[field] for end in self.ends if end.final is not None]


@dataclass(frozen=True)
class Comparison:
    """All runs with how they are judged."""

    job: JobCommand  # what they are of
    ends: list[RunEnd]  # of every planned run
    score: Score  # by what methods are compared; nameless until a run has ended
    tried: dict[str, list[Summary]]  # by method, what came of its learning rates, of which a run is finished
    best: dict[str, Summary]  # by method, the best of them

    @property
    def methods(self) -> list[str]:
        """All that were planned."""
        return list(dict.fromkeys(end.run.method for end in self.ends))

    @property
    def seeds(self) -> int:
        """How many were planned."""
        return len({end.run.seed for end in self.ends})

    def decisive(self, summary: Summary) -> float:
        """What decides which learning rate is best: the task's score, of which more is better, or the loss."""
        return summary.score if self.score.more_is_better else summary.loss


def compare(job: JobCommand, ends: list[RunEnd]) -> Comparison:
    """Judge each method at its best learning rates, of those that most seeds finished.

    Best is the mean over the seeds of a task's score, at equal scores the loss; without such a score, the loss alone.
    """
    groups: dict[str, dict[tuple[float, float], list[RunEnd]]] = {}
    score = Score.of("")
    for end in ends:
        if end.final is not None:
            score = Score.of(next(iter(job.scores(end.final))))
            groups.setdefault(end.run.method, {}).setdefault((end.run.lr, end.run.others_lr), []).append(end)

    def summarize(ends: list[RunEnd]) -> Summary:
        finals = [end.final for end in ends if end.final is not None]
        scores = [_finite(job.scores(final).get(score.name)) for final in finals]
        spread = statistics.stdev(scores) if len(scores) > 1 and math.isfinite(sum(scores)) else None
        loss = statistics.fmean(_finite(final.get("eval_loss")) for final in finals)
        return Summary(ends[0].run, ends, loss, statistics.fmean(scores), spread)

    def order(summary: Summary) -> tuple[float, float, float]:
        least = -summary.score if math.isfinite(summary.score) else math.inf
        return -len(summary.ends), least if score.more_is_better else 0.0, summary.loss

    tried = {method: [summarize(group) for group in by_lr.values()] for method, by_lr in groups.items()}
    return Comparison(job, ends, score, tried, {method: min(each, key=order) for method, each in tried.items()})


def notes(comparison: Comparison) -> list[str]:
    """What a reader has to know of the figures: best rates at the edge of those tried, seeds missing, other data."""
    found = []
    for method, best in comparison.best.items():
        runs = [end.run for end in comparison.ends if end.run.method == method]
        tried = {"learning rate": (best.run.lr, {run.lr for run in runs})}
        if any(run.others_lr != run.lr for run in runs):
            tried["learning rate of the others"] = best.run.others_lr, {run.others_lr for run in runs}
        for name, (lr, all_lrs) in tried.items():
            if len(all_lrs) > 1 and lr in (min(all_lrs), max(all_lrs)):
                which = "least" if lr == min(all_lrs) else "greatest"
                found.append(f"{method}: its best {name}, {lr:g}, is the {which} tried; a better one may lie beyond.")
        if len(best.ends) < comparison.seeds:
            found.append(f"{method}: {len(best.ends)} of {comparison.seeds} seeds have ended at {best.run.lr:g}.")
    texts = {end.digest for end in comparison.ends if end.final and end.digest}
    streams = {(end.run.seed, end.final.get("stream")) for end in comparison.ends if end.final}  # in a seed's order
    if len(texts) > 1 or len(streams) > len({seed for seed, _ in streams}):
        found.append("The data changed between the runs: they have not seen the same. Compare anew in another folder.")
    return found


def rows(comparison: Comparison) -> list[list[str]]:
    """The table's cells: method, learning rates, score, beside full rank, pace, state and peak in MB, parameters."""
    score, best = comparison.score, comparison.best
    full = next((best[name].score for name in _FULL_RANK if name in best), math.nan)
    cells = []
    for method in comparison.methods:
        if method not in best:
            failed = any(end.error for end in comparison.ends if end.run.method == method)
            cells.append([method, "", "failed" if failed else "unfinished", *[""] * 5])
            continue
        row = best[method]
        rates = "/".join(dict.fromkeys((f"{row.run.lr:g}", f"{row.run.others_lr:g}")))
        pace = statistics.fmean(row.values(f"{comparison.job.unit}_per_second"))
        megabytes = [max(row.values(field)) / 1e6 for field in ("state_bytes", "peak_memory_bytes")]
        scored = [shown(score.name, row.score, row.spread), score.beside(row.score, full)]
        trained = f"{max(row.values('trained_parameters')):,}"
        cells.append([method, rates, *scored, *map(short, (pace, *megabytes)), trained])
    return cells


def short(value: float) -> str:
    """A pace or an amount for a table."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 100 else f"{value:.3g}"


def table(comparison: Comparison) -> Table:
    """The comparison for a terminal of 80 columns, without the count of parameters."""
    beside = "points" if comparison.score.more_is_better else "/full"
    pace = {"tokens": "tok/s", "examples": "rows/s"}[comparison.job.unit]
    columns = ("method", "lr/others", comparison.score.name or "score", beside, pace, "state MB", "peak MB")
    return table_of(columns, [row[:-1] for row in rows(comparison)])


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything for ``results.json``."""
    return {
        "job": comparison.job.name,
        "score": comparison.score.name or None,
        "best": {name: {"lr": best.run.lr, "others_lr": best.run.others_lr} for name, best in comparison.best.items()},
        "notes": notes(comparison),
        "runs": [
            {"folder": str(end.run.folder)}
            | {name: getattr(end.run, name) for name in ("method", "lr", "others_lr", "seed")}
            | {"final": end.final, "error": end.error}
            for end in comparison.ends
        ],
    }
