"""What becomes of the gradient's part outside the subspace, S = G - P R, where it is not dropped.

Every rule here but `sign` gives S one factor for each slice j across the projected axes (the columns of a matrix that
is projected on the left, the rows of one on the right, a whole matrix on both sides). So S is never formed:

    P psi + phi (G - P R) = P (psi - phi R) + phi G,    |S|^2 = sum_j phi_j^2 (|G_j|^2 - |R_j|^2)

with R the projected gradient and psi what the optimizer inside makes of it at a learning rate of 1. The update of a
weight is -lr * scale * (P psi + residual_scale * S):

* `fira` (arXiv 2410.01623): phi_j = |psi_j| / |R_j|. S may grow by 1.01 a step at most.
* `apollo` (arXiv 2412.05270): the same of the whole gradient, in the place of the update: phi G alone. At rank 1 one
  factor for the whole matrix. With `decomposition="random"`.
* `alice` (arXiv 2502.07752): phi_j = sqrt((m - r) / p_j), p an average over time of |G_j|^2 - |R_j|^2. Limited, too.
* `sign` (FRUGAL, arXiv 2411.07837): the signs of S, which is formed in the place of the gradient.
* `full`: S as it is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_torch.optim.norms import exact, sums_of_squares
from galore_torch.optim.state_keys import RESIDUAL_ENERGY, RESIDUAL_NORM
from galore_torch.optim.update import Update
from galore_torch.projection import Projection

if TYPE_CHECKING:
    from galore_torch.optim.trained_weight import TrainedWeight

GROWTH = 1.01
"""How much longer than in the step before the limited ones may be. Fira's, and all others'."""

LIMITED = ("fira", "apollo", "alice")
ENERGY_DECAY = 0.9
"""Of Alice's average over the energies outside, a step."""

LEAST_ENERGY = 1e-30


def residual_of(trained: TrainedWeight) -> str | None:
    """What becomes of a weight's residual; None where it is dropped, or where there is none."""
    return trained.group.get("residual") if trained.projection.modes else None


def prepare_residual(trained: TrainedWeight) -> None:
    """Creates what of a weight's state its residual needs.

    Args:
        trained: the weight; `RESIDUAL_NORM` is of one number for each of its matrices, and 0 before the first step.
    """
    kind, state, projection = residual_of(trained), trained.state, trained.projection
    options: dict[str, Any] = {"device": trained.weight.device, "dtype": exact(trained.weight)}
    if kind in LIMITED and RESIDUAL_NORM not in state:
        state[RESIDUAL_NORM] = torch.zeros(_stack(projection), **options)
    if kind == "alice" and RESIDUAL_ENERGY not in state:
        state[RESIDUAL_ENERGY] = torch.zeros(_slices(projection), **options)


def with_residual(trained: TrainedWeight, coordinates: Tensor, projected: Tensor, kind: str) -> Update:
    """A weight's update with its residual.

    Args:
        trained: the weight, with its full gradient.
        coordinates: as the rule has moved them at a learning rate of 1; changed in place.
        projected: the projected gradient R.
        kind: the rule.

    Returns:
        The update, which may be in the gradient's place.
    """
    projection, factors = trained.projection, trained.factors
    grad = _whole_gradient(trained)
    full = grad.reshape(projection.view_shape)
    towards = trained.group["residual_scale"] * (1.0 if trained.group.get("maximize") else -1.0)
    if kind == "sign":
        projection.fold(grad, projected, factors, alpha=-1.0)
        full = grad.reshape(projection.view_shape).sign_()
        return Update(projection, coordinates, factors, full, towards)
    scales: Any = towards
    if kind != "full":
        phi = _factors(trained, full, coordinates, projected, kind)
        scales = (phi * towards).to(full.dtype)
    if kind == "apollo":
        return Update(projection, full=full, scales=scales)
    if isinstance(scales, Tensor):
        coordinates.addcmul_(projected, scales.to(coordinates.dtype), value=-1.0)
    else:
        coordinates.sub_(projected, alpha=scales)
    return Update(projection, coordinates, factors, full, scales)


def _whole_gradient(trained: TrainedWeight) -> Tensor:
    """The gradient of which R is the projection: with L2 decay, where the rule has any."""
    group, grad = trained.group, trained.grad
    decay = group.get("weight_decay", 0)
    if trained.traits.decay != "l2" or decay == 0:
        return grad
    whole: Tensor = grad.add(trained.local, alpha=decay * (-1 if group.get("maximize") else 1))
    return whole


def _factors(trained: TrainedWeight, full: Tensor, coordinates: Tensor, projected: Tensor, kind: str) -> Tensor:
    """phi, limited: one for each slice, or each matrix."""
    projection, state = trained.projection, trained.state
    axes = [mode.axis for mode in projection.modes]
    of_full, of_projected = sums_of_squares(full, axes), sums_of_squares(projected, axes)
    outside = of_full if kind == "apollo" else (of_full - of_projected).clamp_min_(0)
    if kind == "alice":
        mean = state[RESIDUAL_ENERGY].lerp_(outside, 1 - ENERGY_DECAY)
        lost = math.prod(mode.size for mode in projection.modes) - math.prod(mode.rank for mode in projection.modes)
        phi = (lost / mean.clamp_min(LEAST_ENERGY)).sqrt_()
    else:
        of_moved = sums_of_squares(coordinates, axes)
        if kind == "apollo" and all(mode.rank == 1 for mode in projection.modes):
            whole = tuple(range(len(_stack(projection)) - len(projection.view_shape), 0))
            of_moved, of_projected = of_moved.sum(whole, keepdim=True), of_projected.sum(whole, keepdim=True)
        phi = torch.where(of_projected > 0, of_moved / of_projected, 0).sqrt_()
    limited: Tensor = phi.mul_(_limit(state[RESIDUAL_NORM], phi, outside))
    return limited


def _limit(before: Tensor, phi: Tensor, outside: Tensor) -> Tensor:
    """A factor that lets a residual's norm grow by no more than `GROWTH` in this step; notes the norm it then has.

    What was zero may become anything, and a step in which it is zero is not counted.
    """
    stack = before.dim()
    norm = (phi.square() * outside).flatten(stack).sum(-1).sqrt_()
    limited = torch.where(before > 0, torch.minimum(norm, GROWTH * before), norm)
    before.copy_(torch.where(norm > 0, limited, before))
    factor = torch.where(norm > 0, limited / norm, 1)
    return factor.view(*factor.shape, *(1,) * (phi.dim() - stack))


def _stack(projection: Projection) -> tuple[int, ...]:
    return () if projection.is_tucker else projection.view_shape[:-2]


def _slices(projection: Projection) -> tuple[int, ...]:
    shape = list(projection.view_shape)
    for mode in projection.modes:
        shape[mode.axis] = 1
    return tuple(shape)
