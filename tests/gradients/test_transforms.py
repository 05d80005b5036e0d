"""Derivatives by torch.func and in forward mode, through a model that is attached: those of plain layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

from galore_torch import GaLoreAdamW, attach, param_groups
from tests.modes import every_mode


def of_weights(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    held = {name: weight.detach() for name, weight in model.named_parameters()}
    return grad(lambda given: functional_call(model, given, (x,)).square().mean())(held)


def of_weights_by_row(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    held = {name: weight.detach() for name, weight in model.named_parameters()}
    by_row = vmap(grad(lambda given, row: functional_call(model, given, (row,)).square().mean()), (None, 0))
    return by_row(held, x)


def of_inputs(model: nn.Module, x: Tensor) -> Tensor:
    return grad(lambda given: model(given).square().sum())(x)


def by_rows(model: nn.Module, x: Tensor) -> Tensor:
    return vmap(model)(x)


def in_reverse(model: nn.Module, x: Tensor) -> Tensor:
    return jacrev(model)(x)


def forward(model: nn.Module, x: Tensor) -> Tensor:
    return jvp(model, (x,), (torch.ones_like(x),))[1]


def dual(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@every_mode
@pytest.mark.broad
@pytest.mark.parametrize("steps", [0, 2, 3])  # before the first basis, with one, and where it is to be renewed
@pytest.mark.parametrize(
    "derivative",
    [of_weights, of_weights_by_row, of_inputs, by_rows, in_reverse, forward, dual],
    ids=lambda one: one.__name__,
)
def test_it_is_that_of_plain_layers(mode: tuple[str, str], steps: int, derivative: Callable[..., object], device: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).to(device, torch.float64)
    groups = param_groups(model, rank=4, target_modules="all-linear", update_proj_gap=3, stagger=False)
    optimizer = GaLoreAdamW(groups, lr=1e-2)
    attach(model, optimizer, *mode)
    x = torch.randn(5, 16, dtype=torch.float64, device=device)
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).to(device, torch.float64)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(derivative(model, x), derivative(plain, x))
    assert all(weight.grad is None for weight in model.parameters())
