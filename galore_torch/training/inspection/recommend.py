"""Which rank and which gap the figures of a kind suggest. A rule of thumb, not a theorem.

Rank: the least multiple of `rank_multiple` at which a basis captures, of the gradient one look later, at least
`capture_share` of the energy. The gradient that a basis was made from is no judge: that holds its own noise.

Gap: the greatest age up to which, at that rank, bases of every age capture at least `keep_share` of what bases of the
least age capture of the same gradients. That is the reference and not the gradient's own best directions, because what
a basis loses within its first look is mostly the noise of the batch: no gap, however short, brings it back. What it
loses later, renewals do.

The default share of 0.6 is about what the least captured kind of a tiny LLaMA had at the rank that lost nothing to
full-rank training; at a rank with 0.5 it lost a little (docs/decisions.md).

What is not told by this: how much of the energy is noise, what the optimizer makes of the rest, and how the loss fares.
A larger batch has less noise and so a lower recommended rank; a lower learning rate a longer gap.
"""

from __future__ import annotations

from dataclasses import dataclass

from galore_torch.training.inspection.config import RuleConfig
from galore_torch.training.inspection.kinds import Kind

LEAST_PAIRS = 2
"""How many gradients the bases of an age must have been judged by for that age to count."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What is recommended for one kind.

    Attributes:
        rank: None if there is too little to tell; the whole shorter side if nothing less captures enough.
        gap: in steps; None if there is too little to tell.
        at_least: whether no greater age was judged, so that the gap may be longer.
        why_not: why something is None; empty if nothing is.
    """

    rank: int | None
    gap: int | None
    at_least: bool
    why_not: str


def advise(kind: Kind, rule: RuleConfig) -> Advice:
    """Apply the rule to a kind.

    Args:
        kind: its figures.
        rule: its shares.
    """
    ages = [age for age, pairs in sorted(kind.pairs.items()) if pairs >= LEAST_PAIRS]
    if not ages or ages[0] != min(kind.pairs):
        most = max(kind.pairs.values(), default=0)
        return Advice(
            rank=None,
            gap=None,
            at_least=False,
            why_not=f"bases of an age were judged by {most} later gradient{'' if most == 1 else 's'}, and "
            f"{LEAST_PAIRS} are the least; give more steps",
        )
    first = kind.captured[ages[0]]
    side = len(first)
    multiples = [*range(rule.rank_multiple, side, rule.rank_multiple), side]
    rank = next(rank for rank in multiples if rank == side or first[rank - 1] >= rule.capture_share)
    if len(ages) == 1:
        return Advice(
            rank=rank,
            gap=None,
            at_least=False,
            why_not=f"no basis older than {ages[0]} steps was judged by {LEAST_PAIRS} gradients; give more steps",
        )
    gap = ages[0]
    for age in ages[1:]:
        if kind.kept[age][rank - 1] < rule.keep_share:
            return Advice(rank=rank, gap=gap, at_least=False, why_not="")
        gap = age
    return Advice(rank=rank, gap=gap, at_least=True, why_not="")
