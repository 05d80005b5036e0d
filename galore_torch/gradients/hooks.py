"""Hooks that act on a gradient the moment it is complete: project it, or apply it.

They are post-accumulate hooks of the parameters. A weight that renews in this step keeps its full gradient, for the
whole window of micro-batches: the decision depends on the optimizer's step count alone, which does not change inside
a window.

The garbage collector does not see into such hooks, so they hold the optimizer, which holds the parameters, weakly: a
model and an optimizer that are dropped are freed, removed from each other or not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from galore_torch.gradients.applied_gradient import AppliedGradient
from galore_torch.gradients.updated_weights import UpdatedWeights
from galore_torch.lowbit import Codes
from galore_torch.optim.galore import GaLore
from galore_torch.optim.nonfinite import peaks
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.trained_weight import TrainedWeight

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
    held = weakref.ref(optimizer)

    @torch.no_grad()
    def project(weight: Tensor) -> None:
        ours = held()
        if ours is None or weight.grad is None or weight.grad.requires_grad:
            return  # of create_graph=True: it is still to be differentiated, as it is
        if isinstance(weight.grad, ProjectedGradient):
            weight.grad = _stored_in(weight.grad, grad_dtype, grad_bits)
            return
        trained = ours._trained_weight(weight)
        try:
            projected = _projected(trained, trained.grad)
        except Exception as error:
            raise RuntimeError(
                f"projecting the gradient of {trained.name} inside the backward pass failed: {error}. No weight has "
                "moved; empty the gradients with zero_grad() before the next backward"
            ) from error
        if projected is not None:
            weight.grad = _stored_in(projected, grad_dtype, grad_bits)

    return project


def _projected(trained: TrainedWeight, grad: Tensor) -> ProjectedGradient | None:
    """The projection of a gradient; None if the full one is wanted, for `step()` to renew the basis from."""
    if not trained.needs_renewal:
        return ProjectedGradient.of(grad, trained.projection, trained.basis)
    basis = trained.find_basis() if trained.completes_basis and _is_usable(grad) else None
    return None if basis is None else ProjectedGradient.of(grad, trained.projection, basis)


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

    @torch.no_grad()
    def let_go(_: Tensor) -> None:
        kept = weight.grad
        if not isinstance(kept, ProjectedGradient):
            return
        trained = optimizer._trained_weight(weight)
        takes_up = not trained.needs_renewal and kept.is_in(trained.basis)
        if not takes_up and not kept.projected.any():
            weight.grad = None

    return let_go


def apply_when_complete(optimizer: GaLore, moved: UpdatedWeights) -> Hook:
    """A hook that makes a weight's whole step the moment its gradient is complete, and frees the gradient.

    Args:
        optimizer: holds the weights.
        moved: the weights that have moved since its last step.

    Returns:
        The hook. Should the step raise, the error names the weight.
    """
    held = weakref.ref(optimizer)

    @torch.no_grad()
    def apply(weight: Tensor) -> None:
        ours = held()
        if ours is None:
            return
        if weight.grad is not None and weight.grad.requires_grad:
            raise ValueError(
                "update='backward' moves weights inside the backward pass, so that it cannot be differentiated twice "
                "(create_graph=True); use attach(..., update='step')"
            )
        moved.expect()
        trained = ours._trained_weight(weight)
        try:
            norm = torch.linalg.vector_norm(trained.grad)
            ours._apply([trained])
        except Exception as error:
            raise RuntimeError(
                f"updating {trained.name} inside the backward pass failed: {error}. Weights whose backward came before "
                "have been updated; this one and those after it have not"
            ) from error
        weight.grad = AppliedGradient(weight, trained.name, norm)
        moved.add(weight, trained.name)

    return apply


def _is_usable(grad: Tensor) -> bool:
    return 0 < float(peaks([grad])[0]) < float("inf")
