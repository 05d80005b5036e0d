"""Train every weight of a small network with GaLore in a plain PyTorch loop.

    pip install .  # in the folder of galore-torch 2
    python examples/plain_pytorch.py

The network reads 32 bytes of Python source and predicts the next one; the text is the standard library's own sources.
"""

from __future__ import annotations

import sysconfig
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from galore_torch import GaLoreAdamW, param_groups
from galore_torch.optim import state_bytes

WINDOW = 32


def standard_library(files: int) -> Tensor:
    """The bytes of the sources of this many modules."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8).long()


def draw(text: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Windows of the text at random places, and the byte after each."""
    windows = text.unfold(0, WINDOW + 1, 1)[torch.randint(len(text) - WINDOW, (count,))]
    return windows[:, :-1], windows[:, -1]


def main() -> None:
    """Trains for 300 steps; some seconds."""
    torch.manual_seed(0)
    text = standard_library(files=40)
    mlp = nn.Sequential(nn.Linear(WINDOW * 32, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU())
    parts = {"embedding": nn.Embedding(256, 32), "flatten": nn.Flatten(), "mlp": mlp, "head": nn.Linear(512, 256)}
    model = nn.Sequential(OrderedDict(parts))

    groups = param_groups(model, rank=32, target_modules=["mlp"], update_proj_gap=50, scale=1.0, summary=True)
    optimizer = GaLoreAdamW(groups, lr=2e-3)
    for step in range(301):
        windows, following = draw(text, 128)
        loss = nn.functional.cross_entropy(model(windows), following)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:3}  loss {loss.item():.2f}")
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{weights:,} weights, {state_bytes(optimizer):,} bytes of optimizer state")


if __name__ == "__main__":
    main()
