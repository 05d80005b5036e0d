"""Links between processes, in tc's words, and what the steps of training send over them."""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from galore_torch import GaLoreAdamW, attach, param_groups

FIRST_STEPS = 3
"""Those in which first bases are found, and PowerSGD does not compress yet."""


def slowing(interface: str, link: str) -> str:
    """Return the command that slows an interface to a link."""
    return f"tc qdisc add dev {interface} root tbf rate {link} burst 128kb latency 400ms"


def build(method: str, model: nn.Module, given: argparse.Namespace, **keys: Any) -> tuple[nn.Module, Any]:
    """Return a model under DDP, trained by a method, and its optimizer; keys are those of projected weights."""
    if method.startswith("galore"):
        found = "sketched" if method == "galore/sketched" else "warm"
        gap = FIRST_STEPS + given.steps  # all layers renew in the step after those that are measured
        keys = {"rank": given.rank, "update_proj_gap": gap, "stagger": False, "decomposition": found, **keys}
        optimizer = GaLoreAdamW(param_groups(model, **keys), lr=1e-3)
        attach(model, optimizer, gradients="full" if method == "galore/full" else "fused")
        return DistributedDataParallel(model), optimizer
    net = DistributedDataParallel(model, bucket_cap_mb=1000 if method == "power-sgd" else 25)
    if method == "power-sgd":
        rank = {"matrix_approximation_rank": given.rank, "min_compression_rate": 1}
        net.register_comm_hook(
            powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, **rank), powerSGD_hook.powerSGD_hook
        )
    return net, torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(
    method: str, make: Callable[[], nn.Module], given: argparse.Namespace, interface: str, **keys: Any
) -> dict[str, tuple[float, float]]:
    """Train in one of the processes that have met, and count what an interface sends of it.

    Args:
        method: of training.
        make: the model, which is given (tokens, hidden) random numbers.
        given: hidden, rank, tokens and steps, which are measured after the first ones.
        interface: whose bytes are counted.
        **keys: of projected weights.

    Returns:
        The bytes and the seconds of the "first" step, of a "renewal" of all layers, and of an ordinary "step": medians.
    """
    torch.manual_seed(0)
    net, optimizer = build(method, make(), given, **keys)
    torch.manual_seed(dist.get_rank())
    steps = []
    for _ in range(FIRST_STEPS + given.steps + 1):
        dist.barrier()
        began, before = time.perf_counter(), _sent_bytes(interface)
        net(torch.randn(given.tokens, given.hidden)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        steps.append((_sent_bytes(interface) - before, time.perf_counter() - began))
    dist.destroy_process_group()
    sent, seconds = map(median, zip(*steps[FIRST_STEPS:-1], strict=True))
    return {"first": steps[0], "renewal": steps[-1], "step": (sent, seconds)}


def _sent_bytes(interface: str) -> int:
    return int(psutil.net_io_counters(pernic=True)[interface].bytes_sent)
