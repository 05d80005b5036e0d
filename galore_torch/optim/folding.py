"""Folding coordinates into their weight: W <- (1 - lr * decay) * W + scale * project_back(c)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from galore_torch.lowbit import QuantizedWeight, add_rounded, key_of
from galore_torch.optim.groups import is_projected
from galore_torch.optim.rule import UpdateContext
from galore_torch.optim.state_keys import STEP
from galore_torch.optim.trained_weight import TrainedWeight


def fold(trained: TrainedWeight, coordinates: Tensor) -> None:
    """Counts the weight's step, and moves it by its coordinates. Decay only if the rule's is decoupled.

    Args:
        trained: the weight.
        coordinates: as the rule has moved them; changed in place.
    """
    trained.state[STEP] += 1
    group, traits, weight = trained.group, trained.traits, trained.local
    alpha: Any = group["scale"] if is_projected(group) else 1.0
    beta: Any = 1.0
    if traits.decay == "decoupled" and group.get("weight_decay", 0) != 0:
        lr = trained.number(traits.learning_rate(_context(trained))) if traits.learning_rate else group["lr"]
        beta = 1 - lr * group["weight_decay"]
    if traits.factor:
        alpha = alpha * trained.number(traits.factor(_context(trained)))
    if isinstance(alpha, Tensor):
        coordinates.mul_(alpha)
        alpha = 1.0
    if isinstance(weight, QuantizedWeight):
        _fold_into_codes(trained, weight, coordinates, alpha, beta)
    elif trained.rounding != "nearest":
        _fold_rounded(trained, coordinates, alpha, beta)
    else:
        if isinstance(beta, Tensor):
            weight.mul_(beta)
            beta = 1.0
        trained.local_projection.fold(weight, coordinates, trained.factors, alpha=alpha, beta=beta)


def _context(trained: TrainedWeight) -> UpdateContext:
    return UpdateContext(
        weight=trained.weight,
        group=trained.group,
        step=trained.state[STEP],
        coordinates_shape=trained.projection.projected_shape,
    )


def _fold_rounded(trained: TrainedWeight, coordinates: Tensor, alpha: float, beta: float | Tensor) -> None:
    """The same for a weight of 16 bits whose last digit matters: formed in float32, some rows at a time."""
    basis, projection = trained.factors, trained.local_projection
    if projection.modes:
        coordinates = coordinates.to(trained.weight.dtype)
    update: Callable[[slice], Tensor]
    if len(projection.shape) == 2 and projection.view_shape == projection.shape:
        update = functools.partial(projection.project_back_rows, coordinates, basis)
    else:
        update = projection.project_back(coordinates, basis).__getitem__
    add_rounded(
        trained.local,
        update,
        alpha=alpha,
        beta=beta,
        key=key_of(trained.seed, trained.place, trained.state[STEP]) if trained.rounding == "stochastic" else None,
        compensation=trained.local_compensation if trained.rounding == "compensated" else None,
        first=trained.first,
    )


def _fold_into_codes(
    trained: TrainedWeight, weight: QuantizedWeight, coordinates: Tensor, alpha: float, beta: float | Tensor
) -> None:
    """The same for a weight in INT8: the update is formed some rows at a time."""
    basis, coordinates = trained.factors, coordinates.to(weight.dtype)
    weight.move(
        lambda rows: trained.projection.project_back_rows(coordinates, basis, rows),
        step=trained.state[STEP],
        alpha=alpha,
        beta=beta,
    )
