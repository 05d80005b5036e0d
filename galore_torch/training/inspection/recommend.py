"""Which rank and which gap the figures of a group of modules suggest. A rule of thumb, not a theorem.

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

from dataclasses import dataclass
from itertools import pairwise

from galore_torch.training.inspection.config import RecommendConfig
from galore_torch.training.inspection.modules import ModuleGroup

LEAST_PAIRS = 2
"""How many gradients the bases of an age must have been judged by for that age to count."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What is recommended for one group of modules.

    Attributes:
        rank: None if there are too few snapshots; the whole shorter side if nothing less captures enough.
        gap: in steps; None if there are too few snapshots.
        at_least: whether no greater age was judged, so that the gap may be longer.
        why_not: why something is None; empty if nothing is.
    """

    rank: int | None = None
    gap: int | None = None
    at_least: bool = False
    why_not: str = ""


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
