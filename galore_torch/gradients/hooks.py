"""Hooks that act on a gradient the moment it is complete: project it, and let go of what it could not be added to.

They are post-accumulate hooks of the parameters. A weight that renews in this step keeps its full gradient, for the
whole window of micro-batches: the decision depends on the optimizer's step count alone, which does not change inside
a window.

The garbage collector does not see into such hooks, so they hold the optimizer, which holds the parameters, weakly: a
model and an optimizer that are dropped are freed, removed from each other or not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from galore_torch import devices
from galore_torch.gradients.known_weights import KnownWeights
from galore_torch.lowbit import Codes
from galore_torch.optim.galore import GaLore
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.projection import is_usable

Hook = Callable[[Tensor], None]


def project_when_complete(optimizer: GaLore, grad_dtype: torch.dtype | None, grad_bits: int = 16) -> Hook:
    """A hook that turns a full gradient into a projected one, and so frees it.

    A weight without a basis finds its first from this gradient, and one whose basis lacks directions more of them, so
    that no more than one full gradient of such weights lives at a time. The basis comes with the projected gradient,
    and is the weight's from `step()` on. A weight whose turn to renew has come keeps its full gradient for `step()`.

    Args:
        optimizer: holds the weights.
        grad_dtype: in which projected gradients accumulate; the gradient's own when None.
        grad_bits: 8 or 4 to keep them in codes.

    Returns:
        The hook.
    """
    known = KnownWeights(optimizer)
    as_they_are = grad_dtype is None and grad_bits == 16

    def project(weight: Tensor) -> None:
        grad = weight.grad
        if grad is None or grad.requires_grad:
            return  # of create_graph=True: it is still to be differentiated, as it is
        if isinstance(grad, ProjectedGradient):
            if not as_they_are:
                weight.grad = _stored_in(grad, grad_dtype, grad_bits)
            return
        trained = known.in_backward(weight)
        if trained is None:
            return
        try:
            with torch.no_grad():
                projected = project_early(trained, trained.grad)
        except Exception as error:
            raise RuntimeError(
                f"projecting the gradient of {trained.name} inside the backward pass failed: {error}. No weight has "
                "moved; empty the gradients with zero_grad() before the next backward"
            ) from error
        if projected is not None:
            weight.grad = projected if as_they_are else _stored_in(projected, grad_dtype, grad_bits)

    return project


def project_early(trained: TrainedWeight, grad: Tensor) -> ProjectedGradient | None:
    """A gradient projected as soon as it is complete.

    Args:
        trained: its weight.
        grad: the full gradient.

    Returns:
        The projection; None if the full one is wanted, for a step to renew the basis from.
    """
    if not trained.needs_renewal:
        return ProjectedGradient.of(grad, trained.projection, trained.basis)
    if not trained.completes_basis:
        return None
    if trained.renews_unread:
        basis, _ = trained.find_unread()
        return ProjectedGradient.of(grad, trained.projection, basis)
    found = trained.find_basis() if bool(is_usable(grad)) else None
    return None if found is None else ProjectedGradient.of(grad, trained.projection, found)


def _stored_in(gradient: ProjectedGradient, dtype: torch.dtype | None, bits: int) -> ProjectedGradient:
    if bits != 16 and not gradient.in_few_bits:
        codes = Codes.of(gradient.projected, bits)
        return ProjectedGradient(codes, gradient.projection, gradient.basis, gradient.dtype)
    if dtype is None or gradient.projected.dtype == dtype:
        return gradient
    return ProjectedGradient(gradient.projected.to(dtype), gradient.projection, gradient.basis, gradient.dtype)


def discard_stale(optimizer: GaLore, weight: Tensor) -> Callable[[Tensor], None]:
    """A hook on an incoming gradient: drops a projected gradient of zeros to which it could not be added.

    `zero_grad(set_to_none=False)` leaves such images. Where a full gradient is wanted, or the basis is another by now,
    what is added to them would be lost in part.

    Args:
        optimizer: holds the weight.
        weight: a projected one.

    Returns:
        The hook, for `Tensor.register_hook`.
    """
    known = KnownWeights(optimizer)

    def let_go(_: Tensor) -> None:
        kept = weight.grad
        if not isinstance(kept, ProjectedGradient):
            return
        trained = known.in_backward(weight)
        takes_up = trained is None or (not trained.needs_renewal and kept.is_in(trained.basis))
        if not takes_up and (kept.is_emptied or not (devices.runs_ahead(kept) or kept.projected.any())):
            weight.grad = None

    return let_go
