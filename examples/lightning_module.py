"""Train every weight of a small network with GaLore in a Lightning module.

    pip install . lightning  # in the folder of galore-torch 2
    python examples/lightning_module.py

The network reads 32 bytes of Python source and predicts the next one; the text is the standard library's own sources.
"""

from __future__ import annotations

import sysconfig
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from galore_torch import GaLoreAdamW, attach, param_groups

WINDOW = 32


def standard_library(files: int) -> Tensor:
    """Every window of the sources of this many modules, with the byte after it."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8).long()
    return text.unfold(0, WINDOW + 1, 1)


class NextByte(LightningModule):
    """A network whose MLP is projected."""

    def __init__(self) -> None:
        super().__init__()
        mlp = nn.Sequential(nn.Linear(WINDOW * 32, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU())
        parts = {"embedding": nn.Embedding(256, 32), "flatten": nn.Flatten(), "mlp": mlp, "head": nn.Linear(512, 256)}
        self.network = nn.Sequential(OrderedDict(parts))

    def training_step(self, windows: Tensor, index: int) -> Tensor:
        """The loss of a batch; printed now and then."""
        loss = nn.functional.cross_entropy(self.network(windows[:, :-1]), windows[:, -1])
        if index % 100 == 0:
            print(f"step {index:3}  loss {loss.item():.2f}")
        return loss

    def configure_optimizers(self) -> GaLoreAdamW:
        """A real torch optimizer, which Lightning schedules, clips and saves as any other."""
        groups = param_groups(self, rank=32, target_modules=["mlp"], update_proj_gap=50, scale=1.0, summary=True)
        return GaLoreAdamW(groups, lr=2e-3)

    def on_fit_start(self) -> None:
        """Everything is where it will be trained: from here on gradients are projected in the backward itself."""
        [optimizer] = self.trainer.optimizers
        assert isinstance(optimizer, GaLoreAdamW)
        self.attached = attach(self, optimizer, gradients="fused")

    def on_fit_end(self) -> None:
        """The module is a plain one again, and can be fitted again."""
        self.attached.remove()


def main() -> None:
    """Trains for 301 steps; some seconds."""
    torch.manual_seed(0)
    windows: DataLoader[Any] = DataLoader(standard_library(files=40), batch_size=128, shuffle=True)  # type: ignore[arg-type]
    folder = tempfile.mkdtemp(prefix="galore-example-")
    trainer = Trainer(
        max_steps=301, gradient_clip_val=1.0, accelerator="cpu", default_root_dir=folder, logger=False, barebones=False
    )
    trainer.fit(NextByte(), windows)


if __name__ == "__main__":
    main()
