"""What a step of LLaMA sends, and how long it takes, on many cards behind slow links: a model of the traffic.

    python -m benchmarks.many_cards                               # LLaMA-7B, 1,000 cards, 1 Gbit/s and 100 Mbit/s
    python -m benchmarks.many_cards --measure --links 100mbit --cards 4   # the model against processes, as root

The model is that of `galore_torch/memory/links.py`, by which `galore plan --world-size` tells what a run will send.
What is projected sends its coordinates' r max(m, n) numbers, and every `gap` steps a full gradient and a basis. Numbers
are of 16 bits.

Measured are processes in network namespaces of their own, on a bridge, each behind a link that tc slows, with 32 bits.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from benchmarks.common.command import at_least, parser, run
from benchmarks.common.links import slowing, train
from benchmarks.common.report import Report
from benchmarks.common.sizes import LLAMA
from galore_torch.memory.links import Ring, SentWeight, renewal_bytes, replicated_step, sharded_step
from galore_torch.units import parse_bandwidth

METHODS = ("adamw", "power-sgd", "fsdp2", "galore", "galore/16 steps", "galore/fsdp2")
MEASURED = ("adamw", "galore")


class Weight(NamedTuple):
    """A matrix, and whether it is projected."""

    rows: int
    columns: int
    is_projected: bool


@dataclass(frozen=True, kw_only=True)
class Cards(Ring):
    """The cards and their links, and the rank and the gap of what is projected."""

    rank: int
    gap: int


def llama(name: str) -> list[Weight]:
    """Return the matrices of a LLaMA in the order of its forward pass."""
    ends = [Weight(LLAMA[name].vocabulary, LLAMA[name].hidden, is_projected=False)]
    return [*ends, *(Weight(*shape, is_projected=True) for shape in LLAMA[name].weights), *ends]


def sent(method: str, weights: Iterable[Weight], cards: Cards) -> list[SentWeight]:
    """Return what a method sends of each weight."""
    made = []
    for rows, columns, is_projected in weights:
        size, short, long = rows * columns, min(rows, columns), max(rows, columns)
        if method == "power-sgd":
            made.append(SentWeight(size, min(size, cards.rank * (rows + columns))))
        elif method.startswith("galore") and is_projected:
            made.append(SentWeight(size, cards.rank * long, cards.rank * short, cards.gap))
        else:
            made.append(SentWeight(size, size))
    return made


def simulate(method: str, weights: Sequence[Weight], cards: Cards) -> tuple[float, float]:
    """Return what one card sends in an ordinary step, in bytes, and the seconds that the step takes."""
    known = sent(method, weights, cards)
    if method == "galore/16 steps":  # weights and two moments, at the end of a window
        window, seconds = cards.reduced(3 * sum(one.gradient for one in known if one.basis))
        step = replicated_step([replace(one, gradient=0) if one.basis else one for one in known], cards)
        return step.gradients + window / 16, step.seconds + seconds / 16
    step = (sharded_step if method.endswith("fsdp2") else replicated_step)(known, cards)
    return step.weights + step.gradients, step.seconds


# Against processes ----------------------------------------------------------------------------------------------------


SETUP = """
ip netns add galore{rank}
ip link add veth{rank} type veth peer name eth0 netns galore{rank}
ip link set veth{rank} master galore up
ip netns exec galore{rank} ip addr add 10.77.0.{address}/24 dev eth0
ip netns exec galore{rank} ip link set eth0 up
ip netns exec galore{rank} ip link set lo up
ip netns exec galore{rank} {slowing}
"""


def shell(script: str, *, check: bool = True) -> None:
    """Run commands of the system's, up to the first that fails, which is an error; or all, whatever becomes of them."""
    subprocess.run(["sh", "-ec" if check else "-c", script], check=check, capture_output=not check)


