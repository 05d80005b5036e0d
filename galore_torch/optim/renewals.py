"""Which bases a step renews."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from galore_torch.optim.nonfinite import peaks
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.trained_weight import TrainedWeight


def renewable(trained: Sequence[TrainedWeight], agree: Callable[[Tensor], Tensor]) -> list[TrainedWeight]:
    """The weights whose turn it is, and whose gradients are finite and not zero. Synchronizes where one is due.

    Args:
        trained: weights that have a gradient.
        agree: the largest value of all processes.

    Returns:
        Some of them.
    """
    due = [one for one in trained if one.is_due]
    if not due:
        return []
    found = peaks([one.grad.projected if isinstance(one.grad, ProjectedGradient) else one.grad for one in due])
    agreed = agree(found.nan_to_num(nan=float("inf"), posinf=float("inf"))).tolist()
    return [one for one, peak in zip(due, agreed, strict=True) if 0 < peak < float("inf")]
