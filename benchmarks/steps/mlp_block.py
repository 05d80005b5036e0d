"""Forward and backward of the three linear layers of one LLaMA MLP block, and nothing else: fused against plain.

Gate and up share an input; down has one of its own, so that no other operation takes part.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import median

import torch
from torch import nn

from benchmarks.common.bars import judged
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
        widths = ((narrow, wide), (narrow, wide), (wide, narrow))
        self.layers = nn.ModuleList(nn.Linear(*both, bias=False, dtype=torch.bfloat16) for both in widths)
        x, y = (torch.randn(size.sequence, width).bfloat16().requires_grad_() for width in (narrow, wide))
        self.inputs = [x, x, y]
        self.gradients = [torch.randn(size.sequence, width).bfloat16() for _, width in widths]

    def pass_s(self) -> float:
        """Go forward and backward once; return the seconds."""

        def forward_and_backward() -> None:
            outputs = [layer(x) for layer, x in zip(self.layers, self.inputs, strict=True)]
            torch.autograd.backward(outputs, self.gradients)

        seconds = seconds_of(forward_and_backward, "cpu")
        for x in self.inputs:
            x.grad = None
        return seconds


def measure(size: Llama, rounds: int, advance: Callable[[], None]) -> dict[str, list[float]]:
    """Return the seconds of every pass, plain and fused in turn; `advance` is called after each pass."""
    from galore_torch import GaLoreAdamW, attach, param_groups

    blocks = {"plain": _Linears(size), "fused": _Linears(size)}
    groups = param_groups(blocks["fused"], size.rank, "all-linear", decomposition="random")  # any basis will do
    optimizer = GaLoreAdamW(groups, lr=1e-4)
    seconds: dict[str, list[float]] = {kind: [] for kind in blocks}
    with attach(blocks["fused"], optimizer, gradients="fused"):
        for _ in range(2):  # the first finds the bases; from the second on it is known which layers share an input
            blocks["fused"].pass_s()
            optimizer.step()
            optimizer.zero_grad()
        blocks["plain"].pass_s()
        for kind in in_turn(list(blocks), rounds):
            blocks[kind].zero_grad()
            seconds[kind].append(blocks[kind].pass_s())
            advance()
    return seconds


def report(size: Llama, seconds: dict[str, list[float]]) -> Report:
    """Return the medians, and their ratio against its bar, if it has one."""
    medians = {kind: median(times) for kind, times in seconds.items()}
    ratios = {kind: middle / medians["plain"] for kind, middle in medians.items()}
    by_arithmetic = {"plain": 1.0, "fused": arithmetic(size)}
    rows = {
        kind: {"seconds": medians[kind], "of plain": ratios[kind], "by arithmetic": by_arithmetic[kind]}
        for kind in medians
    }
    title = f"MLP of {size.hidden} x {size.intermediate}, bfloat16, rank {size.rank}, {size.sequence} tokens"
    caption = "Forward and backward of three linear layers."
    return Report(
        title=title,
        record={"mlp-block": {"size": asdict(size), "seconds": seconds}},
        sheets=[Sheet(title=title, rows=rows, caption=caption, drawn=("seconds",), unit="seconds")],
        bars=judged("mlp_block", asdict(size), {"MLP block, fused / plain": ratios["fused"]}),
    )
