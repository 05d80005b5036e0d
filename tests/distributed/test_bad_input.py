"""What is not supported in several processes is told in every one of them, before anything moves."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import galore_torch
from galore_torch import GaLoreAdamW, attach, param_groups
from tests.distributed.pool import COLLECTIVE, Pool, assert_every_process_raises
from tests.distributed.sharded import fully_sharded
from tests.distributed.trained import batch, distance, llama, loss_of, optimizer_of, trained, weights_of


def step(net: nn.Module, optimizer: Any, rank: int, world: int) -> None:
    loss_of(net, batch(0).tensor_split(world)[rank]).backward()
    optimizer.step()
    optimizer.zero_grad()


DISAGREEMENTS: dict[str, Any] = {
    "rank": lambda rank: {"rank": 3 + rank},
    "update_proj_gap": lambda rank: {"update_proj_gap": 7 + rank},
    "seed": lambda rank: {"seed": rank},
    "decomposition": lambda rank: {"decomposition": ("warm", "svd")[rank]},
    "galore_torch": lambda _: {},  # its version
}

ARGUMENTS: dict[str, Any] = {  # of the optimizer, in each process
    "lr": (0.01, 0.02),
    "betas": ((0.9, 0.999), (0.9, 0.95)),
    "state_dtype": (None, torch.float32),
}


@pytest.mark.parametrize("name", [*DISAGREEMENTS, *ARGUMENTS, "weight"])
@pytest.mark.parametrize("gradients", ["projected", "full"])
@pytest.mark.broad("projected-rank", "full-weight")
def test_processes_that_disagree_are_told(pool, name, gradients):
    for answer in pool.ask(disagreeing, 2, name=name, gradients=gradients):
        assert answer.kind == "ValueError"
        assert name in answer.text
        assert "rank 0" in answer.text
        assert "rank 1" in answer.text


def disagreeing(rank: int, world: int, name: str, gradients: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        _disagreeing(rank, world, name, gradients, patched)


def _disagreeing(rank: int, world: int, name: str, gradients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    if name == "galore_torch" and rank:
        monkeypatch.setattr(galore_torch, "__version__", "1.9")
    if name == "weight":
        groups = param_groups(model, rank=4)
        for group in groups:
            if rank == 1:
                group["params"].reverse()
        optimizer = GaLoreAdamW(groups)
    elif name in ARGUMENTS:
        optimizer = GaLoreAdamW(param_groups(model, rank=4), **{"lr": 0.01, name: ARGUMENTS[name][rank]})
    else:
        optimizer = optimizer_of(model, **DISAGREEMENTS[name](rank))
    before = weights_of(model)
    attach(model, optimizer, gradients=gradients)
    try:
        step(DistributedDataParallel(model), optimizer, rank, world)
    finally:
        assert torch.equal(before, weights_of(model))


REFUSED = {
    "attached to DDP": "attach(model, optimizer) first",
    "attached to a part": "the very model that is wrapped",
    "removed": "Wrap the model anew",
    "join": "join()",
    "no_sync with update='backward'": "use update='step'",
    "create_graph": "create_graph=True",
    "one of several": "DistributedDataParallel already",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused(pool, name):
    assert_every_process_raises(pool.ask(refused, 2, name=name), REFUSED[name])


def refused(rank: int, world: int, name: str) -> None:
    model = llama()
    optimizer = optimizer_of(model)
    match name:
        case "attached to DDP":
            attach(DistributedDataParallel(model), optimizer)
        case "one of several":
            attach(nn.Sequential(DistributedDataParallel(model)), optimizer)
        case "attached to a part":
            attach(model, optimizer)
            step(DistributedDataParallel(nn.Sequential(model)), optimizer, rank, world)
        case "removed":
            attachment = attach(model, optimizer)
            net = DistributedDataParallel(model)
            attachment.remove()
            step(net, optimizer, rank, world)
        case "join":
            attach(model, optimizer)
            net = DistributedDataParallel(model)
            with net.join():
                step(net, optimizer, rank, world)
        case "no_sync with update='backward'":
            attach(model, optimizer, "fused", "backward")
            net = DistributedDataParallel(model)
            with net.no_sync():
                step(net, optimizer, rank, world)
        case "create_graph":
            attach(model, optimizer)
            loss_of(DistributedDataParallel(model), batch(0)).backward(create_graph=True)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_where_a_process_has_no_data_left_and_ends_the_others_end(is_sharded):
    pool = Pool(2)
    try:
        (answer,) = [one for one in pool.ask(running_out, 2, survivors=1, is_sharded=is_sharded) if one is not None]
        assert answer.kind in ("RuntimeError", "DistBackendError", "DistNetworkError")
    finally:
        pool.close()


def running_out(rank: int, world: int, is_sharded: bool) -> None:
    model = llama()
    model = fully_sharded(model, world) if is_sharded else model
    optimizer = optimizer_of(model)
    attach(model, optimizer)
    net = model if is_sharded else DistributedDataParallel(model)
    for _ in range(3 - rank):
        step(net, optimizer, rank, world)
    if rank:
        os._exit(0)


def test_a_group_whose_backend_serves_no_cpu_is_told_in_every_process(pool, tmp_path):
    for answer in pool.ask(on_gpus_alone, 2, store=str(tmp_path / "store")):
        assert answer.kind == "RuntimeError"
        assert "backend" in answer.text


def on_gpus_alone(rank: int, world: int, store: str) -> None:
    dist.destroy_process_group()
    dist.init_process_group("cuda:gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = llama()
    optimizer = optimizer_of(model)
    attach(model, optimizer)
    step(DistributedDataParallel(model), optimizer, rank, world)


def test_our_groups_time_limit_is_that_of_the_job(pool):
    assert pool.run(time_limits, 2) == [COLLECTIVE] * 2


def time_limits(rank: int, world: int) -> float:
    model = llama()
    optimizer = optimizer_of(model)
    attach(model, optimizer)
    step(DistributedDataParallel(model), optimizer, rank, world)
    return optimizer._processes.group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_a_copy_of_an_attached_model_is_a_plain_one(pool):
    ranks = pool.run(as_a_copy, 2)
    assert torch.equal(*ranks)
    assert distance(ranks[0], trained(0, 1, mode=None, steps=10)) <= 1e-12


def as_a_copy(rank: int, world: int) -> torch.Tensor:
    model = llama()
    attach(model, optimizer_of(model))
    other = copy.deepcopy(model)
    optimizer = optimizer_of(other)
    net = DistributedDataParallel(other)
    for number in range(10):
        loss_of(net, batch(number).tensor_split(world)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(other)


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.broad("backward")
def test_a_model_of_which_all_is_projected_leaves_one_weight_to_ddp(pool, update):
    ranks = pool.run(all_projected, 2, mode=("fused", update))
    assert torch.equal(*ranks)
    assert distance(ranks[0], all_projected(0, 1, mode=("fused", update))) <= 1e-12


def all_projected(rank: int, world: int, mode: Any) -> torch.Tensor:
    model = llama()
    for name, weight in model.named_parameters():
        weight.requires_grad_("proj" in name)
    optimizer = optimizer_of(model)
    attach(model, optimizer, *mode)
    net = DistributedDataParallel(model) if world > 1 else model
    for number in range(10):
        loss_of(net, batch(number).tensor_split(world)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_is_refused_by_name(stage):
    """Stages 1 and 2 put flat parts in the place of an optimizer's weights; stage 3 marks each that it takes apart."""
    model = llama()
    if stage == 3:
        model.layers[0].mlp["up_proj"].weight.ds_id = 0
        with pytest.raises(ValueError, match=r"ZeRO 3 has taken layers\.0\.mlp\.up_proj\.weight apart.*FSDP2"):
            optimizer_of(model)
        return
    optimizer = optimizer_of(model)
    part = nn.Parameter(torch.zeros(64, dtype=torch.float64))
    part.grad = torch.ones_like(part)
    for group in optimizer.param_groups:
        group["params"] = [part] if "rank" in group else []
    with pytest.raises(ValueError, match="DeepSpeed ZeRO 1 to 3"):
        optimizer.step()
