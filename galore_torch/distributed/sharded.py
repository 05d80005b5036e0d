"""Under FSDP2: arithmetic is on this process' part of each weight, and the rule's state is cut as the weight is.

Bases are whole in all processes, or each keeps a part (`shard_bases`). A rule gets a part where it moves each number,
or each block, by its own gradient, and else the whole, gathered in all processes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from galore_torch.distributed.cut import Cut, GatheredBasis
from galore_torch.distributed.processes import Together
from galore_torch.optim.galore import GaLore
from galore_torch.optim.inner_group import moves_at_rate_one
from galore_torch.optim.kinds import require_galore
from galore_torch.optim.processes import local_part, whole
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.rule import InnerParam, Rule
from galore_torch.optim.state_keys import BASIS, INNER
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.projection import Basis

STEPS, ROWS, COLUMNS = 12, 8, 6
"""By which it is tried whether a rule moves numbers by themselves."""


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
    cut = Cut.of(trained.weight, trained.projection, trained.name)
    if trained.rounding == "stochastic" and cut.axis:
        raise ValueError(
            f"rounding='stochastic' does not work for {trained.name}, which is cut along axis {cut.axis}, for draws "
            "depend on the places of numbers; cut it along its first (no shard_placement), or use 'compensated'"
        )
    if not isinstance(optimizer._processes, Together):
        optimizer._processes = Together(optimizer, cut.group)
    given = {one.name: getattr(trained, one.name) for one in fields(trained) if one.init}
    is_gathered = not cut.is_whole and not _moves_parts(trained, cut)
    return ShardedWork(**given, cut=cut, is_gathered=is_gathered, settings=optimizer._settings)


def shard_bases(optimizer: GaLore) -> None:
    """Has each process keep its part of every basis, under FSDP2, and gather the rest of it each time it is used.

    Bases then take as little memory in a process as weights do. Where the projected axis is the one that is cut a
    process needs its part alone; elsewhere a step gathers rank x d numbers of a weight, for the time until its update
    is folded in, and layers with `projected` or `fused` gradients gather them too. Call it in all processes, before
    the first step or between two.

    Args:
        optimizer: made after `fully_shard`.

    Raises:
        ValueError: no GaLore optimizer, no weight is projected, one that is is not sharded, or its basis is kept in few
            bits.

    Example:
        >>> from galore_torch import GaLoreAdamW, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16))
        >>> shard_bases(GaLoreAdamW(param_groups(model, rank=4, target_modules="all-linear")))
        Traceback (most recent call last):
        ...
        ValueError: 0.weight is not sharded, so that nothing of its basis could be; leave out shard_bases, or call \
