"""All figures of an inspection, for people and as ``inspection.json`` has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from galore_torch.training.inspection.config import InspectConfig
from galore_torch.training.inspection.kinds import Kind, gathered, kind_names, summarized
from galore_torch.training.inspection.recommend import Advice, advise
from galore_torch.training.inspection.subject import Subject
from galore_torch.training.inspection.watch import SHARES, Watch

_POINTS = 128  # of a curve in the JSON, at most


@dataclass(frozen=True, kw_only=True)
class Renewals:
    """What a run recorded of the n-th renewals of the weights of one kind, on average.

    Attributes:
        step: of the run.
        overlap: of the new subspace with the old, corrected for chance.
        captured: share of the gradient's energy that the old basis still held.
    """

    step: float
    overlap: float
    captured: float


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What an inspection came to.

    Attributes:
        subject: what was looked at.
        config: by which settings.
        kinds: figures by kind, in the order of the model.
        advice: by kind.
        watches: of the weights, by kind.
        renewals: what the run recorded, by kind; empty if it did not.
        losses: of the steps.
        rank: at which figures are told.
    """

    subject: Subject
    config: InspectConfig
    kinds: dict[str, Kind]
    advice: dict[str, Advice]
    watches: dict[str, list[Watch]]
    renewals: dict[str, list[Renewals]]
    losses: list[float]
    rank: int

    @property
    def notes(self) -> list[str]:
        """What the reader must know, a sentence each."""
        left_out = {watch.name: len(watch.left_out) for own in self.watches.values() for watch in own if watch.left_out}
        notes = list(self.subject.notes)
        if left_out:
            notes.append(
                f"{sum(left_out.values()):,} gradients of {len(left_out)} weights were missing, zero or not finite and "
                f"were left out, the first of {next(iter(left_out))}."
            )
        lacking: dict[str, list[str]] = {}
        for name, advice in self.advice.items():
            if advice.why_not:
                lacking.setdefault(advice.why_not, []).append(name)
        for reason, names in lacking.items():
            whose = "any kind" if len(names) == len(self.advice) else ", ".join(names)
            notes.append(f"Not everything is recommended for {whose}: {reason}.")
        return notes

    @property
    def one_for_all(self) -> tuple[int | None, int | None, bool]:
        """One rank and one gap that suit every kind: the greatest and the least; and whether the gap is a bound."""
        ranks = [advice.rank for advice in self.advice.values()]
        gaps = [advice.gap for advice in self.advice.values()]
        known = [gap for gap in gaps if gap is not None]
        gap = min(known) if known and len(known) == len(gaps) else None
        return (
            max(rank for rank in ranks if rank is not None) if ranks and None not in ranks else None,
            gap,
            all(advice.at_least for advice in self.advice.values() if advice.gap == gap),
        )

    def as_json(self) -> dict[str, Any]:
        """All of it, in numbers, texts, lists and dicts."""
        rank, gap, at_least = self.one_for_all
        made: dict[str, Any] = _rounded(
            {
                "subject": self.subject.title,
                "facts": {name: str(value) for name, value in self.subject.facts.items()},
                "settings": dataclasses.asdict(self.config),
                "rank": self.rank,
                "ages": list(self.config.looks.ages),
                "notes": self.notes,
                "recommended": {"rank": rank, "gap": gap, "gap_is_at_least": at_least},
                "losses": self.losses,
                "kinds": {name: self._kind(name, kind) for name, kind in self.kinds.items()},
                "weights": {
                    watch.name: _weight(watch, self.config.looks.every)
                    for own in self.watches.values()
                    for watch in own
                },
            }
        )
        return made

    def _kind(self, name: str, kind: Kind) -> dict[str, Any]:
        side = len(kind.held)
        ranks = [*range(1, side + 1, -(-side // _POINTS)), side]
        ranks = sorted({*ranks, kind.rank, *([self.advice[name].rank] if self.advice[name].rank else [])})
        return {
            "shape": list(kind.shape),
            "weights": kind.weights,
            "stable_rank": kind.stable_rank,
            "rank_that_holds": dict(zip(map(str, SHARES), kind.ranks, strict=True)),
            "own": float(kind.held[kind.rank - 1]),
            "captured": {str(age): float(curve[kind.rank - 1]) for age, curve in kind.captured.items()},
            "kept": {str(age): float(curve[kind.rank - 1]) for age, curve in kind.kept.items()},
            "overlap": {str(age): value for age, value in kind.overlap.items()},
            "pairs": {str(age): pairs for age, pairs in kind.pairs.items()},
            "recommended": dataclasses.asdict(self.advice[name]),
            "by_rank": {
                "rank": ranks,
                "own": [float(kind.held[rank - 1]) for rank in ranks],
                "captured": {
                    str(age): [float(curve[rank - 1]) for rank in ranks] for age, curve in kind.captured.items()
                },
            },
            "run": [dataclasses.asdict(one) for one in self.renewals.get(name, [])],
        }


def _weight(watch: Watch, every: int) -> dict[str, Any]:
    aged = {str((place + 1) * every): one for place, one in enumerate(watch.by_age) if one.pairs}
    return {
        "shape": list(watch.shape),
        "rank": watch.rank,
        "looks": [dataclasses.asdict(look) for look in watch.looks],
        "left_out": watch.left_out,
        "captured": {age: float(one.captured[watch.rank - 1]) / one.pairs for age, one in aged.items()},
        "overlap": {age: one.overlap / one.pairs for age, one in aged.items()},
    }


def _rounded(value: Any) -> Any:
    """Numbers to six digits behind the point: more is rounding."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def concluded(
    subject: Subject, config: InspectConfig, watches: Sequence[Watch], losses: list[float], rank: int
) -> Inspection:
    """Bring the figures of all weights together.

    Args:
        subject: what was looked at.
        config: by which settings.
        watches: of all weights.
        losses: of the steps.
        rank: at which figures are told.

    Raises:
        ValueError: when no gradient could be looked at.
    """
    by_kind = gathered(watches)
    found = {name: summarized(name, own, config.looks.every) for name, own in by_kind.items()}
    kinds = {name: kind for name, kind in found.items() if kind is not None}
    if not kinds:
        raise ValueError(
            f"lr = {subject.optimizer.lr:g}: no gradient was finite and other than zero, so there is nothing to "
            "tell; give a lower one, or other data."
        )
    return Inspection(
        subject=subject,
        config=config,
        kinds=kinds,
        advice={name: advise(kind, config.recommendation) for name, kind in kinds.items()},
        watches={name: by_kind[name] for name in kinds},
        renewals=_recorded(subject, by_kind),
        losses=losses,
        rank=rank,
    )


def _recorded(subject: Subject, by_kind: dict[str, list[Watch]]) -> dict[str, list[Renewals]]:
    homes = {watch.name: name for name, own in by_kind.items() for watch in own}
    names = kind_names({record["weight"] for record in subject.renewals})
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in subject.renewals:
        if record["overlap"] is not None and record["captured"] is not None:
            home = homes.get(record["weight"], names[record["weight"]])
            found.setdefault((home, record["renewals"]), []).append(record)
    told: dict[str, list[Renewals]] = {}
    for (home, _), own in sorted(found.items(), key=lambda item: item[0][1]):
        figures = {name: fmean(record[name] for record in own) for name in ("step", "overlap", "captured")}
        told.setdefault(home, []).append(Renewals(**figures))
    return told
