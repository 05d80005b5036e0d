"""Two processes: what is not supported yet is refused, with the remedy, before a step is made."""

from __future__ import annotations

import os
import queue
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from galore_torch import GaLoreAdamW, attach, param_groups, quantize_weights
from tests.forked import CONTEXT, TORCH
from tests.waiting import DEADLINE

pytestmark = [
    pytest.mark.slow,  # two more processes import torch
    pytest.mark.of_cpu("a forked process cannot use the GPU that its parent uses"),
]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))


def optimizer_of(net: nn.Module, seed: int = 0) -> GaLoreAdamW:
    return GaLoreAdamW(param_groups(net, rank=4, target_modules="all-linear"), lr=0.1, seed=seed)


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()


def refused(action: Any) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


# What is tried, by name; each gives what was said --------------------------------------------------------------------


def attached_to_ddp() -> str:
    net = model()
    optimizer = optimizer_of(net)
    wrapped = DistributedDataParallel(net)
    return refused(lambda: attach(wrapped, optimizer))


def ddp_in_full() -> str:
    net = model()
    optimizer = optimizer_of(net)
    with attach(net, optimizer, gradients="full"):
        wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True)
        for _ in range(3):
            torch.manual_seed(dist.get_rank())
            step(wrapped, optimizer)
            optimizer.zero_grad()
    weight = net[0].weight.detach().clone()
    dist.broadcast(weight, src=0)
    return "equal" if torch.equal(weight, net[0].weight) else "apart"


def reduced_by_hand(operation: str) -> str:
    net = model()
    attach(net, optimizer_of(net))
    net(torch.randn(8, 16)).square().mean().backward()
    grad = net[0].weight.grad
    before = grad.projected.clone()
    act = {"all_reduce": lambda: dist.all_reduce(grad), "broadcast": lambda: dist.broadcast(grad, src=0)}[operation]
    said = refused(act)
    return said if torch.equal(grad.projected, before) else f"changed: {said}"


def broadcast_in_int8() -> str:
    net = model()
    quantize_weights(net, "all-linear")
    return refused(lambda: dist.broadcast(net[0].weight.data, src=0))


def codes_broadcast() -> str:
    torch.manual_seed(dist.get_rank())
    net = nn.Sequential(nn.Linear(16, 24))
    quantize_weights(net, "all-linear")
    weight = net[0].weight
    dist.broadcast(weight.codes, src=0)
    dist.broadcast(weight.scale, src=0)
    sums = [torch.zeros(()) for _ in range(2)]
    dist.all_gather(sums, weight.decode().double().sum().float())
    return "equal" if torch.equal(*sums) else "apart"


def seeds() -> str:
    net = model()
    optimizer = optimizer_of(net, seed=dist.get_rank())
    before = [weight.detach().clone() for weight in net.parameters()]
    said = refused(lambda: step(net, optimizer))
    return (
        said if said == "nothing was refused" or all(map(torch.equal, net.parameters(), before)) else f"moved: {said}"
    )


def sharded(when: str) -> str:
    net = model()
    optimizer = optimizer_of(net)
    if when == "in INT8":
        quantize_weights(net, "all-linear")
        return refused(lambda: fully_shard(net, mesh=init_device_mesh("cpu", (2,))))
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    return refused(lambda: step(net, optimizer))


TRIALS: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "attached to DDP": (attached_to_ddp, (), 'gradients="full"'),
    "DDP, in full": (ddp_in_full, (), "equal"),
    "all_reduce of a projected gradient": (reduced_by_hand, ("all_reduce",), 'gradients="full"'),
    "broadcast of a projected gradient": (reduced_by_hand, ("broadcast",), 'gradients="full"'),
    "broadcast of a weight in INT8": (broadcast_in_int8, (), ".codes and then its .scale"),
    "broadcast of its codes": (codes_broadcast, (), "equal"),
    "the optimizer, then fully_shard": (sharded, ("after the optimizer",), "fully_shard has replaced it"),
    "fully_shard of weights in INT8": (sharded, ("in INT8",), "dequantize_weights(model) first"),
    "seed=rank": (seeds, (), "Give all processes the same seed"),
}


def run(rank: int, store: str, answers: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, (trial, arguments, _) in TRIALS.items():
        try:
            said = trial(*arguments)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        answers.put((rank, name, said))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, list[str]]:
    """What each trial said in each of two processes, by its name."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    answers = CONTEXT.Queue()
    store = Path(tmp_path_factory.mktemp("job")) / "store"
    processes = [TORCH.start(run, rank, str(store), answers) for rank in range(2)]
    heard: dict[str, list[str]] = {name: ["", ""] for name in TRIALS}
    try:
        for _ in range(2 * len(TRIALS)):
            rank, name, answer = answers.get(timeout=DEADLINE)
            heard[name][rank] = answer
    except queue.Empty:
        pass  # the tests tell what was not heard
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return heard


@pytest.mark.parametrize("name", [name for name in TRIALS if name != "seed=rank"])
def test_every_process_is_told(said, name):
    assert all(TRIALS[name][2] in answer for answer in said[name]), said[name]


def test_processes_of_another_seed_are_told(said):
    """The first to come cannot know; each other one can, and the job ends."""
    first, told = sorted(said["seed=rank"], key=len)
    assert TRIALS["seed=rank"][2] in told
    assert first == "nothing was refused"