fully_shard(model) before the optimizer is made
    """
    require_galore(optimizer)
    projected = [one for one in optimizer._checked_weights() if one.projection.modes]
    if not projected:
        raise ValueError("the optimizer projects no weight, so that there are no bases; give a group a rank")
    for one in projected:
        if not isinstance(one, ShardedWork):
            raise ValueError(
                f"{one.name} is not sharded, so that nothing of its basis could be; leave out shard_bases, or call "
                "fully_shard(model) before the optimizer is made"
            )
        if one.storage.bits != 16:
            raise ValueError(
                f"basis_bits is {one.storage.bits} for {one.name}, and codes are not divided among processes; use "
                "basis_bits=16, or leave out shard_bases"
            )
    optimizer._settings["shard_bases"] = True
    for one in projected:
        if BASIS in one.state:
            one._keep(dict(one.basis))
    optimizer._cache.changed()
    together: Any = optimizer._processes
    together.ask_again()


@dataclass(slots=True, kw_only=True)
class ShardedWork(TrainedWeight):
    """One weight of which each process holds a part.

    Attributes:
        cut: which part.
        is_gathered: whether the rule moves tensors as wholes, so that every process gets all of what it is to move.
        settings: of the optimizer.
    """

    cut: Cut
    is_gathered: bool
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        TrainedWeight.__post_init__(self)
        self.drops_factors = True
        self.local_projection = self.cut.projection
        self.first = self.cut.start * math.prod(self.weight.shape[1:])

    @property
    def grad(self) -> Tensor:
        """This process' part of the gradient."""
        grad = self.weight.grad
        if isinstance(grad, ProjectedGradient):
            return ProjectedGradient(local_part(grad.projected), grad.projection, grad.basis, grad.dtype)
        assert grad is not None
        return local_part(grad)

    @property
    def factors(self) -> Basis:
        """What of the basis this process' part needs."""
        if self._factors is None:
            self._factors = self.cut.factors(self.basis)
        return self._factors

    def read_basis(self, stored: Mapping[str, Any]) -> Basis:
        """The factors by mode, gathered each time they are asked for if each process has a part."""
        if all(isinstance(one, DTensor) for one in stored.values()):
            return GatheredBasis(stored)
        return TrainedWeight.read_basis(self, stored)

    def held_basis(self, stored: dict[str, Any]) -> dict[str, Any]:
        """What the optimizer holds of a basis: all of it, or this process' part."""
        basis = {name: whole(factor) for name, factor in stored.items()}
        return self.cut.divide(basis) if self.settings.get("shard_bases") else basis

    def take(self, basis: Basis, found: Any = None) -> None:
        """Puts a new basis in the old one's place, also in the gradient that has brought it."""
        TrainedWeight.take(self, basis, found)
        if isinstance(self.weight.grad, ProjectedGradient):
            self.weight.grad.basis = self.basis

    def lent(self) -> Tensor:
        """The weight as the rule moves it: this process' part, or a copy of all parts."""
        return self.weight.full_tensor() if self.is_gathered else self.local  # type: ignore[attr-defined]

    def given_back(self, moved: Tensor) -> Tensor:
        """This process' part of a tensor that the rule has moved."""
        if not self.is_gathered or self.cut.is_contracted:
            return moved
        part = self.cut.part_of(moved)
        return part if self.through_coordinates else self.local.copy_(part)

    def project(self, tensor: Tensor) -> Tensor:
        """The projection of this process' part of a tensor; of all of it where the projections of parts are summed."""
        return self._project(tensor, self.factors)

    def _project(self, tensor: Tensor, factors: Basis) -> Tensor:
        projected = self.local_projection.project(tensor, factors)
        if self.cut.is_contracted:
            dist.all_reduce(projected, group=self.cut.group)
        return projected

    def inner_grad(self) -> Tensor:
        """What the rule gets as gradient: of this process' part, or of all."""
        projected = TrainedWeight.inner_grad(self)
        if not self.is_gathered or self.cut.is_contracted:
            return projected
        return self.cut.wrap(projected).full_tensor()

    def captured(self, basis: Basis) -> Tensor:
        """The share of the gradient's energy that a basis holds, in all processes together."""
        grad = self.grad
        if isinstance(grad, ProjectedGradient):  # in the basis that its sketch told
            grad = self.local_projection.project_back(grad.projected, self.cut.factors(grad.basis))
        projected = self._project(grad, self.cut.factors(basis))
        energies = torch.stack([one.double().square().sum() for one in (projected, grad)])
        if not self.cut.is_whole:
            dist.all_reduce(energies, group=self.cut.group)
        inside, whole = energies.unbind()
        return inside / whole / (dist.get_world_size(self.cut.group) if self.cut.is_contracted else 1)

    def of_stack(self, matrices: Tensor) -> Tensor:
        """Those of this process' part of a stack, where that is what is cut and the state is cut with it."""
        is_cut = matrices.dim() > 2 and not self.is_gathered and self.cut.axis < len(self.projection.view_shape) - 2
        return matrices.narrow(self.cut.axis, self.cut.start, self.cut.length) if is_cut else matrices

    def opened(self, inner: Any) -> Any:
        """The rule's state of this process' part."""
        moved = self.projection.projected_shape if self.through_coordinates else self.weight.shape
        return self._mapped(inner, torch.Size(moved), self.cut.part_of)

    def closed(self, inner: Any) -> Any:
        """The rule's state, of which each process holds a part."""
        held = self.state.get(INNER, {})
        if _are_parts(inner, held):
            return held
        moved = self.local_projection.projected_shape if self.through_coordinates else self.local.shape
        return self._mapped(inner, torch.Size(moved), self.cut.wrap)

    def _mapped(self, inner: Any, moved: torch.Size, change: Callable[[Tensor], Tensor]) -> Any:
        """The rule's state, with those entries changed of which each process has a part: of the shape that it moves."""
        if self.is_gathered or (self.cut.is_contracted and self.through_coordinates):
            return inner
        in_blocks, common = self.traits.block is not None, self.traits.common

        def changed(key: Any, value: Any) -> Any:
            if isinstance(value, dict):
                return {name: changed(name, one) for name, one in value.items()}
            if not isinstance(value, Tensor):
                return tree_map(functools.partial(changed, None), value) if isinstance(value, list | tuple) else value
            is_cut = value.dim() and (key not in common if in_blocks else value.shape == moved)
            return change(value) if is_cut else value

        return changed(None, inner)


def _are_parts(inner: dict[str, Any], held: dict[str, Any]) -> bool:
    """Whether a state is this process' parts of another, to the object."""
    return inner.keys() == held.keys() and all(
        _are_parts(value, held[key]) if isinstance(value, dict) else value is local_part(held[key])
        for key, value in inner.items()
    )


def _moves_parts(trained: TrainedWeight, cut: Cut) -> bool:
    """Whether the rule of a weight moves parts of it as it would move the whole."""
    traits = trained.traits
    if traits.factor or traits.learning_rate:
        return False
    if traits.holds_in_few_bits is None:
        return _moves_by_element(trained.rule, len(trained.projection.projected_shape))
    parts = cut.mesh.size(cut.dimension)
    if traits.block is None or cut.axis or cut.size % parts:
        return False
    numbers = trained.coordinate_count if trained.through_coordinates else trained.weight.numel()
    in_few_bits = traits.holds_in_few_bits
    return numbers // parts % traits.block == 0 and in_few_bits(numbers) == in_few_bits(numbers // parts)


@functools.lru_cache(maxsize=32)
def _moves_by_element(rule: Rule, dimensions: int) -> bool:
    """Whether moving the halves of a tensor is moving it, by trying."""
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, COLUMNS, *(2,) * (dimensions - 2)) if dimensions > 1 else (ROWS,)
    start, *grads = (torch.randn(shape, generator=generator) for _ in range(STEPS + 1))

    def moved(parts: int) -> Tensor:
        own, group = rule.on_cpu(), dict(rule.defaults)
        params = [InnerParam(tensor=one.clone(), grad=one, state={}, group=group) for one in start.chunk(parts)]
        for grad in grads:
            for one, part in zip(params, grad.chunk(parts), strict=True):
                one.grad = part.clone()
            group.update(own.step(params)[id(group)])
        return torch.cat([one.tensor for one in params])

    try:
        with torch.no_grad():
            return torch.allclose(moved(2), moved(1), rtol=1e-5, atol=1e-6)
    except Exception:  # whatever a foreign optimizer raises on so small a tensor
        return False
