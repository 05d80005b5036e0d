"""Forward and backward of the three linear layers of one LLaMA MLP block, and nothing else: fused against plain.

Gate and up share an input; down has one of its own, so that no other operation takes part.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks.report import Bar
from galore_torch import GaLoreAdamW, param_groups
from galore_torch.gradients import attach

AT_MOST = 0.88
"""Fused over plain, for LLaMA-7B."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """The sizes of an MLP block.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        rank: Rank of the projection.
        tokens: How many go through it.
    """

    hidden: int
    intermediate: int
    rank: int
    tokens: int

    @property
    def arithmetic(self) -> float:
        """Fused over plain, by the operations of the products: forward and two kinds of gradients.

        >>> round(LLAMA_7B.arithmetic, 2)
        0.78
        """
        m, n = self.hidden, self.intermediate
        return (2 * m * n + self.rank * (m + n)) / (3 * m * n)


LLAMA_7B = Block(hidden=4096, intermediate=11008, rank=1024, tokens=2048)
SMALL = Block(hidden=256, intermediate=688, rank=64, tokens=512)


class _Linears(nn.Module):
    """The three layers, in bfloat16, and what goes through them in both directions."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        made: dict[str, Any] = {"bias": False, "dtype": torch.bfloat16}
        self.gate_proj = nn.Linear(block.hidden, block.intermediate, **made)
        self.up_proj = nn.Linear(block.hidden, block.intermediate, **made)
        self.down_proj = nn.Linear(block.intermediate, block.hidden, **made)
        generator = torch.Generator().manual_seed(0)

        def draw(width: int) -> Tensor:
            return torch.randn(block.tokens, width, generator=generator).to(torch.bfloat16)

        self.narrow, self.wide = draw(block.hidden).requires_grad_(), draw(block.intermediate).requires_grad_()
        self.gradients = [draw(block.intermediate), draw(block.intermediate), draw(block.hidden)]

    def pass_s(self) -> float:
        """Go forward and backward once; return the seconds."""
        start_s = time.perf_counter()
        outputs = [self.gate_proj(self.narrow), self.up_proj(self.narrow), self.down_proj(self.wide)]
        torch.autograd.backward(outputs, self.gradients)
        seconds = time.perf_counter() - start_s
        self.narrow.grad = self.wide.grad = None
        return seconds


def measure(block: Block, rounds: int, advance: Callable[[], None]) -> dict[str, list[float]]:
    """Return the seconds of every pass, plain and fused in turn.

    Args:
        block: The sizes.
        rounds: Passes of each.
        advance: Called after each round.
    """
    plain, fused = _Linears(block), _Linears(block)
    groups = param_groups(fused, block.rank, "all-linear", decomposition="random")  # what it holds does not matter here
    optimizer = GaLoreAdamW(groups, lr=1e-4)
    with attach(fused, optimizer, gradients="fused"):
        for _ in range(2):  # the first finds the bases; from the second on it is known which layers share an input
            fused.pass_s()
            optimizer.step()
            optimizer.zero_grad()
        plain.pass_s()
        seconds: dict[str, list[float]] = {"plain": [], "fused": []}
        for number in range(rounds):
            kinds = {"plain": plain, "fused": fused}
            for kind in list(kinds)[:: 1 if number % 2 else -1]:
                kinds[kind].zero_grad()
                seconds[kind].append(kinds[kind].pass_s())
            advance()
    return seconds


def ratio(seconds: dict[str, list[float]]) -> float:
    """Return fused over plain."""
    return median(seconds["fused"]) / median(seconds["plain"])


def bar(seconds: dict[str, list[float]]) -> Bar:
    """Return the ratio against its bar."""
    return Bar(what="MLP block of LLaMA-7B, fused / plain", value=ratio(seconds), at_most=AT_MOST)


def table(block: Block, seconds: dict[str, list[float]]) -> Table:
    """Return the medians as a table."""
    made = Table(
        title=f"MLP of {block.hidden} x {block.intermediate}, bfloat16, rank {block.rank}, {block.tokens} tokens"
    )
    for column in ("three linear layers", "forward and backward, s", "/ plain", "by arithmetic"):
        made.add_column(column, justify="left" if column.startswith("three") else "right")
    made.add_row("plain", f"{median(seconds['plain']):.3f}", "1.00", "1.00")
    made.add_row("fused", f"{median(seconds['fused']):.3f}", f"{ratio(seconds):.3f}", f"{block.arithmetic:.3f}")
    return made


def record(block: Block, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return every raw time as JSON."""
    return {"block": asdict(block), "seconds": seconds, "ratio": ratio(seconds), "arithmetic": block.arithmetic}
