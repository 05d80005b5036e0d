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
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.command import at_least, parser, run
from benchmarks.common.links import seconds_allowed, slowing, timed_steps
from benchmarks.common.report import Report, Sheet
from galore_torch import GaLoreAdamW, attach, param_groups

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


def build(method: str, given: argparse.Namespace) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    """Return a model of a method under DDP, and its optimizer."""
    torch.manual_seed(0)
    blocks = [Block(given.hidden, given.hidden * 8 // 3) for _ in range(given.layers)]
    model = nn.Sequential(*blocks, nn.Linear(given.hidden, 8))
    if not method.startswith("galore"):
        net = DistributedDataParallel(model, bucket_cap_mb=1000 if method == "power-sgd" else 25)
        if method == "power-sgd":
            state = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=given.rank, start_powerSGD_iter=2, min_compression_rate=1
            )
            net.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return net, torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = "sketched" if method == "galore/sketched" else "warm"
    keys: dict[str, Any] = {"update_proj_gap": given.steps + 3, "stagger": False, "decomposition": found}
    groups = param_groups(model, rank=given.rank, **keys)
    optimizer = GaLoreAdamW(groups, lr=1e-3)
    attach(model, optimizer, gradients="full" if method == "galore/full" else "fused")
    return DistributedDataParallel(model), optimizer


def work(rank: int, given: argparse.Namespace, method: str, folder: str) -> None:
    """Train in one process; the first leaves the bytes and the seconds of each step."""
    torch.set_num_threads(given.threads)
    init = f"file://{folder}/store-{method.replace('/', '-')}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=given.processes)
    net, optimizer = build(method, given)
    torch.manual_seed(rank)
    # first bases, and what PowerSGD does before it compresses, take three
    steps = timed_steps(net, optimizer, (given.tokens, given.hidden), given.steps + 4, "lo")
    if rank == 0:
        torch.save(steps, f"{folder}/steps")
    dist.destroy_process_group()


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
            steps = torch.load(f"{folder}/steps")
        sent, seconds = (sorted(values)[given.steps // 2] for values in zip(*steps[3:-1], strict=True))
        first, *_, renewal = (bytes_sent / 1e6 for bytes_sent, _ in steps)
        rows[method] = {"first, MB": first, "renewal, MB": renewal, "step, MB": sent / 1e6, "step, s": seconds}
        allowed = seconds_allowed(sent, given.link)
        if allowed is not None:
            rows[method] |= {"allowed, s": allowed, "of, allowed": seconds / allowed}
    base = rows[given.methods[0]]
    for figures in rows.values():
        figures["times, faster"] = base["step, s"] / figures["step, s"]
        figures["bytes of, the first's"] = figures["step, MB"] / base["step, MB"]
    title = (
        f"{given.layers} layers of {given.hidden}, rank {given.rank}, {given.processes} processes, link {given.link}"
    )
    return Report(title=title, record={"rows": rows}, sheets=[Sheet(title=title, rows=rows)])


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
