"""Folding an update into its weight: W <- (1 - lr * decay) * W + scale * project_back(c).

What the update is, where the gradient's residual comes to it or it is normalized, say `residual` and `normalize`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from galore_torch.lowbit import QuantizedWeight, add_rounded
from galore_torch.optim.groups import is_projected
from galore_torch.optim.inner_group import moves_at_rate_one
from galore_torch.optim.normalize import normalized
from galore_torch.optim.processes import whole
from galore_torch.optim.residual import residual_of, with_residual
from galore_torch.optim.rule import UpdateContext
from galore_torch.optim.state_keys import STEP
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.optim.update import Update
from galore_torch.random_bits import key_of


def common_factors(trained: TrainedWeight) -> tuple[float, float] | None:
    """What all plain weights of a group have in common in W <- beta * W + alpha * project_back(c).

    Args:
        trained: one of them.

    Returns:
        alpha and beta; None where they depend on the weight, or are tensors.
    """
    group, traits = trained.group, trained.traits
    if traits.factor or traits.learning_rate or moves_at_rate_one(group):
        return None
    alpha: Any = group["scale"] if is_projected(group) else 1.0
    beta: Any = 1.0
    if traits.decay == "decoupled" and group.get("weight_decay", 0) != 0:
        beta = 1 - group["lr"] * group["weight_decay"]
    return None if isinstance(alpha, Tensor) or isinstance(beta, Tensor) else (alpha, beta)


def fold(trained: TrainedWeight, coordinates: Tensor, projected: Tensor) -> None:
    """Counts the weight's step, and moves it by its coordinates. Decay only if the rule's is decoupled.

    Args:
        trained: the weight.
        coordinates: as the rule has moved them; changed in place.
        projected: what the rule got as gradient; a residual changes the gradient itself in place.
    """
    trained.state[STEP] += 1
    group, traits, weight = trained.group, trained.traits, trained.local
    alpha: Any = group["scale"] if is_projected(group) else 1.0
    beta: Any = 1.0
    if traits.decay == "decoupled" and group.get("weight_decay", 0) != 0:
        lr = whole(traits.learning_rate(_context(trained))) if traits.learning_rate else group["lr"]
        beta = 1 - lr * group["weight_decay"]
    factor: Any = whole(traits.factor(_context(trained))) if traits.factor else 1.0
    if moves_at_rate_one(group):
        update, rate = _in_units(trained, coordinates, projected, factor)
        alpha = alpha * rate
    else:
        update, alpha = Update(trained.local_projection, coordinates, trained.factors), alpha * factor
    if isinstance(alpha, Tensor):
        update, alpha = update.times(alpha), 1.0
    if isinstance(weight, QuantizedWeight):
        weight.move(update.by_rows(weight.dtype), step=trained.state[STEP], alpha=alpha, beta=beta)
    elif trained.rounding != "nearest":
        _fold_rounded(trained, update, alpha, beta)
    else:
        if isinstance(beta, Tensor):
            weight.mul_(beta)
            beta = 1.0
        update.add_to(weight, alpha, beta)


def _in_units(trained: TrainedWeight, coordinates: Tensor, projected: Tensor, factor: Any) -> tuple[Update, Any]:
    """The update of a rule that has moved coordinates at a rate of 1, with its residual and normalized; and its rate.

    A rule whose own rate is given (Adafactor's) has its rate in its factor.
    """
    given = trained.inner_group["lr"]
    if given == 1:
        rate = trained.group["lr"]
        if trained.traits.factor:
            coordinates.mul_(factor)
    else:
        rate = factor * given
        coordinates.div_(given)
    kind, size = residual_of(trained), trained.group.get("normalize")
    if kind is None:
        update = Update(trained.local_projection, coordinates, trained.factors)
    else:
        update = with_residual(trained, coordinates, projected, kind)
    return (update if size is None else normalized(update, size)), rate


def _context(trained: TrainedWeight) -> UpdateContext:
    return UpdateContext(
        weight=trained.weight,
        group=trained.group,
        step=trained.state[STEP],
        coordinates_shape=trained.projection.projected_shape,
    )


def _fold_rounded(trained: TrainedWeight, update: Update, alpha: float, beta: float | Tensor) -> None:
    """The same for a weight of 16 bits whose last digit matters: formed in float32, some rows at a time."""
    add_rounded(
        trained.local,
        update.by_rows(trained.weight.dtype if trained.projection.modes else None),
        alpha=alpha,
        beta=beta,
        key=key_of(trained.seed, trained.place, trained.state[STEP]) if trained.rounding == "stochastic" else None,
        compensation=trained.local_compensation if trained.rounding == "compensated" else None,
        first=trained.first,
    )
