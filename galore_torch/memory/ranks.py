"""What each of several processes needs of memory: from what one needs, by what DDP and FSDP2 keep and divide."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from galore_torch.distributed.traffic import IN_FLIGHT
from galore_torch.memory.copies import alike_blocks
from galore_torch.memory.links import BUCKET_BYTES, SentWeight
from galore_torch.memory.plan import MemoryPlan
from galore_torch.memory.rehearsal import Job, prepared
from galore_torch.optim import GaLore
from galore_torch.optim.groups import is_projected, projection_in
from galore_torch.optim.state_size import stored_bytes

_GATHERED_BLOCKS = 2  # the one that is at work, and the next


@dataclass(frozen=True)
class Sizes:
    """What of a model is sent and gathered.

    Attributes:
        weights: in the order of the model's parameters, one for each.
        width: bytes of a number of a gradient.
        gathered: bytes of weights that FSDP2 has whole at a time: two blocks, and what is in none.
        formed: bytes of full gradients that it has at a time: of a block, and of what is in none.
    """

    weights: list[SentWeight]
    width: int
    gathered: int
    formed: int

    @classmethod
    def of(cls, job: Job) -> Sizes:
        """The sizes of what a job trains.

        Args:
            job: what is trained, and how.
        """
        model = prepared(job)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = job.optimizer(model)
        projected = {}
        for group in optimizer.param_groups if isinstance(optimizer, GaLore) else ():
            for weight in group["params"] if is_projected(group) else ():
                projected[id(weight)] = projection_in(group, weight), group["update_proj_gap"]
        weights = []
        for weight in model.parameters():
            size = weight.numel()
            found, gap = projected.get(id(weight), (None, 1))
            if found is None:
                weights.append(SentWeight(size, size if weight.requires_grad else 0))
                continue
            numbers = size if job.gradients == "full" else torch.Size(found.projected_shape).numel()
            basis = sum(torch.Size(shape).numel() for shape in found.factor_shapes.values())
            weights.append(SentWeight(size, numbers, basis, gap))
        blocks = alike_blocks(model)
        block, trained = (_bytes(blocks[0], trained=only) if blocks else 0 for only in (False, True))
        others, others_trained = (_bytes(model, trained=only) for only in (False, True))
        others, others_trained = others - len(blocks) * block, others_trained - len(blocks) * trained
        width = next(weight.element_size() for weight in model.parameters() if weight.is_floating_point())
        gathered = others + min(_GATHERED_BLOCKS, len(blocks)) * block
        return cls(weights, width, gathered, others_trained + trained)


def _bytes(module: nn.Module, *, trained: bool) -> int:
    return stored_bytes(one for one in module.parameters() if one.requires_grad or not trained)


def of_a_rank(
    planned: MemoryPlan,
    sizes: Sizes,
    world_size: int,
    parallel: Literal["ddp", "fsdp"],
    *,
    divides_states: bool = True,
    divides_bases: bool = False,
) -> MemoryPlan:
    """The plan of each of several processes.

    DDP keeps gradients that it averages a second time, in its buckets, and projected ones are copied on their way.
    FSDP2 divides weights, gradients and states, and has a few weights and gradients whole for a moment, which count as
    work; bases are whole in each process, or one at a time is.

    Args:
        planned: of one process with the micro-batch of each.
        sizes: of the same job.
        world_size: how many processes there are.
        parallel: "ddp", or "fsdp" for FSDP2.
        divides_states: whether FSDP2 divides states; not those of an optimizer that moves matrices as wholes.
        divides_bases: whether each process keeps a part of every basis alone, see `shard_bases`.

    Returns:
        The plan. It is an estimate: unlike the plan of one process it is not found by rehearsing.
    """
    if parallel == "ddp":
        averaged = sum(one.gradient for one in sizes.weights if one.gradient == one.size) * sizes.width
        projected = sum(one.gradient for one in sizes.weights if one.gradient != one.size) * sizes.width
        on_the_way = min(projected, (IN_FLIGHT + 1) * BUCKET_BYTES)  # and the one that is filled

    def shared(kinds: Mapping[str, int], phase: str) -> dict[str, int]:
        passes = phase not in ("step", "held")
        if parallel == "ddp":
            more = on_the_way if passes and phase != "forward" else 0
            return {**kinds, "gradients": kinds["gradients"] + averaged, "work": kinds["work"] + more}
        divided = ["weights", "gradients", *["states"] * divides_states, *["bases"] * divides_bases]
        parts = {kind: -(-kinds[kind] // world_size) for kind in divided}
        whole = sizes.gathered * passes + sizes.formed * (passes and phase != "forward")
        whole += max(one.basis for one in sizes.weights) * sizes.width * divides_bases
        return {**kinds, **parts, "work": kinds["work"] + whole}

    if world_size == 1:
        return planned
    phases = {phase: shared(kinds, phase) for phase, kinds in planned.phases.items()}
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    held: dict[str, Any] = shared(planned.held, "held")
    held["work"] = max(kinds["work"] for kinds in phases.values())
    return dataclasses.replace(planned, held=held, peak=phases[phase], phase=phase, phases=phases)
