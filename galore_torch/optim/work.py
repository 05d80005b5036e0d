"""`Work`: one weight in one step. What is done with its gradient before the rule runs, and with its coordinates after.

State of a projected weight: `step` (how many it has made), `renewals` (how many bases it has had), `renewed_step` (the
step of the last), `nonfinite` (gradients met that were not finite), `basis` (factors by mode) and `inner` (the rule's
own).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galore_torch.optim.groups import is_projected
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.rule import Moved, Rule, Traits
from galore_torch.projection import Projection, find_basis, is_due


@dataclass(slots=True, kw_only=True)
class Work:
    """One weight in one step.

    Attributes:
        weight: what is trained; its `grad` is full or projected.
        name: what messages call it.
        group: its parameter group.
        lent_group: the same as the rule sees it.
        state: its state in the optimizer.
        projection: how it is projected; the identity if it is not.
        rule: what moves its coordinates, or itself.
        traits: what is known of the rule.
        through_coordinates: whether the rule moves coordinates, not the weight itself.
        dtype: of the coordinates.
        seed: of the optimizer's random numbers.
        index: its place among the projected weights.
        turn: its offset within the gap.
    """

    weight: Tensor
    name: str
    group: dict[str, Any]
    lent_group: dict[str, Any]
    state: dict[str, Any]
    projection: Projection
    rule: Rule
    traits: Traits
    through_coordinates: bool
    dtype: torch.dtype
    seed: int
    index: int
    turn: int

    @property
    def grad(self) -> Tensor:
        """The weight's gradient, full or projected."""
        assert self.weight.grad is not None
        return self.weight.grad

    @property
    def coordinate_count(self) -> int:
        """How many numbers the rule moves."""
        return torch.Size(self.projection.image_shape).numel()

    @property
    def turn_has_come(self) -> bool:
        """Whether the basis is to be renewed in this step. Nothing but a step changes it."""
        if not self.projection.modes:
            return False
        return is_due(self.state["step"], self.state["renewed_step"], self.group["update_proj_gap"], self.turn)

    @property
    def is_due(self) -> bool:
        """Whether the basis is to be renewed from the gradient there is. A projected gradient holds too little."""
        return self.turn_has_come and not isinstance(self.weight.grad, ProjectedGradient)

    def check_gradient(self) -> None:
        """Checks that the gradient is of a kind that is served.

        Raises:
            ValueError: it is sparse or complex; the message names the weight.
        """
        if self.grad.layout is not torch.strided:
            raise ValueError(f"the gradient of {self.name} is sparse; use dense gradients (sparse=False in embeddings)")
        if self.grad.is_complex():
            raise ValueError(f"the gradient of {self.name} is complex; GaLore trains real weights")

    def prepare_state(self) -> None:
        """Creates all keys and shapes of the state, so that they exist after any first step."""
        if "step" in self.state or not self.through_coordinates:
            return
        self.state["step"] = 0
        if self.projection.modes:
            self.state["renewals"], self.state["renewed_step"] = 0, -1
            self.state["nonfinite"] = torch.zeros((), dtype=torch.int64, device=self.weight.device)
            shapes = self.projection.factor_shapes
            self.state["basis"] = {name: self.weight.new_zeros(shape) for name, shape in shapes.items()}

    def renew(self) -> None:
        """Finds a new basis from the gradient, which must be full, finite and not zero.

        The random numbers depend on the seed, on `index` and on the number of the renewal alone.
        """
        generator = torch.Generator(device=self.grad.device)
        generator.manual_seed(((self.seed * 1_000_003 + self.index) * 1_000_003 + self.state["renewals"]) % 2**63)
        old = self.state["basis"] if self.state["renewals"] else None
        try:
            basis = find_basis(self.projection, self.grad, self.group["decomposition"], generator=generator, old=old)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            warnings.warn(f"{self.name} keeps its basis for now: the decomposition failed ({error})", stacklevel=4)
            return
        self.state["basis"] = {name: factor.to(self.weight.dtype) for name, factor in basis.items()}
        self.state["renewals"] += 1
        self.state["renewed_step"] = self.state["step"]

    def image(self) -> Tensor:
        """What the rule gets as gradient: R = P^T G, with L2 decay R = P^T (G + decay * W); G itself without one."""
        if not self.through_coordinates:
            return self.grad
        basis = self.state.get("basis", {})
        if isinstance(self.grad, ProjectedGradient):
            image = self.grad.image_in(self.projection, basis)
        else:
            image = self.projection.project(self.grad, basis)
        image = image.to(self.dtype)
        decay = self.group.get("weight_decay", 0)
        if self.traits.decay == "l2" and decay != 0:
            sign = -1 if self.group.get("maximize") else 1
            image = image.add(self.projection.project(self.weight, basis), alpha=sign * decay)
        return image

    def fold(self, coordinates: Tensor) -> None:
        """W <- (1 - lr * decay) * W + scale * project_back(c). The decay only if the rule's is decoupled."""
        self.state["step"] += 1
        group, traits = self.group, self.traits
        moved = Moved(
            weight=self.weight, group=group, step=self.state["step"], coordinates_shape=tuple(coordinates.shape)
        )
        alpha: Any = group["scale"] if is_projected(group) else 1.0
        beta: Any = 1.0
        if traits.decay == "decoupled" and group.get("weight_decay", 0) != 0:
            lr = traits.learning_rate(moved) if traits.learning_rate else group["lr"]
            beta = 1 - lr * group["weight_decay"]
        if traits.factor:
            alpha = alpha * traits.factor(moved)
        if isinstance(alpha, Tensor):
            coordinates.mul_(alpha)
            alpha = 1.0
        if isinstance(beta, Tensor):
            self.weight.mul_(beta)
            beta = 1.0
        self.projection.fold(self.weight, coordinates, self.state.get("basis", {}), alpha=alpha, beta=beta)


def count_nonfinite(work: Sequence[Work], images: Sequence[Tensor]) -> Tensor:
    """Finds the images that are not finite, and counts them in the state of the projected weights.

    A number that is not finite spoils a whole slice of the image across its projected axes, so the first entries along
    these are looked at; nothing is read back from the device.

    Args:
        work: the weights, at least one.
        images: their images (or gradients, where they are not projected).

    Returns:
        One boolean for each, on the first one's device.
    """
    bad = (
        peaks([_across(image, one.projection) for one, image in zip(work, images, strict=True)])
        .isfinite()
        .logical_not_()
    )
    counted = [
        (one.state["nonfinite"], mark) for one, mark in zip(work, bad.unbind(), strict=True) if one.projection.modes
    ]
    if counted:
        counters, marks = zip(*counted, strict=True)
        torch._foreach_add_(counters, marks)
    return bad


def peaks(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute entries of tensors, as one vector on the first one's device.

    Args:
        tensors: at least one, of any floating dtypes.

    Returns:
        (number of tensors,); not finite where an entry is not finite, 0 only where all entries are 0.
    """
    device = tensors[0].device
    largest = [peak.to(device) for peak in torch._foreach_norm(list(tensors), float("inf"))]
    dtype = functools.reduce(torch.promote_types, (peak.dtype for peak in largest))
    return torch.stack([peak.to(dtype) for peak in largest])


def _across(image: Tensor, projection: Projection) -> Tensor:
    for mode in projection.modes:
        image = image.narrow(mode.axis, 0, 1)
    return image
