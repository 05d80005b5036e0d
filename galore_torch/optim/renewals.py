"""Which bases a step renews."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from galore_torch.optim.nonfinite import tell_bases
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
        grads = [one.grad.projected if isinstance(one.grad, ProjectedGradient) else one.grad for one in read]
        processes.renew(list(compress(read, tell_bases(grads, processes.agree))))
