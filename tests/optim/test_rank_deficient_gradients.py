"""Gradients of fewer directions than the rank: an idle expert, two tokens, a first batch that says little."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from galore_torch import GaLoreAdamW, GaLoreSGD
from tests.optim.small import assert_same, state_of

DECOMPOSITIONS = ("svd", "randomized", "warm")
every_decomposition = pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
STORED = [{}, {"basis_bits": 8, "basis_group_size": 32}]


def captured(weight: Tensor, optimizer: GaLoreSGD, grad: Tensor) -> float:
    """The share of a gradient's energy by which plain descent at rate 1 moves the weight."""
    before = weight.detach().clone()
    weight.grad = grad.clone()
    optimizer.step()
    return float(((before - weight.detach()) * grad).sum() / grad.square().sum())


def descent(weight: torch.nn.Parameter, **keys) -> GaLoreSGD:
    return GaLoreSGD([{"params": [weight], "rank": 8, "scale": 1.0, "stagger": False, **keys}], lr=1.0)


@every_decomposition
@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("tokens_at", [0, 5], ids=["first", "at a renewal"])
@pytest.mark.broad
def test_a_batch_of_two_tokens_costs_one_step_at_most(decomposition, proj_type, stored, tokens_at):
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 8)).Q for size in (40, 32))
    weight = torch.nn.Parameter(torch.zeros(40, 32))
    optimizer = descent(weight, update_proj_gap=5, proj_type=proj_type, decomposition=decomposition, **stored)
    shares = []
    for step in range(10):
        tokens = 2 if step == tokens_at else 100
        grad = left @ torch.randn(8, tokens) @ torch.randn(tokens, 8) @ right.T
        shares.append(captured(weight, optimizer, grad))
    assert min(shares) > (0.95 if stored else 0.9999)
    assert optimizer.state[weight]["renewals"] == 2
    assert optimizer.state[weight]["lacking"] == 0


@every_decomposition
def test_an_expert_waits_for_its_first_gradient_while_the_others_take_their_turns(decomposition):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(3, 24, 16))
    optimizer = descent(weight, rank=4, update_proj_gap=4, layout="stack", decomposition=decomposition)
    for step in range(11):
        grad = torch.randn(3, 24, 4) @ torch.randn(3, 4, 16)
        if step < 9:
            grad[2] = 0
        before = optimizer.state[weight]["basis"]["right"].clone() if step else None
        share = captured(weight, optimizer, grad)
        state = state_of(optimizer, weight)
        changed = None if before is None else (state["basis"]["right"] != before).flatten(1).any(1).tolist()
        assert changed in ([None] if not step else [[step % 4 == 0] * 2 + [step == 9]])
        assert state["renewals"] == 1 + step // 4
        assert state["lacking"] == (4 if step < 9 else 0)
        if step % 4 == 0 and step < 9:
            assert share > 0.9999
    assert captured(weight, optimizer, torch.cat((torch.zeros(2, 24, 16), grad[2:]))) < 1  # it has a basis of its own
    assert state["basis"]["right"][2].any()


def test_what_always_says_little_is_asked_twice_and_then_at_its_turns():
    torch.manual_seed(0)
    direction = torch.randn(24, 2)
    weight = torch.nn.Parameter(torch.zeros(24, 16))
    optimizer = descent(weight, update_proj_gap=4)
    due = []
    for _ in range(9):
        due.append(optimizer._trained_weight(weight).needs_renewal)
        assert captured(weight, optimizer, direction @ torch.randn(2, 2) @ torch.eye(2, 16)) > 0.9999
    assert due == [True, True, False, False, True, False, False, False, True]
    assert optimizer.state[weight]["lacking"] == -6


def test_what_no_gradient_has_told_moves_nothing():
    """Adam would make whole steps of the rounding there."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(24, 16))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 8}], lr=0.1, weight_decay=0.0)
    row = torch.randn(1, 16)
    for _ in range(3):
        weight.grad = torch.randn(24, 1) @ row
        optimizer.step()
    assert torch.linalg.matrix_rank(weight.detach(), rtol=1e-4) == 1
    assert_same(optimizer.state[weight]["inner"]["exp_avg"][:, 1:], torch.zeros(24, 7))
