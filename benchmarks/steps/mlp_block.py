"""Forward and backward of the three linear layers of one LLaMA MLP block, and nothing else: fused against plain.

Gate and up share an input; down has one of its own, so that no other operation takes part.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import median

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common import command
from benchmarks.common.bars import Bar, judged
from benchmarks.common.report import Report, Sheet
from benchmarks.common.sizes import LLAMA, Llama
from benchmarks.common.timing import in_turn, seconds_of

SMALL = replace(LLAMA["tiny"], sequence=512)
LLAMA_7B = replace(LLAMA["7b"], sequence=2048)
"""What goes through a block is one sequence."""


def arithmetic(size: Llama) -> float:
    """Return fused over plain, by the operations of the products: forward and two kinds of gradients.

    >>> round(arithmetic(LLAMA_7B), 2)
    0.78
    """
    m, n = size.hidden, size.intermediate
    return (2 * m * n + size.rank * (m + n)) / (3 * m * n)


class _Linears(nn.Module):
    """The three layers, in bfloat16, and what goes through them in both directions."""

    def __init__(self, size: Llama) -> None:
        super().__init__()
        narrow, wide = size.hidden, size.intermediate
        self.gate_proj = nn.Linear(narrow, wide, bias=False, dtype=torch.bfloat16)
        self.up_proj = nn.Linear(narrow, wide, bias=False, dtype=torch.bfloat16)
        self.down_proj = nn.Linear(wide, narrow, bias=False, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(0)

        def draw(width: int) -> Tensor:
            return torch.randn(size.sequence, width, generator=generator).to(torch.bfloat16)

        self.narrow, self.wide = draw(narrow).requires_grad_(), draw(wide).requires_grad_()
        self.gradients = [draw(wide), draw(wide), draw(narrow)]

    def forward_and_backward(self) -> None:
        """Go forward and backward once."""
        outputs = [self.gate_proj(self.narrow), self.up_proj(self.narrow), self.down_proj(self.wide)]
        torch.autograd.backward(outputs, self.gradients)

    def pass_s(self) -> float:
        """Return the seconds of one pass."""
        seconds = seconds_of(self.forward_and_backward, "cpu")
        self.narrow.grad = self.wide.grad = None
        return seconds


def measure(size: Llama, rounds: int, advance: Callable[[], None]) -> dict[str, list[float]]:
    """Return the seconds of every pass, plain and fused in turn; `advance` is called after each of the rounds."""
    from galore_torch import GaLoreAdamW, attach, param_groups

    blocks = {"plain": _Linears(size), "fused": _Linears(size)}
    fused = blocks["fused"]
    groups = param_groups(fused, size.rank, "all-linear", decomposition="random")  # what it holds does not matter here
    optimizer = GaLoreAdamW(groups, lr=1e-4)
    seconds: dict[str, list[float]] = {kind: [] for kind in blocks}
    with attach(fused, optimizer, gradients="fused"):
        for _ in range(2):  # the first finds the bases; from the second on it is known which layers share an input
            fused.pass_s()
            optimizer.step()
            optimizer.zero_grad()
        blocks["plain"].pass_s()
        for number, kind in enumerate(in_turn(list(blocks), rounds)):
            blocks[kind].zero_grad()
            seconds[kind].append(blocks[kind].pass_s())
            if number % 2:
                advance()
    return seconds


def bars(size: Llama, seconds: dict[str, list[float]]) -> list[Bar]:
    """Return the ratio against its bar, if it has one."""
    ratio = median(seconds["fused"]) / median(seconds["plain"])
    return judged("mlp_block", asdict(size), {"MLP block, fused / plain": ratio})


def run(*, small: bool, rounds: int, messages: Console) -> Report:
    """Measure the block of LLaMA-7B, or a small one."""
    size = SMALL if small else LLAMA_7B
    with command.Phases(messages) as phases:
        phases.begin("MLP block", rounds)
        seconds = measure(size, rounds, phases.count)
    medians, by_arithmetic = {kind: median(times) for kind, times in seconds.items()}, {"fused": arithmetic(size)}
    rows = {
        kind: {"seconds": middle, "of plain": middle / medians["plain"], "by arithmetic": by_arithmetic.get(kind, 1.0)}
        for kind, middle in medians.items()
    }
    title = f"MLP of {size.hidden} x {size.intermediate}, bfloat16, rank {size.rank}, {size.sequence} tokens"
    caption = "Forward and backward of three linear layers."
    return Report(
        title=title,
        record={"mlp-block": {"size": asdict(size), "seconds": seconds, "figures": rows}},
        sheets=[Sheet(title=title, rows=rows, caption=caption, drawn=("seconds",), unit="seconds")],
        bars=bars(size, seconds),
    )
