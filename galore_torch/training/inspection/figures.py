"""All figures of an inspection: of modules that play the same part in every layer, together, and what they suggest.

``model.layers.3.self_attn.q_proj.weight`` is one of ``q_proj``: what counts layers and experts is left out, and as much
of the name is kept as tells parts apart, such as BERT's three ``dense``. Two shapes of one name are two groups.

Which rank and which gap the figures of a group suggest is a rule of thumb, not a theorem.

Rank: the least multiple of `rank_multiple` at which a basis captures, of the gradient one snapshot later, at least
`capture_share` of the energy. The gradient that a basis was made from is no judge: that holds its own noise.

Gap: the greatest age up to which, at that rank, bases of every age capture at least `keep_share` of what bases of the
least age capture of the same gradients. The gradient's own best directions are no reference: what a basis loses within
its first snapshot is mostly the noise of the batch, which no gap brings back. What it loses later, renewals do.

With a budget of bytes for all, ranks go where they capture most for their bytes (`ranks_within`), up to that share.

The default share of 0.6 is about what the least captured group of a tiny LLaMA had at the rank that lost nothing to
full-rank training; at a rank with 0.5 it lost a little (docs/decisions.md). How much of the energy is noise, and how
the loss fares, is not told by this: a larger batch has less noise and so a lower recommended rank; a lower learning
rate a longer gap.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from galore_torch.projection import Projection
from galore_torch.projection.rank_budget import ranks_within
from galore_torch.projection.spectra import rank_that_holds
from galore_torch.targets.rank_choice import bytes_a_rank
from galore_torch.training.inspection.config import RecommendConfig
from galore_torch.training.inspection.history import SHARES, GradientHistory
from galore_torch.training.inspection.observer import GradientObserver
from galore_torch.training.run.records import Record
from galore_torch.training.settings.optimizer import KINDS
from galore_torch.units import parse_bytes

_POINTS = 128  # of a curve in the JSON, at most
LEAST_PAIRS = 2
"""How many gradients the bases of an age must have been judged by for that age to count."""


def module_names(weights: Iterable[str]) -> dict[str, str]:
    """The part that each weight plays, by its name.

    >>> weights = ["h.0.output.dense.weight", "h.1.attention.query.weight", "h.0.attention.output.dense.weight"]
    >>> list(module_names(weights).values())
    ['output.dense', 'query', 'attention.output.dense']
    """
    paths = {weight: _path(weight) for weight in weights}
    ends = Counter(path[-length:] for path in {*paths.values()} for length in range(1, len(path) + 1))
    return {
        weight: ".".join(next((path[-n:] for n in range(1, len(path)) if ends[path[-n:]] == 1), path))
        for weight, path in paths.items()
    }


def _path(weight: str) -> tuple[str, ...]:
    """The parts of a name behind the layer's number, without further numbers and without ``weight``."""
    parts = weight.removesuffix(".weight").split(".")
    first = next((place for place, part in enumerate(parts) if part.isdecimal()), 0)
    return tuple(part for part in parts[first:] if not part.isdecimal()) or tuple(parts)


def group_by_module(histories: Sequence[GradientHistory]) -> dict[str, list[GradientHistory]]:
    """The weights of each group, by its name, in the order of the model."""
    names = module_names(one.name for one in histories)
    shapes = Counter(name for name, _ in {(names[one.name], one.shape) for one in histories})
    groups: dict[str, list[GradientHistory]] = {}
    for one in histories:
        name = names[one.name]
        shape = "" if shapes[name] == 1 else f" {'x'.join(map(str, one.shape))}"
        groups.setdefault(f"{name}{shape}", []).append(one)
    return groups


