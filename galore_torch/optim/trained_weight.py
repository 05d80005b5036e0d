"""`TrainedWeight`: what an optimizer knows of one weight, and what it does to it before and after the rule runs.

`GaLore` describes the state that it keeps.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from galore_torch import devices
from galore_torch.lowbit import Rounding, Storage
from galore_torch.messages import warn
from galore_torch.optim.factors import Factors
from galore_torch.optim.groups import storage_in
from galore_torch.optim.moments import carry
from galore_torch.optim.outcomes import Found, Outcomes
from galore_torch.optim.process_part import ProcessPart
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.residual import prepare_residual
from galore_torch.optim.rule import Rule, Traits
from galore_torch.optim.state_keys import (
    BASIS,
    CAPTURED,
    COMPENSATION,
    GAP,
    LACKING,
    NONFINITE,
    OVERLAPS,
    RENEWALS,
    RENEWED_STEP,
    STEP,
)
from galore_torch.optim.turns import Turns
from galore_torch.projection import (
    Basis,
    Projection,
    captured_energy,
    count_lacking,
    find_basis,
    find_unread,
    is_usable,
    lacking,
    overlap,
    sketch,
)
from galore_torch.random_bits import key_of


@dataclass(slots=True, kw_only=True)
class TrainedWeight(Factors, ProcessPart, Turns):
    """One weight in one step.

    Attributes:
        weight: what is trained; its `grad` is full or projected.
        name: what messages call it.
        group: its parameter group.
        inner_group: the same as the rule sees it, in the step that is being made.
        state: its state in the optimizer.
        projection: how it is projected; the identity if it is not.
        local_projection: how what of it is in this process is projected.
        first: the place of that one's first number in the weight, for draws that depend on places.
        rule: what moves its coordinates, or itself.
        traits: what is known of the rule.
        through_coordinates: whether the rule moves coordinates, not the weight itself.
        dtype: of the coordinates.
        rounding: how its update is rounded into it.
        seed: of the optimizer's random numbers.
        place: its place among all weights.
        index: its place among the projected weights.
        turn: its offset within the gap.
        outcomes: of the renewals of all weights.
        is_kept: whether the optimizer holds the state; until its first step a weight keeps it for itself.
        is_resumed: whether there was a state before this was known of the weight, as of a checkpoint.
        counters: of all projected weights on the device, one for each: how many gradients were not finite.
        slot: which of them is the weight's.
        is_plain: whether its update is added to it as it is: it is a plain tensor, and not rounded in a way of ours.
        side: the projected side of a plain weight that is a matrix and has one, as nearly all have; None for all else.
        drops_factors: whether its factors are made for each step, since what is stored takes less memory.
    """

    weight: Tensor
    name: str
    group: dict[str, Any]
    state: dict[str, Any]
    projection: Projection
    rule: Rule
    traits: Traits
    through_coordinates: bool
    dtype: torch.dtype
    rounding: Rounding
    seed: int
    place: int
    index: int
    turn: int
    outcomes: Outcomes = field(default_factory=Outcomes)
    inner_group: dict[str, Any] = field(default_factory=dict)
    is_kept: bool = False
    counters: Tensor | None = None
    slot: int = 0
    storage: Storage = field(init=False)
    coordinate_count: int = field(init=False)
    is_plain: bool = field(init=False)
    side: str | None = field(init=False)
    drops_factors: bool = field(init=False)
    local_projection: Projection = field(init=False)
    first: int = field(init=False, default=0)
    _read: tuple[Any, Basis] = field(init=False, default=(None, {}))
    _factors: Basis | None = field(init=False, default=None)
    _pair: Sequence[Any] | None = field(init=False, default=None)
    is_resumed: bool = field(init=False)

    def __post_init__(self) -> None:
        self.local_projection = self.projection
        self.is_resumed = self.is_kept
        self.storage = storage_in(self.group)
        self.coordinate_count = torch.Size(self.projection.projected_shape).numel()
        self.is_plain = type(self.weight) in (Tensor, torch.nn.Parameter) and self.rounding == "nearest"
        self.side = self.projection.one_side if self.is_plain else None
        self.drops_factors = self.storage.bits < 16

    def is_current(self, state: Any) -> bool:
        """Whether what the optimizer holds of the weight is still this state.

        Args:
            state: what it holds; None for nothing.
        """
        return state is self.state or (state is None and not self.is_kept)

    @property
    def grad(self) -> Tensor:
        """The weight's gradient, full or projected."""
        assert self.weight.grad is not None
        return self.weight.grad

    def prepare_state(self) -> None:
        """Creates all keys and shapes of the state, so that they exist after any first step."""
        if self.projection.modes and OVERLAPS not in self.state:  # as in checkpoints of older versions, too
            self.state[GAP] = self.group["update_proj_gap"]
            self.state[OVERLAPS] = torch.zeros(self.group["queue_size"], device=self.weight.device)
        if self.projection.modes and CAPTURED not in self.state:
            self.state[CAPTURED] = torch.zeros((), device=self.weight.device)
        if self.rounding == "compensated" and COMPENSATION not in self.state:
            self.state[COMPENSATION] = torch.zeros_like(self.weight)
        prepare_residual(self)
        if STEP in self.state or not self.through_coordinates:
            if self.projection.modes:
                self.state.setdefault(LACKING, 0)
            return
        self.state[STEP] = 0
        if self.projection.modes:
            self.state[RENEWALS], self.state[RENEWED_STEP], self.state[LACKING] = 0, -1, 0
            counters = self.counters
            if counters is None:
                counters = torch.zeros(1, dtype=torch.int64, device=self.weight.device)
            self.state[NONFINITE] = counters[self.slot]
            dtype, device = self.weight.dtype, self.weight.device
            shapes = self.projection.factor_shapes
            self._keep({name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()})

    def _keep(self, basis: Basis) -> None:
        self.state[BASIS] = self.held_basis(self.storage.store(basis))

    def decompose(self, grad: Tensor, old: Basis | None = None) -> dict[str, Tensor] | None:
        """The basis that is found from a gradient. It changes nothing.

        The random numbers depend on the seed, on `index` and on the number of the renewal alone.

        Args:
            grad: the weight's, full, finite and not zero; or the sketch of one.
            old: the basis in use until now, where that has been read already.

        Returns:
            The factors by mode, of the weight's dtype; None if the decomposition failed.
        """
        start = time.perf_counter()
        try:
            basis = find_basis(self.projection, grad, fills=self.completes_basis, **self._asked(old))
            if devices.runs_ahead(grad) and not all(bool(factor.isfinite().all()) for factor in basis.values()):
                raise torch.linalg.LinAlgError("it is not finite")  # type: ignore[attr-defined]
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            self.warn_of_failure(error)
            return None
        found = {name: factor.to(self.weight.dtype) for name, factor in basis.items()}
        self.outcomes.seconds += time.perf_counter() - start
        return found

    def warn_of_failure(self, why: object) -> None:
        """Warns that no basis was found, so that there is the one before.

        Args:
            why: the error, or a description of what was found.
        """
        warn(f"{self.name} keeps its basis for now: the decomposition failed ({why})")

    def sketch(self, grad: Tensor) -> Tensor:
        """What `decompose` takes in a gradient's place where `renews_from_sketch`: linear in it, of one dimension.

        Args:
            grad: the weight's, full.
        """
        return sketch(self.projection, grad, seed=self._asked()["seed"])

    def as_stored(self, factors: Basis) -> Basis:
        """A basis as the state would hold it.

        Args:
            factors: by mode, of the weight's dtype.

        Returns:
            The same ones; in few bits what is left of them.
        """
        return TrainedWeight.read_basis(self, self.storage.store(factors))

    def find_basis(self) -> Basis | None:
        """The basis found from the gradient, as the state would hold it; None if the decomposition failed."""
        found = self.decompose(self.grad)
        return None if found is None else self.as_stored(found)

    def _asked(self, old: Basis | None = None) -> dict[str, Any]:
        """What is asked of a decomposition."""
        return {
            "decomposition": self.group["decomposition"],
            "seed": key_of(self.seed, self.index, self.state[RENEWALS]),
            "old": (old or self.basis) if self.state[RENEWALS] else None,
            "old_is_whole": self.state[LACKING] == 0,
        }

    def find_unread(self) -> tuple[Basis, Found]:
        """The basis found from the gradient, or the one there is where that tells none, and nothing is read back.

        Returns:
            It, as the state would hold it, and which of both it is.
        """
        start = time.perf_counter()
        grad = self.grad
        if isinstance(grad, ProjectedGradient):
            usable = is_usable(grad.projected)
            return grad.basis, Found(usable=usable, renewed=usable, partly=torch.zeros_like(usable))
        completes, usable = self.state[LACKING] < 0, is_usable(grad)
        basis, finite, partly = find_unread(self.projection, grad, completes=completes, **self._asked())
        renewed = usable & finite if completes else usable & finite & ~partly
        stored = self.storage.store({name: factor.to(self.weight.dtype) for name, factor in basis.items()})
        chosen = tree_map(functools.partial(torch.where, renewed), stored, self.state[BASIS])
        self.outcomes.seconds += time.perf_counter() - start
        shapes, dtype = self.projection.factor_shapes, self.weight.dtype
        return self.storage.read(chosen, shapes, dtype), Found(usable=usable, renewed=renewed, partly=partly)

    def renew(self) -> None:
        """Takes the basis that the gradient brings, or finds one from the full gradient."""
        grad = self.grad
        basis = grad.basis if isinstance(grad, ProjectedGradient) else self.find_basis()
        if basis is not None:
            self.take(basis)

    def take(self, basis: Basis, found: Found | None = None) -> None:
        """Puts a new basis in the old one's place, and notes what of it is still to be found.

        A basis that lacks directions is filled up from the next gradients, as long as they bring any; a matrix of a
        stack that has none at all waits for its first gradient, however long.

        Args:
            basis: as `as_stored` gives it.
            found: whether it is a new one at all, where only the device knows; then nothing is read back.
        """
        state, completes_basis, old = self.state, self.completes_basis, self.basis
        before = {key: state[key] for key in (RENEWALS, RENEWED_STEP, LACKING)}
        if state[RENEWALS] and not completes_basis:
            self._compare(basis, old, found)
        if found is None and (not state[RENEWALS] or state[LACKING]):  # what is whole stays so, and is not read back
            most = abs(state[LACKING]) if state[RENEWALS] else self.projection.basis_columns
            missing, some_lack_all = lacking(basis)
            state[LACKING] = missing if missing < most or some_lack_all else -missing
        if state[RENEWALS]:
            carry(self, old, basis, None if found is None else found.renewed)
        self._keep(basis)
        if not (state[RENEWALS] and completes_basis):
            state[RENEWALS] += 1
            state[RENEWED_STEP] = state[STEP]
        if found is not None:
            told = [found.usable, found.renewed, found.partly, *count_lacking(basis).unbind(), state[OVERLAPS].mean()]
            self.outcomes.expect(self, before, torch.stack([one.to(torch.float64) for one in told]))

    def _compare(self, basis: Basis, old: Basis, found: Found | None) -> None:
        """Notes how much of the subspace is left in the next, and adapts a lazy layer's gap to it.

        And how much of the gradient the old one still held: one product more, beside a decomposition. Only a lazy
        layer reads anything back from the device, and only where as many as are averaged are known.
        """
        group, state = self.group, self.state
        noted = torch.cat((state[OVERLAPS], overlap(basis, old).to(state[OVERLAPS].dtype).reshape(1)))
        noted, captured = noted[-group["queue_size"] :].clone(), self.captured(old).to(torch.float32)
        if found is not None:
            noted = torch.where(found.renewed, noted, state[OVERLAPS])
            captured = torch.where(found.renewed, captured, state[CAPTURED])
        state[OVERLAPS], state[CAPTURED] = noted, captured
        if found is None and self.is_lazy and state[RENEWALS] >= group["queue_size"]:
            self.adapt_gap(float(noted.mean()), state[RENEWALS])

    def captured(self, basis: Basis) -> Tensor:
        """The share of the gradient's energy that a basis holds.

        Args:
            basis: the factors.
        """
        return captured_energy(self.projection, self.grad, basis)

    def inner_grad(self) -> Tensor:
        """What the rule gets as gradient: R = P^T G, with L2 decay R = P^T (G + decay * W); G itself without one."""
        grad = self.grad
        if not self.through_coordinates:
            return grad
        if type(grad) is ProjectedGradient:
            projected = grad.projected_by(self.projection, self.basis)
        else:
            projected = self.project_plain(grad) if self.is_plain else self.project(grad)
        if projected.dtype is not self.dtype:
            projected = projected.to(self.dtype)
        if self.traits.decay == "l2" and (decay := self.group.get("weight_decay", 0)) != 0:
            sign = -1 if self.group.get("maximize") else 1
            projected = projected.add(self.project(self.local), alpha=sign * decay)
        return projected
