"""All figures of an inspection, as ``inspection.json`` has them: table, plots and page are made of these alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from galore_torch.training.inspection.history import SHARES, GradientHistory
from galore_torch.training.inspection.modules import ModuleGroup, Recommendation, group_by_module, recommend
from galore_torch.training.inspection.observer import GradientObserver
from galore_torch.training.run.records import Record

_POINTS = 128  # of a curve, at most


def figures(observer: GradientObserver) -> dict[str, Any]:
    """What an inspection came to, in numbers, texts, lists and dicts.

    Args:
        observer: of the job, after its steps; a ValueError says that no gradient was finite and other than zero.
    """
    inspected, config = observer.inspected, observer.config
    every, groups = config.snapshots.every, group_by_module(observer.histories).items()
    modules = {name: ModuleGroup(own, every) for name, own in groups if any(one.snapshots for one in own)}
    if not modules:
        raise ValueError(
            f"lr = {inspected.job.config.optimizer.lr:g}: no gradient was finite and other than zero, so that "
            "there are no figures; give a lower one, or other data."
        )
    advice = {name: recommend(group, config.recommendation) for name, group in modules.items()}
    home = {one.name: name for name, group in modules.items() for one in group.histories}
    histories = [one for one in observer.histories if one.name in home]
    recorded = _recorded(inspected.renewals, home)
    found = {
        "subject": inspected.title,
        "facts": inspected.facts,
        "settings": dataclasses.asdict(config),
        "rank": observer.rank,
        "ages": config.snapshots.ages,
        "notes": [*inspected.remarks, *_notes(histories, advice)],
        "recommended": _for_all(advice.values()),
        "losses": observer.losses,
        "modules": {
            name: _module(group, advice[name]) | {"run": recorded.get(name, [])} for name, group in modules.items()
        },
        "weights": {
            one.name: {"module": home[one.name], "shape": one.shape, "skipped": one.skipped}
            | (_at_rank(ModuleGroup([one], every)) if one.snapshots else {})
            | {"snapshots": [dataclasses.asdict(snapshot) for snapshot in one.snapshots]}
            for one in histories
        },
    }
    # Six digits behind the point: more is rounding.
    made: dict[str, Any] = json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 6))
    return made


def _for_all(advice: Iterable[Recommendation]) -> dict[str, Any]:
    """One rank and one gap for all modules, the greatest and the least; None where one of them has none."""
    ranks, gaps = zip(*((one.rank, one.gap) for one in advice), strict=True)
    rank, gap = None if None in ranks else max(ranks), None if None in gaps else min(gaps)
    return {"rank": rank, "gap": gap, "gap_is_at_least": all(one.at_least for one in advice if one.gap == gap)}


def _recorded(renewals: Iterable[Record], home: Mapping[str, str]) -> dict[str, list[Record]]:
    """What the run recorded of the n-th renewals of each group of modules: step, overlap, captured; the means."""
    nth: dict[tuple[str, int], list[Record]] = {}
    for record in renewals:
        if record["weight"] in home and record["overlap"] is not None and record["captured"] is not None:
            nth.setdefault((home[record["weight"]], record["renewals"]), []).append(record)
    means: dict[str, list[Record]] = {}
    for name, number in sorted(nth):
        own = nth[name, number]
        mean = {figure: fmean(record[figure] for record in own) for figure in ("step", "overlap", "captured")}
        means.setdefault(name, []).append(mean)
    return means


def _notes(histories: Iterable[GradientHistory], advice: Mapping[str, Recommendation]) -> list[str]:
    """What the reader must know of the figures, a sentence each."""
    notes = []
    skipped = [one for one in histories if one.skipped]
    if skipped:
        notes.append(
            f"{sum(len(one.skipped) for one in skipped):,} gradients of {len(skipped)} weights were missing, zero "
            f"or not finite and were skipped, the first of {skipped[0].name}."
        )
    for reason in dict.fromkeys(one.why_not for one in advice.values() if one.why_not):
        names = [name for name, one in advice.items() if one.why_not == reason]
        whose = "any module" if len(names) == len(advice) else ", ".join(names)
        notes.append(f"Not everything is recommended for {whose}: {reason}.")
    return notes


def _module(group: ModuleGroup, recommended: Recommendation) -> dict[str, Any]:
    side = len(group.held)
    ranks = sorted({*range(1, side + 1, -(-side // _POINTS)), side, group.rank, recommended.rank or side})
    shown = [rank - 1 for rank in ranks]
    captured = {age: curve[shown].tolist() for age, curve in group.captured.items()}
    return {
        **_at_rank(group),
        "weights": group.weights,
        "recommended": dataclasses.asdict(recommended),
        "by_rank": {"rank": ranks, "own": group.held[shown].tolist(), "captured": captured},
    }


def _at_rank(group: ModuleGroup) -> dict[str, Any]:
    """The figures at the rank that they are about."""
    at = group.rank - 1
    return {
        "shape": group.shape,
        "rank": group.rank,
        "stable_rank": group.stable_rank,
        "rank_that_holds": dict(zip(SHARES, group.ranks, strict=True)),
        "own": float(group.held[at]),
        "captured": {age: float(curve[at]) for age, curve in group.captured.items()},
        "kept": {age: float(curve[at]) for age, curve in group.kept.items()},
        "overlap": group.overlap,
        "pairs": group.pairs,
    }