class ModuleGroup:
    """The weights of one group and the means of their figures; those at a rank are at `rank`.

    Args:
        histories: of the weights, which have one shape; at least one has a snapshot.
        every: steps between two snapshots.
    """

    def __init__(self, histories: Sequence[GradientHistory], every: int) -> None:
        self.histories = histories
        seen = [one for one in histories if one.snapshots]
        self.weights = len(seen)  # how many of them had a gradient
        self.shape, self.rank = seen[0].shape, seen[0].rank  # of each; the shorter side's length if that is less
        self.stable_rank = fmean(snapshot.stable_rank for one in seen for snapshot in one.snapshots)
        # The share of a gradient's energy in its own strongest 1 to k directions, (k,); the ranks that hold `SHARES`.
        self.held = torch.stack([one.held / len(one.snapshots) for one in seen]).mean(0)
        self.ranks = tuple(rank_that_holds(self.held, share) for share in SHARES)
        # By the age of a basis in steps: the share of a later gradient's energy in its first 1 to k directions, (k,),
        # and that as a share of what one of the least age captures of the same gradients, (k,); its overlap with the
        # later gradient's own; and how many gradients each weight's were judged by, at least.
        self.captured: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}
        self.overlap: dict[int, float] = {}
        self.pairs: dict[int, int] = {}
        for place in range(seen[0].ages):
            aged = [one for one in seen if one.pairs[place]]
            if aged:
                age = (place + 1) * every
                self.captured[age] = torch.stack([one.captured[place] / one.pairs[place] for one in aged]).mean(0)
                young = torch.stack([one.by_youngest[place] / one.pairs[place] for one in aged]).mean(0)
                self.kept[age] = self.captured[age] / young
                self.overlap[age] = fmean(float(one.overlap[place] / one.pairs[place]) for one in aged)
                self.pairs[age] = min(int(one.pairs[place]) for one in aged)


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What is recommended for one group of modules."""

    rank: int | None = None  # None if there are too few snapshots; the shorter side if nothing less captures enough
    gap: int | None = None  # in steps; None if there are too few snapshots
    at_least: bool = False  # no greater age was judged, so that the gap may be longer
    why_not: str = ""  # why something is None


def recommend(group: ModuleGroup, config: RecommendConfig, rank: int | None = None) -> Recommendation:
    """Apply the rule to the figures of a group of modules; with a rank, only that of the gap."""
    ages = [age for age, pairs in sorted(group.pairs.items()) if pairs >= LEAST_PAIRS]
    if not ages or ages[0] != min(group.pairs):
        most = max(group.pairs.values(), default=0)
        return Recommendation(
            why_not=f"bases of an age were judged by {most} later gradient{'' if most == 1 else 's'}, and "
            f"{LEAST_PAIRS} are the least; give more steps"
        )
    first = group.captured[ages[0]]
    side = len(first)
    multiples = range(config.rank_multiple, side, config.rank_multiple)
    rank = rank or next((rank for rank in multiples if first[rank - 1] >= config.capture_share), side)
    if len(ages) == 1:
        return Recommendation(
            rank=rank,
            why_not=f"no basis older than {ages[0]} steps was judged by {LEAST_PAIRS} gradients; give more steps",
        )
    last = next((before for before, age in pairwise(ages) if group.kept[age][rank - 1] < config.keep_share), None)
    return Recommendation(rank=rank, gap=last or ages[-1], at_least=last is None)


def _within_budget(
    modules: Mapping[str, ModuleGroup],
    advice: dict[str, Recommendation],
    sizes: Mapping[str, int],
    config: RecommendConfig,
) -> dict[str, Recommendation]:
    """The advice with ranks that fit the budget, if there are ranks and a budget; sizes are the bytes of a rank."""
    most = [one.rank for one in advice.values() if one.rank is not None]
    if config.state_budget is None or len(most) < len(advice):
        return advice
    counts = [len(group.histories) for group in modules.values()]
    curves = [
        count * group.captured[min(group.captured)] for count, group in zip(counts, modules.values(), strict=True)
    ]
    ranks = ranks_within(
        parse_bytes(config.state_budget), curves, list(sizes.values()), most=most, multiple=config.rank_multiple
    )
    return {name: recommend(modules[name], config, rank) for name, rank in zip(advice, ranks, strict=True)}


def _bytes_a_rank(group: ModuleGroup, observer: GradientObserver) -> int:
    moments = 1 if KINDS[observer.inspected.job.config.optimizer.optim].fixed_size else 2
    projection = Projection.of(group.shape, 1, layout="stack")
    weights = [observer.weights[one.name] for one in group.histories]
    return sum(bytes_a_rank(projection, moments, weight.element_size()) for weight in weights)


def figures(observer: GradientObserver) -> dict[str, Any]:
    """What an inspection came to, as ``inspection.json`` has it: table, plots and page are made of this alone.

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
    sizes = {name: _bytes_a_rank(group, observer) for name, group in modules.items()}
    advice = _within_budget(modules, advice, sizes, config.recommendation)
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
        "recommended": _for_all(advice.values())
        | {"flags": _flags(advice), "state_bytes": sum(sizes[name] * (one.rank or 0) for name, one in advice.items())},
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


def _for_all(advice: Collection[Recommendation]) -> dict[str, Any]:
    """One rank and one gap for all modules, the greatest and the least; None where one of them has none."""
    ranks, gaps = zip(*((one.rank, one.gap) for one in advice), strict=True)
    rank, gap = None if None in ranks else max(ranks), None if None in gaps else min(gaps)
    return {"rank": rank, "gap": gap, "gap_is_at_least": all(one.at_least for one in advice if one.gap == gap)}


def _flags(advice: Mapping[str, Recommendation]) -> str:
    """The advice as flags of ``galore pretrain`` and ``finetune``: each module's rank, and the least gap."""
    ranks: dict[str, int] = {}
    for name, one in advice.items():
        module = name.partition(" ")[0]  # without the shape
        if one.rank is not None:
            ranks[module] = max(one.rank, ranks.get(module, 0))
    gap = _for_all(advice.values())["gap"]
    ranked = f"--rank-pattern {','.join(f'{name}={rank}' for name, rank in ranks.items())}" if ranks else ""
    return ranked + (f" --update-proj-gap {gap}" if gap is not None else "")


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
