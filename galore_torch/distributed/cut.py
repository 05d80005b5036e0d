"""How weights are cut under FSDP2: `shard_placement` says how, and `Cut` what follows for projected gradient and basis.

A weight is cut along one axis. Where this axis is projected (left basis, rows cut) each process' projected gradient is
a part of a sum, and coordinates are whole in all of them; where it is not (right basis, rows cut) projected gradient
and coordinates are cut as the weight is, and nothing is sent. Shape suffixes: d, r rows and columns of a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from galore_torch.group_keys import PROJECTED_DEFAULTS
from galore_torch.lowbit import StoredBasis
from galore_torch.optim.groups import is_projected, projection_in
from galore_torch.projection import Basis, Mode, Projection
from galore_torch.targets import param_groups


def shard_placement(model: nn.Module, world_size: int, **settings: Any) -> Callable[[nn.Parameter], Shard | None]:
    """A `shard_placement_fn` that cuts each projected weight along an axis that is not projected.

    Projected gradients, coordinates and the optimizer's state are then cut as the weight is. `fully_shard` cuts along
    another axis than the first only evenly; a weight for which that does not come out even is cut along its first, and
    an ordinary step sums its projected gradient over processes (rank x columns numbers).

    Args:
        model: the model, before it is sharded.
        world_size: of how many processes each weight is cut into.
        **settings: those of `param_groups`, as they will be given to it.

    Returns:
        What `fully_shard` takes.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 64))
        >>> place = shard_placement(model, 2, rank=4, target_modules="all-linear")
        >>> place(model[0].weight), place(model[1].weight)
        (Shard(dim=1), None)
    """
    axes = {
        id(weight): _free_axis(projection_in({**PROJECTED_DEFAULTS, **group}, weight), world_size)
        for group in filter(is_projected, param_groups(model, **settings))
        for weight in group["params"]
    }
    placements = {key: Shard(axis) for key, axis in axes.items() if axis}
    return lambda weight: placements.get(id(weight))


def _free_axis(projection: Projection, world_size: int) -> int:
    """The first axis that is not projected and can be cut; the first of all where there is none."""
    shape = projection.shape
    projected = {mode.axis + len(shape) for mode in projection.modes}
    free = [axis for axis in range(len(shape)) if axis not in projected and (not axis or shape[axis] % world_size == 0)]
    return free[0] if free and projection.view_shape == shape else 0


class GatheredBasis(StoredBasis):
    """A basis of which each process keeps a part. A factor is gathered each time it is read, and kept by no one.

    Args:
        parts: the factors by mode.
    """

    def __init__(self, parts: Mapping[str, DTensor]) -> None:
        self.parts, self.bits = parts, 0  # of no storage: what is kept of it is made anew
        self.stored = {name: {"part": part._local_tensor} for name, part in parts.items()}

    def __getitem__(self, name: str) -> Tensor:
        """The factor of a mode, gathered anew: every process must ask for it."""
        return self.parts[name].full_tensor()


@dataclass(frozen=True)
class Cut:
    """How one weight is cut.

    Attributes:
        mesh: the processes.
        placements: of the weight, along each dimension of the mesh.
        dimension: of the mesh, along which the weight is cut.
        axis: of the weight, which is cut.
        size: of the axis, whole.
        start: where this process' part begins.
        length: of it; 0 in a process that has none.
        whole: how the weight is projected.
    """

    mesh: Any
    placements: tuple[Any, ...]
    dimension: int
    axis: int
    size: int
    start: int
    length: int
    whole: Projection

    @classmethod
    def of(cls, weight: DTensor, projection: Projection, name: str) -> Cut:
        """How a weight is cut.

        Args:
            weight: the weight.
            projection: how it is projected.
            name: what messages call it.

        Raises:
            ValueError: it is cut along more axes than one, or in another way than `fully_shard` does, or along another
                than its first and flattened.
        """
        mesh, placements = weight.device_mesh, tuple[Any, ...](weight.placements)
        cuts = [dimension for dimension, placement in enumerate(placements) if not placement.is_replicate()]
        if len(cuts) > 1 or any(type(placements[dimension]) is not Shard for dimension in cuts):
            raise ValueError(
                f"{name} has placements {placements}; use weights that are cut along one axis (Shard), as fully_shard "
                "cuts them, without tensor parallelism"
            )
        dimension, axis = (cuts[0], placements[cuts[0]].dim) if cuts else (0, 0)
        if projection.view_shape != projection.shape and axis != 0:
            raise ValueError(
                f"{name} of shape {projection.shape} is flattened (layout='reshape') and cut along axis {axis}; cut it "
                "along its first"
            )
        size, length = weight.shape[axis], weight._local_tensor.shape[axis]
        start = min(size, -(-size // mesh.size(dimension)) * mesh.get_local_rank(dimension)) if cuts else 0
        return cls(mesh, placements, dimension, axis, size, start, length, projection)

    @cached_property
    def is_whole(self) -> bool:
        """Whether every process holds all of the weight."""
        return all(placement.is_replicate() for placement in self.placements)

    @cached_property
    def is_contracted(self) -> bool:
        """Whether the axis that is cut is projected, so that projected gradients are parts of a sum."""
        return not self.is_whole and any(mode.axis == self._at for mode in self.whole.modes)

    @property
    def _at(self) -> int:
        return self.axis - len(self.whole.view_shape)

    @property
    def group(self) -> Any:
        """The processes that hold its parts."""
        return self.mesh.get_group(self.dimension)

    @property
    def projection(self) -> Projection:
        """How this process' part is projected."""
        whole, axis = self.whole, self.axis
        shape, view_shape = ((*one[:axis], self.length, *one[axis + 1 :]) for one in (whole.shape, whole.view_shape))
        modes = [replace(mode, size=self.length) if mode.axis == self._at else mode for mode in whole.modes]
        return Projection(shape, view_shape, tuple(modes))

    def factors(self, basis: Basis) -> dict[str, Tensor]:
        """What of a whole basis this process' part of the weight needs.

        Args:
            basis: its factors.
        """
        factors = {}
        for mode in self.whole.modes:
            axis = self._axis_of(mode)
            if axis is not None and isinstance(basis, GatheredBasis):
                factors[mode.name] = basis.parts[mode.name]._local_tensor
                continue
            factor = basis[mode.name]
            factors[mode.name] = factor if axis is None else factor.narrow(axis, self.start, self.length)
        return factors

    def divide(self, basis: Basis) -> dict[str, Tensor]:
        """A basis of which each process keeps a part: what it needs of it, or an equal share where it needs all.

        Args:
            basis: its factors, whole.
        """
        divided: dict[str, Tensor] = {}
        for mode in self.whole.modes:
            axis = self._axis_of(mode)
            factor = self._placed(basis[mode.name], Replicate())
            placements: list[Any] = [Replicate()] * self.mesh.ndim
            placements[self.dimension] = Shard(factor.dim() - 2 if axis is None else axis % factor.dim())
            part = factor.redistribute(placements=placements)
            part._local_tensor = part._local_tensor.clone()  # a view would keep all of it
            divided[mode.name] = part
        return divided

    def _axis_of(self, mode: Mode) -> int | None:
        """The axis of a factor of which this process' part of the weight needs a part alone; None if it needs all."""
        is_stacked = not self.whole.is_tucker and self._at < -2
        return -2 if mode.axis == self._at else self.axis if is_stacked else None

    def wrap(self, part: Tensor) -> DTensor:
        """A tensor that is cut as the weight is, from this process' part; in equal parts if it is of another size."""
        axis, length = self.axis, part.shape[self.axis]
        size = self.size if length == self.length else length * self.mesh.size(self.dimension)
        whole = torch.empty((*part.shape[:axis], size, *part.shape[axis + 1 :]), device="meta")
        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    @torch.no_grad()
    def part_of(self, tensor: Tensor) -> Tensor:
        """This process' part, as of the weight, of a tensor that is whole or a DTensor."""
        placed = tensor if isinstance(tensor, DTensor) else self._placed(tensor, Replicate())
        if placed.placements == self.placements:
            return placed._local_tensor.contiguous()
        return placed.redistribute(placements=self.placements).to_local().contiguous()

    def reduce(self, tensor: Tensor, *, for_all: bool = False) -> DTensor:
        """Begins to add up a tensor over the processes; what reads the sum waits for it.

        Args:
            tensor: this process', of all of the weight.
            for_all: whether each process gets all of the sum.

        Returns:
            The sum; otherwise of projected gradients, cut as the weight is, or whole where the projected axis is cut.
        """
        placements = [Replicate()] * self.mesh.ndim if for_all or self.is_contracted else self.placements
        return self._placed(tensor, Partial()).redistribute(placements=placements, async_op=True)

    def _placed(self, tensor: Tensor, placement: Any) -> DTensor:
        return DTensor.from_local(tensor, self.mesh, [placement] * self.mesh.ndim, run_check=False)
