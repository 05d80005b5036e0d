"""Under FSDP2: arithmetic is on this process' part of each weight, and the rule's state is cut as the weight is.

Bases are whole in all processes. An owner finds one from the whole gradient, which is gathered to it alone.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from galore_torch.distributed.agreement import require_agreement
from galore_torch.distributed.by_element import moves_parts
from galore_torch.distributed.cut import Cut
from galore_torch.distributed.owners import renew_together
from galore_torch.optim.galore import GaLore
from galore_torch.optim.inner_group import moves_at_rate_one
from galore_torch.optim.processes import Alone
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.state_keys import COMPENSATION, INNER
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.projection import Basis, Projection


def shard(trained: TrainedWeight, optimizer: GaLore) -> ShardedWork:
    """The work on a DTensor.

    Args:
        trained: on it as if it were whole.
        optimizer: that holds it; it is told of the processes.

    Raises:
        ValueError: a placement that is not supported, or not with its rounding.
    """
    assert isinstance(trained.weight, DTensor)
    if moves_at_rate_one(trained.group):
        raise ValueError(
            f"residual is {trained.group['residual']!r} and normalize is {trained.group['normalize']!r}, which look at "
            f"whole columns, and a process has a part of {trained.name}; use None for both, or DDP"
        )
    cut = Cut.of(trained.weight, trained.name)
    if trained.rounding == "stochastic" and cut.axis:
        raise ValueError(
            f"rounding='stochastic' does not work for {trained.name}, which is cut along axis {cut.axis}, for draws "
            "depend on the places of numbers; cut it along its first (no shard_placement), or use 'compensated'"
        )
    if not isinstance(optimizer._processes, Shards):
        optimizer._processes = Shards(optimizer, cut.group)
    return ShardedWork.of(trained, cut)


@dataclass(slots=True, kw_only=True)
class ShardedWork(TrainedWeight):
    """One weight of which each process holds a part.

    Attributes:
        cut: which part.
        part_projection: how it is projected.
        is_contracted: whether projected gradients are parts of a sum.
        is_gathered: whether the rule moves tensors as wholes, so that every process gets all of what it is to move.
    """

    cut: Cut
    part_projection: Projection
    is_contracted: bool
    is_gathered: bool

    @classmethod
    def of(cls, trained: TrainedWeight, cut: Cut) -> ShardedWork:
        """The same work on a part.

        Args:
            trained: on the whole weight.
            cut: which part.
        """
        given = {one.name: getattr(trained, one.name) for one in fields(trained) if one.init}
        projection = cut.projection(trained.projection)
        contracted = cut.is_contracted(trained.projection)
        gathered = not cut.is_whole and not moves_parts(trained, cut)
        return cls(**given, cut=cut, part_projection=projection, is_contracted=contracted, is_gathered=gathered)

    @property
    def grad(self) -> Tensor:
        """This process' part of the gradient."""
        grad = self.weight.grad
        assert grad is not None
        if isinstance(grad, ProjectedGradient):
            return ProjectedGradient(_part(grad.projected), grad.projection, grad.basis, grad.dtype)
        part: Tensor = _part(grad)
        return part

    @property
    def local(self) -> Tensor:
        """This process' part of the weight."""
        part: Tensor = _part(self.weight)
        return part

    @property
    def local_projection(self) -> Projection:
        """How that is projected."""
        return self.part_projection

    @property
    def factors(self) -> Basis:
        """What of the basis this process' part needs."""
        if self._factors is None:
            self._factors = self.cut.factors(self.projection, self.basis)
        return self._factors

    @property
    def local_compensation(self) -> Tensor:
        """What rounding has cut off so far of this process' part."""
        part: Tensor = _part(self.state[COMPENSATION])
        return part

    @property
    def first(self) -> int:
        """The place of its first number in the weight."""
        return self.cut.start * math.prod(self.weight.shape[1:])

    def lent(self) -> Tensor:
        """The weight as the rule moves it: this process' part, or a copy of all parts."""
        return self.cut.gather_to_all(self.local) if self.is_gathered else self.local

    def given_back(self, moved: Tensor) -> Tensor:
        """This process' part of a tensor that the rule has moved."""
        if not self.is_gathered:
            return moved
        if self.is_contracted:
            return moved
        part = self.cut.part_of(moved)
        return part if self.through_coordinates else self.local.copy_(part)

    def number(self, found: Any) -> Any:
        """A number that was found from the weight: of all of it."""
        return found.full_tensor() if isinstance(found, DTensor) else found

    def project(self, tensor: Tensor) -> Tensor:
        """The projection of this process' part of a tensor; of all of it where the projections of parts are summed."""
        projected = self.part_projection.project(tensor, self.factors)
        if self.is_contracted:
            dist.all_reduce(projected, group=self.cut.group)
        return projected

    def inner_grad(self) -> Tensor:
        """What the rule gets as gradient: of this process' part, or of all."""
        projected = TrainedWeight.inner_grad(self)
        return self.cut.gather_to_all(projected) if self.is_gathered and not self.is_contracted else projected

    def captured(self, basis: Basis) -> Tensor:
        """The share of the gradient's energy that a basis holds, in all processes together."""
        grad = self.grad
        projected = self.part_projection.project(grad, self.cut.factors(self.projection, basis))
        if self.is_contracted:
            dist.all_reduce(projected, group=self.cut.group)
        energies = torch.stack([one.double().square().sum() for one in (projected, grad)])
        if not self.cut.is_whole:
            dist.all_reduce(energies, group=self.cut.group)
        inside, whole = energies.unbind()
        return inside / whole / (dist.get_world_size(self.cut.group) if self.is_contracted else 1)

    def of_stack(self, matrices: Tensor) -> Tensor:
        """Those of this process' part of a stack, where that is what is cut and the state is cut with it."""
        is_cut = matrices.dim() > 2 and not self.is_gathered and self.cut.axis < len(self.projection.view_shape) - 2
        return matrices.narrow(self.cut.axis, self.cut.start, self.cut.length) if is_cut else matrices

    def opened(self, inner: Any) -> Any:
        """The rule's state of this process' part."""
        return {
            key: self.opened(value)
            if isinstance(value, dict)
            else self.cut.unwrap(value)
            if self._is_cut(key, value, self._whole_shape)
            else value
            for key, value in inner.items()
        }

    def closed(self, inner: Any) -> Any:
        """The rule's state, of which each process holds a part."""
        return self._closed(inner, self.state.get(INNER, {}))

    def _closed(self, inner: Any, held: Any) -> Any:
        if held.keys() == inner.keys() and all(_part(held[key]) is value for key, value in inner.items()):
            return held
        return {
            key: self._closed(value, held.get(key, {}))
            if isinstance(value, dict)
            else self.cut.wrap(value, self._whole_of(value))
            if self._is_cut(key, value, self._part_shape)
            else value
            for key, value in inner.items()
        }

    def _is_cut(self, key: str, value: Any, shape: tuple[int, ...]) -> bool:
        """Whether each process has a part of an entry of the rule's state, which is of the weight's shape then."""
        if not isinstance(value, Tensor) or not value.dim() or not shape:
            return False
        if self.is_gathered or (self.is_contracted and self.through_coordinates):
            return False
        return key not in self.traits.common if self.traits.block else tuple(value.shape) == shape

    def _whole_of(self, part: Tensor) -> tuple[int, ...]:
        if tuple(part.shape) == self._part_shape:
            return self._whole_shape
        return part.shape[0] * dist.get_world_size(self.cut.group), *part.shape[1:]

    @property
    def _whole_shape(self) -> tuple[int, ...]:
        return self.projection.projected_shape if self.through_coordinates else tuple(self.weight.shape)

    @property
    def _part_shape(self) -> tuple[int, ...]:
        return self.part_projection.projected_shape if self.through_coordinates else tuple(self.local.shape)


def _part(value: Any) -> Any:
    return value._local_tensor if isinstance(value, DTensor) else value


class Shards(Alone):
    """Processes that hold parts of each weight.

    Args:
        optimizer: of this process.
        group: the processes.
    """

    def __init__(self, optimizer: GaLore, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self._optimizer = weakref.proxy(optimizer)
        self._agreed = False

    def require(self, seed: int) -> None:
        """Checks, before the first step, that all processes were given the same."""
        del seed  # one thing of many
        if not self._agreed:
            require_agreement(self._optimizer, {}, self.group)
            self._agreed = True

    def agree(self, found: Tensor) -> Tensor:
        """The largest value that a process has found: a gradient that is not finite in one part is so for all."""
        largest = found.to(torch.int32) if found.dtype is torch.bool else found
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest.to(found.dtype)

    def renew(self, trained: Sequence[TrainedWeight]) -> None:
        """Renews bases, each found by one process."""
        renew_together(trained, self.group, _gather)


def _gather(one: TrainedWeight, owner: int) -> Tensor | None:
    return one.cut.gather(one.grad, owner) if isinstance(one, ShardedWork) else one.grad
