"""What becomes of the optimizer's state when a basis is renewed.

Its moments are numbers in the old basis. `keep` reads them in the new one, as the paper does; `reset` lets the
optimizer inside begin anew; `rotate` carries them over. With C = P_new^T P_old along each projected axis, a first
moment m becomes C m: what of it lies outside the new subspace is lost. A second moment v is no vector: its variance
v - m^2 goes with the squares of C, as if coordinates were independent, and the square of the new mean comes on top
(LDAdam, arXiv 2410.16103, with the moments as Adam corrects them for their start):

    v_new = (1 - beta2^t) |C^2 (v / (1 - beta2^t) - (m / (1 - beta1^t))^2) + (C m / (1 - beta1^t))^2|
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_torch.optim.norms import exact
from galore_torch.optim.rule import InnerParam, Rule, on_cpu
from galore_torch.optim.state_keys import INNER, RENEWALS, RENEWED_STEP, STEP
from galore_torch.projection import Basis, Projection, multiply_mode

if TYPE_CHECKING:
    from galore_torch.optim.trained_weight import TrainedWeight


State = Mapping[str, Any]


def _decoded(state: State, name: str) -> Tensor:
    value: Any = state[name]
    made: Tensor = value.dequantize() if hasattr(value, "__tensor_flatten__") else value  # torchao's codes
    return made


def _encode(state: State, name: str, moment: Tensor) -> None:
    state[name].copy_(moment)


@dataclass(frozen=True)
class Moment:
    """What a tensor in an optimizer's state is.

    Attributes:
        order: 1 for an average of gradients, 2 for one of their squares, 0 for what belongs to another tensor.
        mean: of a second moment, the first one that belongs to it in the same state, if there is one.
        read: gives its numbers, from the state by its name there.
        write: puts others in their place.
    """

    order: int
    mean: str | None = None
    read: Callable[[State, str], Tensor] = _decoded
    write: Callable[[State, str, Tensor], None] = _encode


MOMENTS: dict[str, Moment] = {}
"""What tensors of optimizers' states are, by their names there. `recipes` fills it."""

MOMENTS_OF: dict[str, Mapping[str, Moment]] = {}
"""The same of optimizers in whose states names mean something else, by qualified class name."""


def begins_anew(trained: TrainedWeight) -> bool:
    """Whether the rule gets no state in this step, for the basis has been renewed and `moments` is "reset"."""
    if trained.group.get("moments") != "reset":
        return False
    state = trained.state
    is_renewed: bool = state.get(RENEWALS, 0) > 1 and state[RENEWED_STEP] == state[STEP]
    return is_renewed


def carry(trained: TrainedWeight, old: Basis, new: Basis, renewed: Tensor | None = None) -> None:
    """Carries a weight's moments from one basis into the next, in place, if `moments` is "rotate".

    Args:
        trained: the weight.
        old: the basis so far.
        new: the one from now on.
        renewed: a boolean of no dimensions, False where that is the old one; None where it is not.
    """
    inner = trained.state.get(INNER)
    if not inner or trained.group.get("moments") != "rotate":
        return
    changes = {}
    for name in new:
        dtype = exact(new[name])
        changes[name] = trained.of_stack(old[name].to(dtype).mT @ new[name].to(dtype))
    beta1, beta2 = trained.group["betas"][:2] if "betas" in trained.group else (0.0, 0.0)
    steps = trained.state[STEP]
    rotation = _Rotation(trained.projection, changes, 1 - beta1**steps, 1 - beta2**steps)
    opened, kinds = trained.opened(inner), moments_of(trained.rule)
    moments = {
        name: kinds[name].read(opened, name)
        for name, value in opened.items()
        if isinstance(value, Tensor) and value.dim() and name in kinds and kinds[name].order
    }
    rotated = {name: rotation.of(moments, name, kinds[name]) for name in moments}
    if renewed is not None:
        for name, moment in rotated.items():
            rotated[name] = torch.where(renewed, moment, moments[name].to(moment.dtype))
    for name, moment in rotated.items():
        kinds[name].write(opened, name, moment.reshape(opened[name].shape))


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
    tried, group = rule.on_cpu(), on_cpu(group)
    for _ in range(2):
        param = InnerParam(tensor=torch.zeros(4, 3), grad=torch.ones(4, 3), state=state, group=group)
        tried.step([param])
        state = param.state
    known = moments_of(rule)
    unknown = [key for key, value in state.items() if isinstance(value, Tensor) and value.dim() and key not in known]
    if unknown:
        raise ValueError(
            f"moments is 'rotate', and {rule.name} keeps {', '.join(unknown)}, of which is not known how to carry it "
            "into another basis; use moments='keep' or 'reset'"
        )


def moments_of(rule: Rule) -> Mapping[str, Moment]:
    """What is known of the tensors in an optimizer's state, by their names there.

    Args:
        rule: the optimizer.
    """
    return {**MOMENTS, **MOMENTS_OF.get(rule.name, {})}


@dataclass(frozen=True)
class _Rotation:
    """From one basis into another.

    Attributes:
        projection: how the weight is projected.
        changes: C^T by mode, (..., r, r).
        of_mean, of_square: by how much first and second moments are too small for their start.
    """

    projection: Projection
    changes: Mapping[str, Tensor]
    of_mean: float
    of_square: float

    def of(self, moments: Mapping[str, Tensor], name: str, kind: Moment) -> Tensor:
        """A moment in the new basis.

        Args:
            moments: all of a weight's, by name.
            name: which.
            kind: what it is.
        """
        dtype = next(iter(self.changes.values())).dtype
        value, mean = moments[name].to(dtype), moments.get(kind.mean or "")
        if kind.order == 1:
            return self._changed(value, self.changes)
        squares = {mode: change.square() for mode, change in self.changes.items()}
        if mean is None:
            return self._changed(value, squares)
        mean = mean.to(dtype) / self.of_mean
        variance = self._changed(value / self.of_square - mean.square(), squares)
        return (variance + self._changed(mean, self.changes).square()).abs_().mul_(self.of_square)

    def _changed(self, value: Tensor, changes: Mapping[str, Tensor]) -> Tensor:
        for mode in self.projection.modes_in(value):
            value = multiply_mode(value, changes[mode.name], mode.axis)
        return value
