"""Which part of a sharded weight this process holds, and what follows for its projected gradient and its basis.

A weight is cut along one axis. Where this axis is projected (left basis, rows cut) each process' projected gradient is
a part of a sum, and coordinates are whole in all of them; where it is not (right basis, rows cut) projected gradient
and coordinates are cut as the weight is, and nothing is sent. Shape suffixes: d, r rows and columns of a factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from galore_torch.projection import Basis, Mode, Projection


@dataclass(frozen=True)
class Cut:
    """How one weight is cut.

    Attributes:
        mesh: the processes.
        dimension: of the mesh, along which the weight is cut.
        axis: of the weight, which is cut.
        start: where this process' part begins.
        length: of it; 0 in a process that has none.
        size: of the axis, whole.
        part: how many each process has, but for the last ones.
        is_whole: whether every process holds all of the weight.
    """

    mesh: Any
    dimension: int
    axis: int
    start: int
    length: int
    size: int
    part: int
    is_whole: bool

    @classmethod
    def of(cls, weight: DTensor, name: str) -> Cut:
        """How a weight is cut.

        Args:
            weight: the weight.
            name: what messages call it.

        Raises:
            ValueError: it is cut along more axes than one, or in another way than `fully_shard` does.
        """
        mesh = weight.device_mesh
        cuts = [(at, placement) for at, placement in enumerate(weight.placements) if not placement.is_replicate()]
        if len(cuts) > 1 or any(type(placement) is not Shard for _, placement in cuts):
            raise ValueError(
                f"{name} has placements {weight.placements}; use weights that are cut along one axis (Shard), as "
                "fully_shard cuts them, without tensor parallelism"
            )
        dimension, axis = (cuts[0][0], cuts[0][1].dim) if cuts else (0, 0)  # type: ignore[attr-defined]
        size = weight.shape[axis]
        if not cuts:
            return cls(mesh, dimension, axis, 0, size, size, size, True)
        part = -(-size // mesh.size(dimension))
        start = min(size, part * mesh.get_local_rank(dimension))
        return cls(mesh, dimension, axis, start, min(part, size - start), size, part, False)

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes that hold its parts."""
        group: dist.ProcessGroup = self.mesh.get_group(self.dimension)
        return group

    def projection(self, whole: Projection) -> Projection:
        """How this process' part is projected.

        Args:
            whole: how the weight is.

        Raises:
            ValueError: `layout="reshape"` of a weight that is cut along another axis than its first.
        """
        if whole.view_shape != whole.shape and self.axis != 0:
            raise ValueError(
                f"a weight of shape {whole.shape} is flattened (layout='reshape') and cut along axis {self.axis}; cut "
                "it along its first"
            )
        modes = tuple(
            Mode(mode.name, mode.axis, self.length, mode.rank) if mode.axis == self._at(whole) else mode
            for mode in whole.modes
        )
        return Projection(self._cut(whole.shape), self._cut(whole.view_shape), modes)

    def is_contracted(self, whole: Projection) -> bool:
        """Whether the axis that is cut is projected, so that projected gradients are parts of a sum."""
        return not self.is_whole and any(mode.axis == self._at(whole) for mode in whole.modes)

    def factors(self, whole: Projection, basis: Basis) -> dict[str, Tensor]:
        """What of a whole basis this process' part of the weight needs.

        Args:
            whole: how the weight is projected.
            basis: its factors.
        """
        return {mode.name: self._factor(whole, mode, basis[mode.name]) for mode in whole.modes}

    def _factor(self, whole: Projection, mode: Mode, factor: Tensor) -> Tensor:
        if mode.axis == self._at(whole):
            return factor.narrow(-2, self.start, self.length)
        stacked = not whole.is_tucker and self._at(whole) < -2
        return factor.narrow(self.axis, self.start, self.length) if stacked else factor

    def _at(self, whole: Projection) -> int:
        return self.axis - len(whole.view_shape)

    def _cut(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[: self.axis], self.length, *shape[self.axis + 1 :])

    def wrap(self, part: Tensor, shape: tuple[int, ...]) -> DTensor:
        """A tensor that is cut as the weight is.

        Args:
            part: this process' part.
            shape: of all of it.
        """
        placements = [Replicate() for _ in range(self.mesh.ndim)]
        if not self.is_whole:
            placements[self.dimension] = Shard(self.axis)  # type: ignore[call-overload]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(part, self.mesh, placements, shape=torch.Size(shape), stride=stride, run_check=False)

    def unwrap(self, tensor: Tensor) -> Tensor:
        """This process' part of a tensor that is cut as the weight is, or that is whole."""
        if isinstance(tensor, DTensor):
            wanted = self.wrap(tensor.to_local(), tuple(tensor.shape)).placements
            with torch.no_grad():
                return (
                    tensor.redistribute(placements=wanted).to_local()
                    if tensor.placements != wanted
                    else tensor.to_local()
                )
        return self.part_of(tensor)

    def part_of(self, tensor: Tensor) -> Tensor:
        """This process' part of a whole tensor; an equal one, where that is of another size than the weight."""
        start, length = self.start, self.length
        if tensor.shape[self.axis] != self.size:
            length = tensor.shape[self.axis] // dist.get_world_size(self.group)
            start = length * dist.get_rank(self.group)
        return tensor.narrow(self.axis, start, length).contiguous()

    def gather(self, part: Tensor, owner: int) -> Tensor | None:
        """A tensor from its parts.

        Args:
            part: this process' part of one that is cut as the weight is.
            owner: the number of the process that gets it.

        Returns:
            All of it; None in the other processes.
        """
        if self.is_whole:
            return part
        padded = self._padded(part)
        parts = self._room(padded) if dist.get_rank(self.group) == owner else None
        dist.gather(padded, parts, group_dst=owner, group=self.group)
        return None if parts is None else self._joined(parts)

    def gather_to_all(self, part: Tensor) -> Tensor:
        """The same in all processes."""
        if self.is_whole:
            return part
        padded = self._padded(part)
        parts = self._room(padded)
        dist.all_gather(parts, padded, group=self.group)
        return self._joined(parts)

    def reduce(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Begins to add up a tensor over the processes, of which each gets its part.

        Args:
            tensor: whole, of this process.

        Returns:
            This process' part of the sum, once what comes with it has been waited for.
        """
        whole = tensor.new_zeros((self.part * dist.get_world_size(self.group), *tensor.movedim(self.axis, 0).shape[1:]))
        whole[: self.size] = tensor.movedim(self.axis, 0)
        part = tensor.new_empty((self.part, *whole.shape[1:]))
        handle = dist.reduce_scatter_tensor(part, whole, group=self.group, async_op=True)
        return part.movedim(0, self.axis).narrow(self.axis, 0, self.length), handle

    def _padded(self, part: Tensor) -> Tensor:
        """A part of the size of the longest, which collectives want."""
        padded = part.new_zeros((*part.shape[: self.axis], self.part, *part.shape[self.axis + 1 :]))
        padded.narrow(self.axis, 0, self.length).copy_(part)
        return padded

    def _room(self, padded: Tensor) -> list[Tensor]:
        return [torch.empty_like(padded) for _ in range(dist.get_world_size(self.group))]

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, self.axis).narrow(self.axis, 0, self.size).contiguous()
