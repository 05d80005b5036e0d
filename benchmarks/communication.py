"""What a step of DDP sends between processes, and how long it takes over a slow link.

    python -m benchmarks.communication                      # two processes, as fast as the machine's own loopback is
    python -m benchmarks.communication --link 100mbit       # slowed by tc, in a network namespace of its own: as root

Each method trains the same layers on few tokens, so that traffic is what takes time. Bytes are those that cross the
loopback, both ways and headers included, in a step without a renewal and in one in which all layers renew. What the
link allows is that many bytes of the former over its bandwidth.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.multiprocessing.spawn import spawn

from benchmarks.common.command import at_least, parser, run
from benchmarks.common.links import slowing, train
from benchmarks.common.report import Report
from galore_torch.units import parse_bandwidth

METHODS = ("adamw", "power-sgd", "galore/full", "galore/fused", "galore/sketched")
INSIDE = "GALORE_BENCHMARK_LINK"  # the link that this process has been put behind


class Block(nn.Module):
    """The matrices of a LLaMA's layer, without what moves no bytes."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        shapes = {**dict.fromkeys("qkvo", (width, width)), "gate": (width, inner), "up": (width, inner)}
        shapes["down"] = (inner, width)
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output."""
        q, k, v, o, gate, up, down = self.mlp.values()
        x = x + o(torch.tanh(q(x)) * k(x) + v(x))
        moved: torch.Tensor = x + down(nn.functional.silu(gate(x)) * up(x))
        return moved


def blocks(given: argparse.Namespace) -> nn.Module:
    """Return the layers, and a small head that is not projected."""
    layers = [Block(given.hidden, given.hidden * 8 // 3) for _ in range(given.layers)]
    return nn.Sequential(*layers, nn.Linear(given.hidden, 8))


def work(rank: int, given: argparse.Namespace, method: str, folder: str) -> None:
    """Train in one process; the first leaves what it has measured."""
    torch.set_num_threads(given.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=given.processes)
    measured = train(method, partial(blocks, given), given, "lo")
    if rank == 0:
        torch.save(measured, f"{folder}/measured")


def behind(link: str) -> int:
    """Start this benchmark again behind a link, and return its exit status."""
    slowed = f"ip link set lo up && {slowing('lo', link)}"
    argv = [sys.executable, "-m", "benchmarks.communication", *sys.argv[1:]]
    command = ["unshare", "-n", "sh", "-c", f'{slowed} && exec "$@"', "sh", *argv]
    return subprocess.run(command, env={**os.environ, INSIDE: link}, check=False).returncode


def measure(given: argparse.Namespace, messages: Console) -> Report:
    """Measure the methods one after the other."""
    rows: dict[str, dict[str, Any]] = {}
    for method in given.methods:
        messages.print(f"{method} ...")
        with tempfile.TemporaryDirectory() as folder:
            spawn(work, (given, method, folder), nprocs=given.processes)  # type: ignore[no-untyped-call]
            measured = torch.load(f"{folder}/measured")
        (first, _), (renewal, renewing), (sent, seconds) = measured.values()
        rows[method] = {"first, MB": first / 1e6, "renewal, MB": renewal / 1e6, "renewal, s": renewing}
        rows[method] |= {"step, MB": sent / 1e6, "step, s": seconds}
        if given.link != "none":
            allowed = sent / parse_bandwidth(given.link)
            rows[method] |= {"allowed, s": allowed, "of, allowed": seconds / allowed}
    base = rows[given.methods[0]]
    for figures in rows.values():
        figures["times, faster"] = base["step, s"] / figures["step, s"]
        figures["bytes of, the first's"] = figures["step, MB"] / base["step, MB"]
    title = (
        f"{given.layers} layers of {given.hidden}, rank {given.rank}, {given.processes} processes, link {given.link}"
    )
    return Report.of(title, rows)


def main() -> None:
    """Read the options, put this process behind the link if there is to be one, and measure."""
    made = parser(__doc__, "benchmarks.communication")
    add = made.add_argument
    which = "which are measured, the first as the base"
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help=which)
    add("--processes", type=at_least(2), default=2)
    add("--hidden", type=at_least(8), default=256)
    add("--layers", type=at_least(1), default=8)
    add("--rank", type=at_least(1), default=64)
    add("--tokens", type=at_least(1), default=16, help="of each process, a step")
    add("--steps", type=at_least(1), default=3)
    add("--link", default="none", help="bandwidth in tc's words, such as 100mbit or 1gbit")
    given = made.parse_args()
    if given.link not in ("none", os.environ.get(INSIDE)):
        raise SystemExit(behind(given.link))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    run(given, measure)


if __name__ == "__main__":
    main()
