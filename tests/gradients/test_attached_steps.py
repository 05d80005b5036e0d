"""`step()` with projected gradients: compiled, and after one has overflowed."""

from __future__ import annotations

import pytest
import torch

from galore_torch import GaLoreAdamW, param_groups
from galore_torch.gradients import attach
from tests.optim.small import assert_same


def test_a_compiled_step_is_the_plain_one():
    torch._dynamo.reset()
    ends = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 16))
        optimizer = GaLoreAdamW(param_groups(model, 4, "all-linear"), lr=1e-2)
        attach(model, optimizer, "projected")
        step = torch.compile(optimizer.step, backend="eager") if compiles else optimizer.step
        for _ in range(3):
            model(torch.randn(32, 16)).square().mean().backward()
            step()
            optimizer.zero_grad()
        ends.append([weight.detach().clone() for weight in model.parameters()])
    assert_same(*ends)


@pytest.mark.parametrize("position", [(0, 0), (5, 3), (23, 1)])
def test_a_projected_gradient_that_overflowed_anywhere_is_left_out(position):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24, bias=False))
    optimizer = GaLoreAdamW(param_groups(model, 4, "all-linear"), lr=1e-2, skip_nonfinite=True)
    attach(model, optimizer, "projected")
    for step in range(2):
        optimizer.zero_grad()
        model(torch.randn(32, 16)).square().mean().backward()
        if step:
            model[0].weight.grad.projected[position] = float("inf")
            before = model[0].weight.detach().clone()
        optimizer.step()
    assert_same(model[0].weight.detach(), before)
    assert list(optimizer.nonfinite_counts().values()) == [1]


def test_no_state_is_tried_that_steps_inside_the_backward_have_made(monkeypatch):
    def tried(*_):
        raise AssertionError("a state that was just made is tried on a copy")

    monkeypatch.setattr("galore_torch.optim.state_checks.fit", tried)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 16))
    optimizer = GaLoreAdamW(param_groups(model, 4, "all-linear"), lr=1e-2)
    attach(model, optimizer, "fused", "backward")
    for _ in range(2):
        model(torch.randn(32, 16)).square().mean().backward()
        optimizer.step()
