"""Bases that follow the gradient in every step: alike in all modes, resumed, and where there is none yet."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from galore_torch import GaLoreAdamW, attach
from galore_torch.optim.groups import projection_in
from galore_torch.projection import captured_energy, find_basis
from tests.modes import every_mode
from tests.optim.small import assert_same, snapshot, state_of, walk, weights

LAYOUTS = {
    "left": ((12, 20), {}),
    "right": ((20, 12), {}),
    "full": ((12, 20), {"proj_type": "full"}),
    "stack": ((3, 12, 20), {"layout": "stack"}),
    "tucker": ((12, 10, 3, 3), {}),
}


def made(trained, gap=1, **keys):
    group = {"params": trained, "rank": 4, "update_proj_gap": gap, "decomposition": "tracked", "moments": "rotate"}
    return GaLoreAdamW([{**group, **keys}], lr=0.05)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 12, bias=False)).double()


@every_mode
@pytest.mark.parametrize("gap", [1, 3])
def test_it_is_the_same_in_every_mode(mode, gap):
    ends = []
    for attached in (False, True):
        model = net()
        optimizer = made(list(model.parameters()), gap)
        if attached:
            attach(model, optimizer, *mode)
        for _ in range(8):
            model(torch.randn(16, 12, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([weight.detach() for weight in model.parameters()])
        if gap == 1:
            assert all(found.renewals == 8 for found in optimizer.subspaces().values())
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [16, 8])
def test_it_resumes_bit_for_bit(layout, bits):
    shape, keys = LAYOUTS[layout]
    trained = weights(shape)
    optimizer = made(trained, basis_bits=bits, **keys)
    walk(optimizer, trained, range(4))
    others = [nn.Parameter(weight.detach().clone()) for weight in trained]
    resumed = made(others, basis_bits=bits, **keys)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, each in ((optimizer, trained), (resumed, others)):
        walk(one, each, range(4, 9))
    assert_same(snapshot(resumed)[:2], snapshot(optimizer)[:2])


@pytest.mark.parametrize("layout", ["left", "right", "full", "stack"])
def test_it_comes_to_the_leading_directions_and_draws_nothing(layout):
    """Of one gradient again and again: the energy that each iteration captures grows to that of the exact basis."""
    shape, keys = LAYOUTS[layout]
    (weight,) = weights(shape, dtype=torch.float64)
    projection = projection_in(made([weight], **keys).param_groups[0], weight)
    exact = find_basis(projection, weight.detach(), "svd", seed=0)
    most = float(captured_energy(projection, weight.detach(), exact))
    basis = find_basis(projection, torch.randn(shape, dtype=torch.float64), "svd", seed=0)
    held = [float(captured_energy(projection, weight.detach(), basis))]
    for seed in range(60):
        known = {"old": basis, "old_is_whole": True}
        basis = find_basis(projection, weight.detach(), "tracked", seed=seed, **known)
        assert_same(basis, find_basis(projection, weight.detach(), "tracked", seed=seed + 100, **known))
        held.append(float(captured_energy(projection, weight.detach(), basis)))
    assert all(after > before - 1e-9 for before, after in pairwise(held))
    assert held[0] < 0.9 * most
    assert held[-1] > 0.98 * most


def test_a_basis_that_lacks_directions_is_filled_first():
    (weight,) = weights((12, 20))
    optimizer = made([weight])
    weight.grad = torch.outer(torch.randn(12), torch.randn(20))
    optimizer.step()
    assert state_of(optimizer, weight)["lacking"] != 0
    walk(optimizer, [weight], range(1, 4))
    assert state_of(optimizer, weight)["lacking"] == 0
    basis = optimizer.state[weight]["basis"]["left"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4), rtol=0, atol=1e-5)
