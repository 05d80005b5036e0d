"""When a basis is renewed: every `gap` steps, all layers at once or one after the other, or lazily.

GaLore (arXiv 2403.03507), algorithm 2, renews where t mod T = 0. Renewing all layers in one step makes that step many
times as long as the others, so by default the layers take turns (*staggered*): layer i of N renews where
(t - offset_i) mod T = 0, with offsets spread evenly over the gap.

A *lazy* layer has a gap of its own, which adapts to how far its subspace moves from one renewal to the next (the idea
is Q-GaLore's, arXiv 2407.08296, which compares the first singular vectors and never takes growth back).
"""

from __future__ import annotations


def turn_offset(index: int, count: int, gap: int) -> int:
    """The offset of a layer's turn within the gap, when the layers are staggered.

    Args:
        index: the layer's place among the projected ones, from 0.
        count: how many are projected.
        gap: steps between two renewals of one layer.

    Returns:
        A number of steps from 1 to `gap`, so that no layer keeps its first basis for longer than one gap.

    Example:
        >>> [turn_offset(i, count=4, gap=200) for i in range(4)]
        [50, 100, 150, 200]
    """
    return -(-(index + 1) * gap // count)  # rounded up


def is_due(step: int, renewed_step: int, gap: int, offset: int) -> bool:
    """Whether a layer renews its basis in this step.

    A turn that was missed, because the layer had no gradient or one that was not finite, stays due.

    Args:
        step: how many steps the layer has made, 0 in the first.
        renewed_step: the `step` of its last renewal, -1 before the first.
        gap: steps between two renewals.
        offset: the layer's turn within the gap (`turn_offset`); 0 when all layers renew at once; `renewed_step` when
            `gap` steps are to follow the last renewal, whenever that was.

    Returns:
        True when a turn lies after `renewed_step` and not after `step`.

    Example:
        >>> [t for t in range(1, 600) if is_due(t, renewed_step=t - 1, gap=200, offset=50)]
        [50, 250, 450]
    """
    if renewed_step < 0:
        return True
    latest_turn = step - (step - offset) % gap
    return latest_turn > renewed_step


def adapt_gap(gap: int, overlap: float, *, least: int, threshold: float, factor: float) -> int:
    """The gap of a lazy layer after a renewal: longer where its subspace stays, shorter again where it moves.

    Args:
        gap: the layer's gap until now.
        overlap: how much of the subspace was left in the next, on average over its last renewals (`overlap`).
        least: the gap never gets shorter than this.
        threshold: the overlap from which on the gap grows; below it shrinks.
        factor: by which it does either, more than 1.

    Returns:
        A number of steps, at least `least`.

    Example:
        >>> [adapt_gap(200, overlap, least=50, threshold=0.4, factor=2) for overlap in (0.9, 0.4, 0.3)]
        [400, 400, 100]
    """
    if overlap >= threshold:
        return max(gap + 1, round(gap * factor))
    return max(least, round(gap / factor))
