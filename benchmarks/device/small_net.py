"""A small network, its batches and its training: what correctness and waiting are looked at on."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from galore_torch import GaLore, attach, param_groups, quantize_weights

Make = Callable[[list[dict[str, Any]]], GaLore]
Mode = tuple[str, ...]
MODES: dict[str, Mode] = {
    "step()": (),
    "projected": ("projected",),
    "fused": ("fused",),
    "full, in the backward": ("full", "backward"),
    "fused, in the backward": ("fused", "backward"),
}
"""What `attach` gets after model and optimizer; nothing is attached for the first."""


class Net(nn.Module):
    """Three projected layers with a head that is not; the same numbers at every call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.ModuleList([nn.Linear(48, 96), nn.Linear(96, 48), nn.Linear(48, 48)])
        self.head = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of a batch."""
        for layer in self.mlp:
            x = torch.tanh(layer(x))
        y: Tensor = self.head(x)
        return y


def batches(model: nn.Module, steps: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of these steps in the model's dtype and on its device, drawn on the CPU in float64."""
    like = next(model.parameters())
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        drawn = (torch.randn(64, size, generator=generator, dtype=torch.float64) for size in (48, 32))
        x, y = (one.to(like.device, like.dtype) for one in drawn)
        yield x, y


def build(
    make: Make, device: str, dtype: torch.dtype, mode: Mode = (), *, in_int8: bool = False, **keys: Any
) -> tuple[Net, GaLore]:
    """Return the network and its optimizer, attached in a mode; keys are those of the projected group."""
    model = Net().to(device, dtype)
    if in_int8:
        quantize_weights(model, "all-linear")
    optimizer = make(param_groups(model, **{"rank": 6, **keys}))
    if mode:
        attach(model, optimizer, *mode)  # type: ignore[arg-type]
    return model, optimizer


def train(model: nn.Module, optimizer: GaLore, steps: Iterable[int]) -> None:
    """Make these steps."""
    for x, y in batches(model, steps):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def flat(model: nn.Module) -> Tensor:
    """All weights in one vector of float64 on the CPU."""
    return torch.cat([weight.detach().cpu().double().flatten() for weight in model.parameters()])
