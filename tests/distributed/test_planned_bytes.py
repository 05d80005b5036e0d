"""What is planned of each of several processes, against what two of them hold."""

from __future__ import annotations

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

pytestmark = pytest.mark.slow  # each process imports Transformers
HELD = ("weights", "gradients", "states", "bases")


def planned_and_held(rank: int, world: int, parallel: str, method: str) -> tuple[dict[str, int], dict[str, int]]:
    from galore_torch.memory.ranks import Sizes, of_a_rank
    from galore_torch.training.planning.subject import subject

    warnings.simplefilter("ignore")
    planned = subject("llama-tiny", {"micro_batch": 2, "batch": 4, "seq": 64, "update_proj_gap": 1000}, "float32")
    job = planned.job(method)
    in_parts, parallel = parallel == "fsdp, bases too", parallel[:4].strip(",")
    expected = of_a_rank(plan(job), Sizes.of(job), world, parallel, divides_bases=in_parts).held
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
    held = {"weights": weights, "gradients": gradients + buckets, "states": states, "bases": bases}
    return {kind: expected[kind] for kind in HELD}, held


@pytest.mark.parametrize(
    ("parallel", "method"),
    [("ddp", "full"), ("ddp", "galore"), ("fsdp", "full"), ("fsdp", "galore"), ("fsdp, bases too", "galore")],
)
def test_two_processes_hold_what_was_planned(pool, parallel, method):
    for expected, held in pool.run(planned_and_held, 2, parallel=parallel, method=method):
        assert held == pytest.approx(expected, rel=1e-4)
