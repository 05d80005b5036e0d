"""What becomes of the optimizer's state when a basis is renewed.

Its moments are numbers in the old basis. `keep` reads them in the new one, as the paper does; `reset` lets the
optimizer inside begin anew; `rotate` carries them over. With C = P_new^T P_old along each projected axis, a first
moment m becomes C m: what of it lies outside the new subspace is lost. A second moment v is no vector: its variance
v - m^2 goes with the squares of C, as if coordinates were independent, and the square of the new mean comes on top
(LDAdam, arXiv 2410.16103, with the moments as Adam corrects them for their start):

    v_new = (1 - beta2^t) |C^2 (v / (1 - beta2^t) - (m / (1 - beta1^t))^2) + (C m / (1 - beta1^t))^2|
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_torch.optim.rule import InnerParam, Rule
from galore_torch.optim.state_keys import INNER, RENEWALS, RENEWED_STEP, STEP
from galore_torch.projection import Basis, Projection, multiply_mode

if TYPE_CHECKING:
    from galore_torch.optim.trained_weight import TrainedWeight


@dataclass(frozen=True)
class Moment:
    """What a tensor in an optimizer's state is.

    Attributes:
        order: 1 for an average of gradients, 2 for one of their squares.
        mean: of a second moment, the first one that belongs to it in the same state, if there is one.
    """

    order: int
    mean: str | None = None


MOMENTS: dict[str, Moment] = {}
"""What tensors of optimizers' states are, by their names there. `recipes` fills it."""


def begins_anew(trained: TrainedWeight) -> bool:
    """Whether the rule gets no state in this step, for the basis has been renewed and `moments` is "reset"."""
    state = trained.state
    is_renewed = state.get(RENEWALS, 0) > 1 and state[RENEWED_STEP] == state[STEP]
    return is_renewed and trained.group.get("moments") == "reset"


def carry(trained: TrainedWeight, old: Basis, new: Basis) -> None:
    """Carries a weight's moments from one basis into the next, in place, if `moments` is "rotate".

    Args:
        trained: the weight.
        old: the basis so far.
        new: the one from now on.
    """
    inner = trained.state.get(INNER)
    if not inner or trained.group.get("moments") != "rotate":
        return
    changes = {name: (old[name].to(_exact(old[name])).mT @ new[name].to(_exact(old[name]))) for name in new}
    opened, group = trained.opened(inner), trained.group
    beta1, beta2 = group["betas"][:2] if "betas" in group else (0.0, 0.0)
    steps = trained.state[STEP]
    corrections = 1 - beta1**steps, 1 - beta2**steps
    before = {name: value for name, value in opened.items() if _is_moment(name, value)}
    rotated = {name: _rotated(before, name, changes, trained.projection, corrections) for name in before}
    for name, value in rotated.items():
        before[name].copy_(value)


def require_moments(rule: Rule, group: Mapping[str, Any]) -> None:
    """Checks that all that an optimizer keeps of a gradient can be carried over.

    Args:
        rule: the optimizer.
        group: a parameter group with its defaults.

    Raises:
        ValueError: `moments` is "rotate", and it keeps a tensor of which is not known what it is.
    """
    if group.get("moments") != "rotate":
        return
    state: dict[str, Any] = {}
    tried = rule.again()
    for _ in range(2):
        param = InnerParam(tensor=torch.zeros(4, 3), grad=torch.ones(4, 3), state=state, group=group)
        tried.step([param])
        state = param.state
    unknown = [key for key, value in state.items() if isinstance(value, Tensor) and value.dim() and key not in MOMENTS]
    if unknown:
        raise ValueError(
            f"moments is 'rotate', and {rule.name} keeps {', '.join(unknown)}, of which is not known how to carry it "
            "into another basis; use moments='keep' or 'reset'"
        )


def _is_moment(name: str, value: Any) -> bool:
    return name in MOMENTS and isinstance(value, Tensor) and value.dim() > 0


def _rotated(
    moments: Mapping[str, Tensor],
    name: str,
    changes: Mapping[str, Tensor],
    projection: Projection,
    corrections: tuple[float, float],
) -> Tensor:
    kind = MOMENTS[name]
    value = moments[name].to(next(iter(changes.values())).dtype)
    if kind.order == 1:
        return _changed(value, changes, projection)
    squares = {mode: change.square() for mode, change in changes.items()}
    mean = moments.get(kind.mean) if kind.mean else None
    if mean is None:
        return _changed(value, squares, projection)
    of_mean, of_square = corrections
    mean = mean.to(value.dtype) / of_mean
    variance = _changed(value / of_square - mean.square(), squares, projection)
    return (variance + _changed(mean, changes, projection).square()).abs_().mul_(of_square)


def _changed(value: Tensor, changes: Mapping[str, Tensor], projection: Projection) -> Tensor:
    """A moment in the new basis. A factored one has one number along some axes, which stay as they are."""
    for mode in projection.modes:
        if value.dim() >= -mode.axis and value.shape[mode.axis] == mode.rank:
            value = multiply_mode(value, changes[mode.name], mode.axis)
    return value


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
