"""Modules that play the same part in every layer, the figures of their weights together, and what these suggest.

``model.layers.3.self_attn.q_proj.weight`` is one of ``q_proj``: what counts layers and experts is left out, and as much
of the name is kept as tells parts apart, such as BERT's three ``dense``. Two shapes of one name are two groups.

Which rank and which gap the figures of a group suggest is a rule of thumb, not a theorem.

Rank: the least multiple of `rank_multiple` at which a basis captures, of the gradient one snapshot later, at least
`capture_share` of the energy. The gradient that a basis was made from is no judge: that holds its own noise.

Gap: the greatest age up to which, at that rank, bases of every age capture at least `keep_share` of what bases of the
least age capture of the same gradients. The gradient's own best directions are no reference: what a basis loses within
its first snapshot is mostly the noise of the batch, which no gap brings back. What it loses later, renewals do.

The default share of 0.6 is about what the least captured group of a tiny LLaMA had at the rank that lost nothing to
full-rank training; at a rank with 0.5 it lost a little (docs/decisions.md). How much of the energy is noise, and how
the loss fares, is not told by this: a larger batch has less noise and so a lower recommended rank; a lower learning
rate a longer gap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor

from galore_torch.projection.spectra import rank_that_holds
from galore_torch.training.inspection.config import RecommendConfig
from galore_torch.training.inspection.history import SHARES, GradientHistory

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


def recommend(group: ModuleGroup, config: RecommendConfig) -> Recommendation:
    """Apply the rule to the figures of a group of modules."""
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
    rank = next((rank for rank in multiples if first[rank - 1] >= config.capture_share), side)
    if len(ages) == 1:
        return Recommendation(
            rank=rank,
            why_not=f"no basis older than {ages[0]} steps was judged by {LEAST_PAIRS} gradients; give more steps",
        )
    last = next((before for before, age in pairwise(ages) if group.kept[age][rank - 1] < config.keep_share), None)
    return Recommendation(rank=rank, gap=last or ages[-1], at_least=last is None)
