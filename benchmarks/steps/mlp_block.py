"""Forward and backward of the three linear layers of one LLaMA MLP block, and nothing else: fused against plain.

Gate and up share an input; down has one of its own, so that no other operation takes part.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common import console
from benchmarks.common.bars import Bar, judged
from benchmarks.common.sizes import LLAMA, Llama
from benchmarks.common.timing import seconds_of

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
        made: dict[str, Any] = {"bias": False, "dtype": torch.bfloat16}
        self.gate_proj = nn.Linear(size.hidden, size.intermediate, **made)
        self.up_proj = nn.Linear(size.hidden, size.intermediate, **made)
        self.down_proj = nn.Linear(size.intermediate, size.hidden, **made)
        generator = torch.Generator().manual_seed(0)

        def draw(width: int) -> Tensor:
            return torch.randn(size.sequence, width, generator=generator).to(torch.bfloat16)

        self.narrow, self.wide = draw(size.hidden).requires_grad_(), draw(size.intermediate).requires_grad_()
        self.gradients = [draw(size.intermediate), draw(size.intermediate), draw(size.hidden)]

    def there_and_back(self) -> None:
        """Go forward and backward once."""
        outputs = [self.gate_proj(self.narrow), self.up_proj(self.narrow), self.down_proj(self.wide)]
        torch.autograd.backward(outputs, self.gradients)

    def pass_s(self) -> float:
        """Return the seconds of one pass."""
        seconds = seconds_of(self.there_and_back, "cpu")
        self.narrow.grad = self.wide.grad = None
        return seconds


def measure(size: Llama, rounds: int, advance: Callable[[], None]) -> dict[str, list[float]]:
    """Return the seconds of every pass, plain and fused in turn; `advance` is called after each of the rounds."""
    from galore_torch import GaLoreAdamW, attach, param_groups

    plain, fused = _Linears(size), _Linears(size)
    groups = param_groups(fused, size.rank, "all-linear", decomposition="random")  # what it holds does not matter here
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


def bars(size: Llama, seconds: dict[str, list[float]]) -> list[Bar]:
    """Return the ratio against its bar, if it has one."""
    ratio = median(seconds["fused"]) / median(seconds["plain"])
    return judged("mlp_block", asdict(size), {"MLP block, fused / plain": ratio})


def run(*, small: bool, rounds: int, messages: Console) -> console.Report:
    """Measure the block of LLaMA-7B, or a small one."""
    size = SMALL if small else LLAMA_7B
    with console.Phases(messages) as phases:
        phases.begin("MLP block", rounds)
        seconds = measure(size, rounds, phases.count)
    medians, by_arithmetic = {kind: median(times) for kind, times in seconds.items()}, {"fused": arithmetic(size)}
    ratio = medians["fused"] / medians["plain"]
    rows = [
        (kind, f"{middle:.3f}", f"{middle / medians['plain']:.3f}", f"{by_arithmetic.get(kind, 1):.3f}")
        for kind, middle in medians.items()
    ]
    headings = ("three linear layers", "forward and backward, s", "/ plain", "by arithmetic")
    title = f"MLP of {size.hidden} x {size.intermediate}, bfloat16, rank {size.rank}, {size.sequence} tokens"
    return console.Report(
        title=title,
        record={"size": asdict(size), "seconds": seconds, "ratio": ratio, "arithmetic": arithmetic(size)},
        tables=[console.table(title, headings, rows)],
        bars=bars(size, seconds),
        panels=[console.Panel(label="seconds", names=list(medians), parts={"": list(medians.values())})],
    )
