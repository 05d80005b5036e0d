"""`shard_placement`: how `fully_shard` cuts weights so that no step need send anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.distributed.tensor import Shard

from galore_torch.optim.groups import is_projected
from galore_torch.projection import Projection
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
    placements: dict[int, Shard] = {}
    for group in param_groups(model, **settings):
        if not is_projected(group):
            continue
        for weight in group["params"]:
            axis = _free_axis(
                Projection.of(
                    weight.shape, group["rank"], group.get("proj_type", "std"), group.get("layout", "tucker")
                ),
                world_size,
            )
            if axis:
                placements[id(weight)] = Shard(axis)
    return lambda weight: placements.get(id(weight))


def _free_axis(projection: Projection, world_size: int) -> int | None:
    """The first axis that is not projected and can be cut; None for the first of all, or where there is none."""
    shape: Sequence[int] = projection.shape
    if projection.view_shape != projection.shape:
        return None
    projected = {mode.axis + len(shape) for mode in projection.modes}
    free = [axis for axis in range(len(shape)) if axis not in projected and (not axis or shape[axis] % world_size == 0)]
    return free[0] if free else None
