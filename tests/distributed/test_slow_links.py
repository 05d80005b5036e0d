"""DDP over slow links: the buckets that are sent, and averages every few steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from galore_torch import attach
from galore_torch.distributed.traffic import Bucket
from tests.distributed.trained import BAR, batch, distance, llama, loss_of, optimizer_of, trained, weights_of
from tests.modes import MODES

LOW_RANK = {name: mode for name, mode in MODES.items() if mode[0] != "full"}
every_low_rank_mode = pytest.mark.parametrize("mode", LOW_RANK.values(), ids=LOW_RANK)


@pytest.mark.parametrize(("megabytes", "weights"), [(None, [4, 10]), (2, [4, 8, 2]), (600 / 2**20, [1] * 14)])
@pytest.mark.broad("None-weights0")
def test_buckets_are_of_the_size_that_ddp_was_given(pool, megabytes, weights):
    """But the first is of one megabyte at most, so that sending begins early: four weights' projected gradients."""
    assert pool.run(weights_of_buckets, 2, megabytes=megabytes) == [weights] * 2


def weights_of_buckets(rank: int, world: int, megabytes: float | None) -> list[int]:
    """How many weights share each bucket of an ordinary step."""
    model = llama(width=512, inner=512, heads=8)
    optimizer = optimizer_of(model, rank=64, decomposition="random", stagger=False)
    attach(model, optimizer)
    net = DistributedDataParallel(model, bucket_cap_mb=megabytes)
    counts: list[int] = []
    reduce = Bucket.reduce
    for step in range(2):
        counts.clear()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Bucket, "reduce", lambda one, group: (counts.append(len(one.trained)), reduce(one, group)))
            loss_of(net, batch(step).tensor_split(world)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return counts


# Averages every few steps ---------------------------------------------------------------------------------------------


@every_low_rank_mode
@pytest.mark.slow
def test_steps_of_processes_by_themselves_are_those_of_one_on_the_same_data(pool, mode):
    ranks = pool.run(trained, 2, mode=mode, alike=True, attachment={"average_every": 5})
    assert torch.equal(*ranks)
    assert distance(ranks[0], trained(0, 1, mode=mode)) <= BAR


def test_on_other_data_they_meet_after_every_average_at_a_part_of_the_bytes(pool):
    (apart, met, sent), (_, _, of_each_step) = (pool.run(averaging, 2, every=every)[0] for every in (3, 1))
    assert apart > 1e-6
    assert met <= BAR
    assert sent <= of_each_step  # weights and two moments, once, for three averages of gradients


def averaging(rank: int, world: int, every: int) -> tuple[float, float, float]:
    """How far the processes are apart before an average and after it, and the bytes of a window of three steps."""
    model = llama()
    optimizer = optimizer_of(model, stagger=False, update_proj_gap=8)
    attach(model, optimizer, average_every=every)
    net = DistributedDataParallel(model)
    sent: list[int] = []
    distances = []
    reduce = dist.all_reduce

    def counted(one: torch.Tensor, **given: Any) -> Any:
        sent.append(one.nbytes if one.is_floating_point() else 0)
        return reduce(one, **given)

    for step in range(6):
        if step == 3:
            sent.clear()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(dist, "all_reduce", counted)
            loss_of(net, batch(step).tensor_split(world)[rank]).backward()
            optimizer.step()
            optimizer.zero_grad()
        theirs = weights_of(model)
        dist.broadcast(theirs, 0)
        apart = torch.tensor(distance(weights_of(model), theirs))
        dist.all_reduce(apart, op=dist.ReduceOp.MAX)
        distances.append(float(apart))
    return distances[4], distances[5], sum(sent)
