"""`Turns`: when a weight renews its basis, and whether that can be done without waiting for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from galore_torch import devices
from galore_torch.lowbit import is_same_basis
from galore_torch.optim.agreement import is_one_of_several
from galore_torch.optim.outcomes import Outcomes
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.state_keys import GAP, LACKING, RENEWALS, RENEWED_STEP, STEP
from galore_torch.projection import Basis, Projection, adapt_gap, is_due


class Turns:
    """What a weight's group and state say of its renewals."""

    __slots__ = ()

    if TYPE_CHECKING:
        weight: Tensor
        group: dict[str, Any]
        state: dict[str, Any]
        projection: Projection
        turn: int
        outcomes: Outcomes

        @property
        def basis(self) -> Basis: ...  # noqa: D102

    @property
    def needs_renewal(self) -> bool:
        """Whether the basis is to be renewed or filled up in this step. Nothing but a step changes it."""
        if self.outcomes.awaited:
            self.outcomes.settle(self.state)
        return bool(self.projection.modes) and (self.state[LACKING] > 0 or self._is_due_anew)

    @property
    def _is_due_anew(self) -> bool:
        state, group = self.state, self.group
        step, renewed_step = state[STEP], state[RENEWED_STEP]
        if group["cos_threshold"] is None:
            return is_due(step, renewed_step, group["update_proj_gap"], self.turn)
        # Gaps that differ keep no common places: after its first turn a lazy layer counts from its last.
        return is_due(step, renewed_step, self.gap, renewed_step if state[RENEWALS] > 1 else self.turn)

    @property
    def is_lazy(self) -> bool:
        """Whether the weight's gap adapts to how far its subspace moves."""
        return self.group["cos_threshold"] is not None

    @property
    def gap(self) -> int:
        """Steps between two renewals of the basis, as things stand."""
        least: int = self.group["update_proj_gap"]
        return max(least, self.state[GAP]) if self.is_lazy else least

    @property
    def completes_basis(self) -> bool:
        """Whether what is due in this step are directions that no gradient has determined yet: all of them at first."""
        return self.needs_renewal and not (self.state[RENEWALS] and self._is_due_anew)

    @property
    def renews_from_sketch(self) -> bool:
        """Whether all that a renewal in this step needs of the full gradient is its sketch."""
        if self.group["decomposition"] != "sketched" or self.projection.is_tucker or not self.needs_renewal:
            return False
        return not (self.completes_basis and self.state[RENEWALS])  # of a stack some bases may be whole

    @property
    def is_due(self) -> bool:
        """Whether the basis is to be renewed with the gradient there is.

        A projected gradient holds too little to find one from. But it may bring the basis that was found from the full
        one, or its sketch, inside the backward, which counts from this step on: with a gradient that is thrown away it
        goes.
        """
        if not self.needs_renewal:
            return False
        grad = self.weight.grad
        if not isinstance(grad, ProjectedGradient):
            return True
        is_found_before = self.completes_basis or self.renews_from_sketch
        if not is_found_before or grad.projection != self.projection:
            return False
        return not is_same_basis(grad.basis, self.basis, reads=not self.renews_unread)

    @property
    def renews_unread(self) -> bool:
        """Whether the basis can be renewed in this step without reading anything back from the device.

        Not where a basis is to be filled up; nor by an exact decomposition, where the moments begin anew, or where
        processes share the work.
        """
        group = self.group
        return (
            devices.runs_ahead(self.weight)
            and self.state[LACKING] <= 0
            and not self.projection.is_tucker
            and group["decomposition"] != "svd"
            and group.get("moments") != "reset"
            and not is_one_of_several()
        )

    def adapt_gap(self, mean_overlap: float, renewals: int) -> None:
        """Adapts a lazy layer's gap to how far its subspace moves, once as many renewals as are averaged are known.

        Args:
            mean_overlap: the mean of `overlaps`.
            renewals: bases found before the last one.
        """
        group = self.group
        if renewals >= group["queue_size"]:
            limits = {"least": group["update_proj_gap"], "threshold": group["cos_threshold"]}
            self.state[GAP] = adapt_gap(self.gap, mean_overlap, factor=group["gamma_proj"], **limits)
