"""Residuals, moments and normalized updates that cannot be had are refused before anything changes."""

import pytest
import torch
from torch import nn

from galore_torch import GaLore, GaLoreAdamW, ProjectedGradient, attach
from galore_torch.group_keys import KEYS
from galore_torch.optim.groups import projection_in
from tests.optim.small import weights


@pytest.mark.parametrize("residual", KEYS["residual"].choices)
def test_a_gradient_that_was_projected_is_refused(residual):
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12))
    matrices = [model[0].weight, model[1].weight]
    optimizer = GaLoreAdamW(
        [{"params": matrices, "rank": 4, "residual": residual}, {"params": [model[0].bias, model[1].bias]}]
    )
    for gradients in ("fused", "projected"):
        with pytest.raises(ValueError, match=rf"residual is '{residual}'.*gradients=\"full\""):
            attach(model, optimizer, gradients)
    attach(model, optimizer, "full").remove()
    weight = matrices[0]
    basis = {"left": torch.linalg.qr(torch.randn(12, 4)).Q, "right": torch.linalg.qr(torch.randn(12, 4)).Q}
    weight.grad = ProjectedGradient.of(torch.randn(20, 12), projection_in(optimizer.param_groups[0], weight), basis)
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=rf"residual is '{residual}'.*projected"):
        optimizer.step()
    assert torch.equal(weight, before)


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=0.1)


class SquareOfRate(torch.optim.SGD):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"] ** 2)


class WithMemory(torch.optim.SGD):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["memory"] = parameter.grad + state.get("memory", 0)
                parameter.sub_(state["memory"], alpha=group["lr"])


@pytest.mark.parametrize("rule", [WithoutRate, SquareOfRate])
@pytest.mark.parametrize("keys", [{"residual": "full"}, {"normalize": "columns"}])
def test_a_rule_that_is_not_its_rate_times_a_direction_is_refused(rule, keys):
    with pytest.raises(ValueError, match=f"residual and normalize.*{rule.__name__}"):
        GaLore([{"params": weights((12, 20)), "rank": 4, **keys}], optimizer_class=rule)


def test_a_state_that_cannot_be_rotated_is_refused():
    group = {"params": weights((12, 20)), "rank": 4, "moments": "rotate"}
    with pytest.raises(ValueError, match=r"moments is 'rotate'.*WithMemory keeps memory"):
        GaLore([group], optimizer_class=WithMemory, lr=0.1)
