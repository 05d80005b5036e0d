"""Links between processes, in tc's words, and what the steps of training send over them."""

import time
from collections.abc import Sequence

import psutil
import torch
import torch.distributed as dist
from torch import nn

from galore_torch.units import parse_bandwidth


def seconds_allowed(bytes_sent: float, link: str) -> float | None:
    """Return the least time in which so many bytes cross a link, such as "100mbit"; None of "none".

    >>> seconds_allowed(25e6, "100mbit")
    2.0
    """
    return None if link == "none" else bytes_sent / parse_bandwidth(link)


def slowing(interface: str, link: str) -> str:
    """Return the command that slows an interface to a link."""
    return f"tc qdisc add dev {interface} root tbf rate {link} burst 128kb latency 400ms"


def timed_steps(
    net: nn.Module, optimizer: torch.optim.Optimizer, shape: Sequence[int], count: int, interface: str
) -> list[tuple[int, float]]:
    """Make steps of training, and return the bytes that an interface sent in each and its seconds.

    Args:
        net: a model under DDP.
        optimizer: of it.
        shape: of its input, which is random.
        count: of steps.
        interface: whose bytes are counted.
    """
    steps = []
    for _ in range(count):
        dist.barrier()
        began, before = time.perf_counter(), _sent_bytes(interface)
        net(torch.randn(*shape)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        steps.append((_sent_bytes(interface) - before, time.perf_counter() - began))
    return steps


def _sent_bytes(interface: str) -> int:
    return int(psutil.net_io_counters(pernic=True)[interface].bytes_sent)
