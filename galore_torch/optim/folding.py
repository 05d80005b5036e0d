"""Folding coordinates into their weight: W <- (1 - lr * decay) * W + scale * project_back(c)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from galore_torch.lowbit import QuantizedWeight, add_rounded, key_of
from galore_torch.optim.groups import is_projected
from galore_torch.optim.rule import Moved
from galore_torch.optim.work import Work


def fold(work: Work, coordinates: Tensor) -> None:
    """Counts the weight's step, and moves it by its coordinates. Decay only if the rule's is decoupled.

    Args:
        work: the weight.
        coordinates: as the rule has moved them; changed in place.
    """
    work.state["step"] += 1
    group, traits, weight = work.group, work.traits, work.local
    alpha: Any = group["scale"] if is_projected(group) else 1.0
    beta: Any = 1.0
    if traits.decay == "decoupled" and group.get("weight_decay", 0) != 0:
        lr = traits.learning_rate(_moved(work, coordinates)) if traits.learning_rate else group["lr"]
        beta = 1 - lr * group["weight_decay"]
    if traits.factor:
        alpha = alpha * traits.factor(_moved(work, coordinates))
    if isinstance(alpha, Tensor):
        coordinates.mul_(alpha)
        alpha = 1.0
    if isinstance(weight, QuantizedWeight):
        _fold_into_codes(work, weight, coordinates, alpha, beta)
    elif work.rounding != "nearest":
        _fold_rounded(work, coordinates, alpha, beta)
    else:
        if isinstance(beta, Tensor):
            weight.mul_(beta)
            beta = 1.0
        work.local_projection.fold(weight, coordinates, work.factors, alpha=alpha, beta=beta)


def _moved(work: Work, coordinates: Tensor) -> Moved:
    return Moved(
        weight=work.weight,
        group=work.group,
        step=work.state["step"],
        coordinates_shape=tuple(coordinates.shape),
    )


def _fold_rounded(work: Work, coordinates: Tensor, alpha: float, beta: float | Tensor) -> None:
    """The same for a weight of 16 bits whose last digit matters: formed in float32, some rows at a time."""
    basis, projection = work.factors, work.projection
    if projection.modes:
        coordinates = coordinates.to(work.weight.dtype)
    update: Callable[[slice], Tensor]
    if len(projection.shape) == 2 and projection.view_shape == projection.shape:
        update = functools.partial(projection.project_back_rows, coordinates, basis)
    else:
        update = projection.project_back(coordinates, basis).__getitem__
    add_rounded(
        work.weight,
        update,
        alpha=alpha,
        beta=beta,
        key=key_of(work.seed, work.place, work.state["step"]) if work.rounding == "stochastic" else None,
        compensation=work.state["compensation"] if work.rounding == "compensated" else None,
    )


def _fold_into_codes(
    work: Work, weight: QuantizedWeight, coordinates: Tensor, alpha: float, beta: float | Tensor
) -> None:
    """The same for a weight in INT8: the update is formed some rows at a time."""
    basis, coordinates = work.factors, coordinates.to(weight.dtype)
    weight.move(
        lambda rows: work.projection.project_back_rows(coordinates, basis, rows),
        step=work.state["step"],
        alpha=alpha,
        beta=beta,
    )
