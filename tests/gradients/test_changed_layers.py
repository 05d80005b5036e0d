"""Layers that get another weight or bias once they are attached: pruned, parametrized, lent, or tied to a plain one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune, weight_norm

from galore_torch import GaLoreSGD, attach, param_groups
from tests.modes import every_mode


class Attention(nn.Module):
    """Three layers that share an input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.table = nn.Embedding(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table(torch.arange(len(x)) % 16)
        return self.o(self.q(x) * self.k(x) + self.v(x))


Step = Callable[[Attention, Tensor], Tensor]


def trained(
    mode: tuple[str, str] | None, change: Callable[[Attention], object], loss: Step, *, is_compiled: bool = False
) -> list[Tensor]:
    """The weights that the optimizer holds, after steps before and after a change of the layers."""
    torch.manual_seed(0)
    model = Attention()
    groups = param_groups(model, rank=4, target_modules="all-linear", update_proj_gap=3, proj_type="right")
    optimizer = GaLoreSGD(groups, lr=0.1, momentum=0.9)
    held = list(model.parameters())
    if mode is not None:
        attach(model, optimizer, *mode)
    run = torch.compile(model, backend="eager") if is_compiled else model
    for step in range(7):
        if step == 3:
            change(model)
        loss(run, torch.randn(32, 16)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach() for weight in held]


def plainly(model: Attention, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


CHANGES: dict[str, Callable[[Attention], object]] = {
    "weight pruned": lambda model: prune.l1_unstructured(model.k, "weight", 0.5),
    "bias pruned": lambda model: prune.l1_unstructured(model.k, "bias", 0.5),
    "weight_norm": lambda model: parametrizations.weight_norm(model.v),
    "weight_norm, the old one": lambda model: weight_norm(model.v),
    "tied to one that is not projected": lambda model: setattr(model.v, "weight", model.table.weight),
    "orthogonal": lambda model: parametrizations.orthogonal(model.o),
}


@every_mode
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_trains_as_without_attach(mode: tuple[str, str], change: Callable[[Attention], object]):
    plain = trained(None, change, plainly)
    torch.testing.assert_close(trained(mode, change, plainly), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", ["weight pruned", "bias pruned", "tied to one that is not projected"])
def test_a_compiled_model_trains_so_too(change: str):
    plain = trained(None, CHANGES[change], plainly)
    fused = trained(("fused", "step"), CHANGES[change], plainly, is_compiled=True)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)


@every_mode
def test_a_layer_takes_the_weights_that_functional_call_lends_it(mode: tuple[str, str]):
    def of_lent(model: Attention, x: Tensor) -> Tensor:
        lent = {name: weight * 1.1 for name, weight in model.named_parameters()}
        return (functional_call(model, lent, (x,)) - 1).square().mean()

    plain = trained(None, lambda _: None, of_lent)
    torch.testing.assert_close(trained(mode, lambda _: None, of_lent), plain, rtol=1e-4, atol=1e-6)
