"""Which bases a step renews, and who finds them: this process alone, or the processes of a job together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from galore_torch.optim.nonfinite import peaks
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.work import Work

Renew = Callable[[list[Work]], None]
"""Renews the bases of weights, whose gradients are finite and not zero."""


def renewable(work: Sequence[Work]) -> list[Work]:
    """The weights whose turn it is, and whose gradients are finite and not zero. Synchronizes where one is due.

    Args:
        work: weights that have a gradient.

    Returns:
        Some of them.
    """
    due = [one for one in work if one.is_due]
    grads = [one.grad.image if isinstance(one.grad, ProjectedGradient) else one.grad for one in due]
    found = peaks(grads).tolist() if due else ()
    return [one for one, peak in zip(due, found, strict=True) if 0 < peak < float("inf")]


def renew_each(work: list[Work]) -> None:
    """Renews them in this process, one after the other.

    Args:
        work: the weights.
    """
    for one in work:
        one.renew()