def work(given: argparse.Namespace) -> None:
    """Train in one process, in its namespace; the first prints the median bytes and seconds of a step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    is_first = dist.get_rank() == 0

    def make() -> nn.Module:
        return nn.Sequential(*(nn.Linear(given.hidden, given.hidden, bias=False) for _ in range(given.layers)))

    found = train(given.worker, make, given, "eth0", target_modules="all-linear")
    if is_first:
        print(*found["step"])


def measured(method: str, link: str, given: argparse.Namespace) -> tuple[float, float]:
    """Return the bytes that a process sends in a step, and its seconds, each behind a link of its own."""
    ranks = range(given.cards)
    try:
        shell("ip link add galore type bridge; ip link set galore up")
        shell("".join(SETUP.format(rank=rank, address=rank + 1, slowing=slowing("eth0", link)) for rank in ranks))
        command = [sys.executable, "-m", "benchmarks.many_cards", "--worker", method, *sys.argv[1:]]
        env = {**os.environ, "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29577", "WORLD_SIZE": str(given.cards)}
        started = [
            subprocess.Popen(
                ["ip", "netns", "exec", f"galore{rank}", *command],
                env={**env, "RANK": str(rank), "GLOO_SOCKET_IFNAME": "eth0"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in ranks
        ]
        said = [one.communicate()[0] for one in started]
        if any(one.returncode for one in started):
            raise RuntimeError(f"{method} failed on {given.cards} processes")
        bytes_sent, seconds = said[0].split()
        return float(bytes_sent), float(seconds)
    finally:
        gone = (f"ip link del veth{rank}; ip netns del galore{rank}; " for rank in ranks)
        shell("".join(gone) + "ip link del galore", check=False)


def compare(given: argparse.Namespace, messages: Console) -> Report:
    """Measure, and predict the same."""
    # Of all projected weights one stays with DDP, which needs one.
    weights = [Weight(given.hidden, given.hidden, is_projected=bool(layer)) for layer in range(given.layers)]
    rows: dict[str, dict[str, Any]] = {}
    for link in given.links:
        for method in MEASURED:
            messages.print(f"{method} over {link} ...")
            alone = measured(method, "100gbit", given)[1]
            found, seconds = measured(method, link, given)
            modelled, predicted = simulate(method, weights, cards_of(given, link, width=4, work=alone))
            rows[f"{method}, {link}"] = {
                "sent, MB": found / 1e6, "predicted, MB": modelled / 1e6, "work, s": alone, "step, s": seconds,
                "predicted, s": predicted, "of, predicted": seconds / predicted,
            }  # fmt: skip
    title = f"{given.layers} layers of {given.hidden}, rank {given.rank}, {given.cards} processes"
    return Report.of(title, rows)


def cards_of(given: argparse.Namespace, link: str, *, width: int, work: float) -> Cards:
    """Return the cards behind a link."""
    return Cards(
        count=given.cards, bandwidth=parse_bandwidth(link), hop=given.hop_ms / 1e3, width=width, rank=given.rank,
        gap=500, work=work,
    )  # fmt: skip


def predict(given: argparse.Namespace, messages: Console) -> Report:
    """Simulate every method over every link."""
    if given.measure:
        return compare(given, messages)
    weights = llama(given.model)
    rows: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        row = rows[method] = {}
        for link in given.links:
            cards = cards_of(given, link, width=2, work=given.work)
            bytes_sent, row[f"{link}, s"] = simulate(method, weights, cards)
            row["sent, GB"] = bytes_sent / 1e9
            row["renewals, GB"] = renewal_bytes(sent(method, weights, cards), cards) / 1e9
    title = (
        f"LLaMA-{given.model}, {given.cards} cards, rank {given.rank}, {given.work} s of work, {given.hop_ms} ms a hop"
    )
    return Report.of(title, rows)


def main() -> None:
    """Read the options, and simulate or compare."""
    made = parser(__doc__, "benchmarks.many_cards")
    add = made.add_argument
    add("--model", choices=LLAMA, default="7b")
    add("--cards", type=at_least(2), default=1000)
    add("--links", nargs="+", default=["1gbit", "100mbit"], help="bandwidths in tc's words")
    add("--rank", type=at_least(1), default=1024)
    add("--work", type=float, default=3.0, help="seconds of a forward and a backward pass without traffic")
    add("--hop-ms", type=float, default=0.1, help="latency of a hop")
    add("--measure", action="store_true", help="hold the model to processes in namespaces, as root")
    add("--hidden", type=at_least(8), default=512, help="of what is measured")
    add("--layers", type=at_least(2), default=16, help="of what is measured")
    add("--tokens", type=at_least(1), default=64, help="of what is measured")
    add("--steps", type=at_least(1), default=3, help="of what is measured")
    add("--worker", choices=MEASURED, help=argparse.SUPPRESS)
    given = made.parse_args()
    if given.worker:
        work(given)
    else:
        run(given, predict)


if __name__ == "__main__":
    main()
