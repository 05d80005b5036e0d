"""Which bases a step renews."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from galore_torch.optim.nonfinite import peaks
from galore_torch.optim.processes import Alone
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.trained_weight import TrainedWeight


def renew(trained: Sequence[TrainedWeight], processes: Alone) -> None:
    """Renews the bases whose turn it is, as far as their gradients are finite and not zero.

    Args:
        trained: weights that have a gradient.
        processes: of the job.
    """
    due = [one for one in trained if one.is_due]
    unread = [one for one in due if one.renews_unread]
    read = [one for one in due if not one.renews_unread]
    for one in unread:  # the device knows whether the gradient tells a basis, and the host later
        one.take(*one.find_unread())
    if read:
        processes.renew(_renewable(read, processes.agree))


def _renewable(due: Sequence[TrainedWeight], agree: Callable[[Tensor], Tensor]) -> list[TrainedWeight]:
    """Those whose gradients are finite and not zero. Synchronizes."""
    found = peaks([one.grad.projected if isinstance(one.grad, ProjectedGradient) else one.grad for one in due])
    agreed = agree(found.nan_to_num(nan=float("inf"), posinf=float("inf"))).tolist()
    return [one for one, peak in zip(due, agreed, strict=True) if 0 < peak < float("inf")]
