"""What is planned of each of several processes, against what two of them hold."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from galore_torch import attach
from galore_torch.distributed import shard_bases, shard_placement
from galore_torch.memory import plan, stored_bytes
from galore_torch.optim import state_bytes

pytestmark = pytest.mark.slow  # each process plans anew
HELD = ("weights", "gradients", "states", "bases")


def planned_subject() -> Any:
    from galore_torch.training.planning.subject import subject

    return subject("llama-tiny", {"micro_batch": 2, "batch": 4, "seq": 64, "update_proj_gap": 1000}, "float32")


@functools.cache
def planned_alone(method: str) -> Any:
    """The sizes of a job, and its plan for one process."""
    from galore_torch.memory.ranks import Sizes

    job = planned_subject().job(method)
    return Sizes.of(job), plan(job)


def held_by_a_process(rank: int, world: int, parallel: str, in_parts: bool, method: str) -> dict[str, int]:
    warnings.simplefilter("ignore")
    planned = planned_subject()
    job = planned.job(method)
    torch.manual_seed(0)
    model = type(planned.model)(planned.model.config).train()
    if parallel == "fsdp":
        given = {
            "mesh": init_device_mesh("cpu", (world,)),
            "shard_placement_fn": shard_placement(model, world, rank=64),
        }
        for layer in model.model.layers:
            fully_shard(layer, **given)
        fully_shard(model, **given)
    optimizer = job.optimizer(model)
    if in_parts:
        shard_bases(optimizer)
    if method != "full":
        attach(model, optimizer, job.gradients, job.update)
    net: Any = DistributedDataParallel(model) if parallel == "ddp" else model
    for _ in range(3):
        net(**{name: torch.randint(2048, shape) for name, shape in job.batch.items()}).loss.backward()
        gradients = stored_bytes(weight.grad for weight in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    buckets = sum(map(int, net._get_ddp_logging_data()["bucket_sizes"].split(","))) if parallel == "ddp" else 0
    bases = stored_bytes(one for state in optimizer.state.values() for one in state.get("basis", {}).values())
    weights = stored_bytes([*model.parameters(), *model.buffers()])
    states = state_bytes(optimizer) - bases
    return {"weights": weights, "gradients": gradients + buckets, "states": states, "bases": bases}


@pytest.mark.parametrize(
    ("parallel", "in_parts", "method"),
    [(parallel, False, method) for parallel in ("ddp", "fsdp") for method in ("full", "galore")]
    + [("fsdp", True, "galore")],
)
def test_two_processes_hold_what_was_planned(training_pool, parallel, in_parts, method):
    from galore_torch.memory.ranks import of_a_rank

    sizes, alone = planned_alone(method)
    expected = of_a_rank(alone, sizes, 2, parallel, divides_bases=in_parts).held
    given = {"parallel": parallel, "in_parts": in_parts, "method": method}
    for held in training_pool.run(held_by_a_process, 2, **given):
        assert held == pytest.approx({kind: expected[kind] for kind in HELD}, rel=1e-4)
