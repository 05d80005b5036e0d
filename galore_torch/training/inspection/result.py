"""All figures of an inspection, for people and as ``inspection.json`` has them."""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property
from statistics import fmean
from typing import Any

from galore_torch.training.inspection.history import SHARES, GradientHistory
from galore_torch.training.inspection.modules import ModuleGroup, group_by_module
from galore_torch.training.inspection.observer import GradientObserver
from galore_torch.training.inspection.recommend import Recommendation, recommend
from galore_torch.training.run.records import Record

_POINTS = 128  # of a curve in the JSON, at most


class Inspection:
    """What an inspection came to.

    Args:
        observer: of the job, after its steps; a ValueError says that no gradient was finite and other than zero.
    """

    def __init__(self, observer: GradientObserver) -> None:
        self.inspected, self.config, self.rank = observer.inspected, observer.config, observer.rank
        self.histories, self.losses = observer.histories, observer.losses
        if not self.modules:
            raise ValueError(
                f"lr = {self.inspected.job.config.optimizer.lr:g}: no gradient was finite and other than zero, so that "
                "there are no figures; give a lower one, or other data."
            )

    @cached_property
    def modules(self) -> dict[str, ModuleGroup]:
        """The groups of modules that had gradients, by name."""
        every, groups = self.config.snapshots.every, group_by_module(self.histories).items()
        return {name: ModuleGroup(own, every) for name, own in groups if any(one.snapshots for one in own)}

    @cached_property
    def recommended(self) -> dict[str, Recommendation]:
        """What is recommended for each group of modules."""
        return {name: recommend(group, self.config.recommendation) for name, group in self.modules.items()}

    @property
    def recommended_for_all(self) -> Recommendation:
        """One rank and one gap for all groups, the greatest and the least; None where one of them has none."""
        each = self.recommended.values()
        rank = None if any(one.rank is None for one in each) else max(one.rank or 0 for one in each)
        gap = None if any(one.gap is None for one in each) else min(one.gap or 0 for one in each)
        return Recommendation(rank=rank, gap=gap, at_least=all(one.at_least for one in each if one.gap == gap))

    @cached_property
    def recorded(self) -> dict[str, list[Record]]:
        """What the run recorded of the n-th renewals of each group of modules: step, overlap, captured; the means."""
        homes = {one.name: name for name, group in self.modules.items() for one in group.histories}
        renewals: dict[tuple[int, str], list[Record]] = {}
        for record in self.inspected.renewals:
            home = homes.get(record["weight"])
            if home is not None and record["overlap"] is not None and record["captured"] is not None:
                renewals.setdefault((record["renewals"], home), []).append(record)
        means: dict[str, list[Record]] = {}
        for (_, home), own in sorted(renewals.items(), key=lambda item: item[0][0]):
            mean = {figure: fmean(record[figure] for record in own) for figure in ("step", "overlap", "captured")}
            means.setdefault(home, []).append(mean)
        return means

    @property
    def notes(self) -> list[str]:
        """What the reader must know, a sentence each."""
        notes = list(self.inspected.remarks)
        skipped = [one for group in self.modules.values() for one in group.histories if one.skipped]
        if skipped:
            notes.append(
                f"{sum(len(one.skipped) for one in skipped):,} gradients of {len(skipped)} weights were missing, zero "
                f"or not finite and were skipped, the first of {skipped[0].name}."
            )
        reasons: dict[str, list[str]] = {}
        for name, one in self.recommended.items():
            if one.why_not:
                reasons.setdefault(one.why_not, []).append(name)
        for reason, names in reasons.items():
            whose = "any module" if len(names) == len(self.modules) else ", ".join(names)
            notes.append(f"Not everything is recommended for {whose}: {reason}.")
        return notes

    def as_json(self) -> dict[str, Any]:
        """All of it, in numbers, texts, lists and dicts."""
        for_all = self.recommended_for_all
        figures = {
            "subject": self.inspected.title,
            "facts": self.inspected.facts,
            "settings": dataclasses.asdict(self.config),
            "rank": self.rank,
            "ages": self.config.snapshots.ages,
            "notes": self.notes,
            "recommended": {"rank": for_all.rank, "gap": for_all.gap, "gap_is_at_least": for_all.at_least},
            "losses": self.losses,
            "modules": {name: self._module(name) for name in self.modules},
            "weights": {one.name: self._weight(one) for group in self.modules.values() for one in group.histories},
        }
        # Six digits behind the point: more is rounding.
        made: dict[str, Any] = json.loads(json.dumps(figures), parse_float=lambda text: round(float(text), 6))
        return made

    def _module(self, name: str) -> dict[str, Any]:
        group, recommended = self.modules[name], self.recommended[name]
        side = len(group.held)
        ranks = sorted({*range(1, side + 1, -(-side // _POINTS)), side, group.rank, recommended.rank or side})
        shown = [rank - 1 for rank in ranks]
        captured = {age: curve[shown].tolist() for age, curve in group.captured.items()}
        return {
            **_at_rank(group),
            "weights": group.weights,
            "recommended": dataclasses.asdict(recommended),
            "by_rank": {"rank": ranks, "own": group.held[shown].tolist(), "captured": captured},
            "run": self.recorded.get(name, []),
        }

    def _weight(self, history: GradientHistory) -> dict[str, Any]:
        alone = _at_rank(ModuleGroup([history], self.config.snapshots.every)) if history.snapshots else {}
        snapshots = [dataclasses.asdict(snapshot) for snapshot in history.snapshots]
        return {"shape": history.shape, **alone, "snapshots": snapshots, "skipped": history.skipped}


def _at_rank(group: ModuleGroup) -> dict[str, Any]:
    """The figures at the rank that they are about."""
    captured, kept = (
        {age: float(curve[group.rank - 1]) for age, curve in curves.items()} for curves in (group.captured, group.kept)
    )
    return {
        "shape": group.shape,
        "rank": group.rank,
        "stable_rank": group.stable_rank,
        "rank_that_holds": dict(zip(SHARES, group.ranks, strict=True)),
        "own": float(group.held[group.rank - 1]),
        "captured": captured,
        "kept": kept,
        "overlap": group.overlap,
        "pairs": group.pairs,
    }
