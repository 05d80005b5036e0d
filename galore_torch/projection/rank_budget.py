"""Which ranks capture most of all gradients together, where their bytes are limited.

The first directions of a gradient hold most of its energy and each further one less, so that the best use of bytes is
greedy: what captures most for each byte comes first, whichever weight it is of. A curve that was measured on later
gradients may rise faster further on; then the ranks up to there count together, at their mean.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from torch import Tensor

from galore_torch.units import readable


def ranks_within(
    budget: float, held: Sequence[Tensor], bytes_a_rank: Sequence[float], *, most: Sequence[int], multiple: int = 1
) -> list[int]:
    """Ranks that together capture as much as they can within a number of bytes.

    Args:
        budget: bytes for all.
        held: of each weight what its rank of 1 to k captures, not falling: (k,). A group of alike weights has the sum.
        bytes_a_rank: of each what a rank of 1 takes.
        most: of each the rank that is enough.
        multiple: ranks are multiples of it, but for `most`.

    Returns:
        A rank for each.

    Raises:
        ValueError: the least ranks, one multiple each, are beyond the budget already.

    Example:
        >>> import torch
        >>> held = [torch.tensor([0.5, 0.9, 1.0]), torch.tensor([0.7, 0.8, 1.0])]
        >>> ranks_within(300, held, [100, 100], most=[3, 3])
        [2, 1]
    """
    steps = [[*range(multiple, last, multiple), last] for last in most]
    ranks = [own[0] for own in steps]
    left = budget - sum(rank * size for rank, size in zip(ranks, bytes_a_rank, strict=True))
    if left < 0:
        raise ValueError(
            f"a budget of {readable(budget)} is {readable(-left)} less than ranks of {multiple} take; give more, or a "
            "lower multiple"
        )
    curves = [curve.tolist() for curve in held]
    waiting: list[tuple[float, int, int]] = []

    def wait(index: int) -> None:
        """The further rank of a weight that captures most for its bytes."""
        now, size, curve = ranks[index], bytes_a_rank[index], curves[index]
        further = [rank for rank in steps[index] if rank > now]
        gains = [((curve[rank - 1] - curve[now - 1]) / ((rank - now) * size), -rank) for rank in further]
        if gains:
            gain, rank = max(gains)
            heapq.heappush(waiting, (-gain, index, -rank))

    for index in range(len(ranks)):
        wait(index)
    while waiting:
        _, index, rank = heapq.heappop(waiting)
        cost = (rank - ranks[index]) * bytes_a_rank[index]
        if cost <= left:  # what does not fit leaves its bytes to others
            ranks[index], left = rank, left - cost
            wait(index)
    return ranks
