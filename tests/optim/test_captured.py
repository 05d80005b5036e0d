"""What is noted at a renewal: the share of the gradient that the outgoing basis still held, and the time it took."""

import copy
import math

import pytest
import torch

from galore_torch import GaLore


@pytest.mark.parametrize("basis_bits", [16, 8])
def test_captured_is_the_share_of_the_gradient_that_the_basis_before_holds(basis_bits):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(24, 16))
    group = {"params": [weight], "rank": 4, "update_proj_gap": 1, "basis_bits": basis_bits}
    optimizer = GaLore([group], optimizer_class=torch.optim.SGD, lr=0.1)
    old, seconds = None, 0.0
    for _ in range(4):
        weight.grad = torch.randn(24, 16)
        optimizer.step()
        (told,) = optimizer.subspaces().values()
        if old is None:
            assert math.isnan(told.captured)
        else:
            expected = (weight.grad @ old).square().sum() / weight.grad.square().sum()
            assert told.captured == pytest.approx(float(expected), rel=1e-5)
        old = optimizer._trained_weight(weight).basis["right"].detach().clone()
        assert optimizer._outcomes.seconds > seconds
        seconds = optimizer._outcomes.seconds
    assert 0 < told.captured < 1
    assert copy.deepcopy(optimizer)._outcomes.seconds == 0
    assert optimizer._outcomes.seconds == seconds
