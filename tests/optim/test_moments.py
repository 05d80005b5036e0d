"""What becomes of the optimizer's state when a basis is renewed."""

import pytest
import torch

from galore_torch import GaLore, GaLoreAdamW, GaLoreAdamW8bit
from galore_torch.optim.recipes import eight_bit
from galore_torch.optim.state_keys import BASIS, INNER, STEP
from galore_torch.optim.trained_weight import TrainedWeight
from tests.optim.small import gradient, walk, weights


def test_reset_lets_the_optimizer_begin_anew_at_each_renewal():
    (weight,) = weights((12, 20))
    group = {"params": [weight], "rank": 4, "update_proj_gap": 3, "moments": "reset", "stagger": False}
    optimizer = GaLoreAdamW([group], lr=0.1)
    steps = []
    for step in range(8):
        walk(optimizer, [weight], [step])
        steps.append(int(optimizer.state[weight][INNER]["step"]))
    assert steps == [1, 2, 3, 1, 2, 3, 1, 2]
    assert optimizer.state[weight][STEP] == 8


def test_rotated_moments_are_those_of_the_new_basis():
    (weight,) = weights((12, 20), dtype=torch.float64)
    group = {"params": [weight], "rank": 4, "update_proj_gap": 3, "moments": "rotate", "stagger": False}
    optimizer = GaLore(
        [{**group, "decomposition": "svd"}], optimizer_class=torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True
    )
    walk(optimizer, [weight], range(3))
    state = optimizer.state[weight]
    before = state[BASIS]["left"] @ state[INNER]["momentum_buffer"]
    walk(optimizer, [weight], [3])
    found, basis = state[INNER]["momentum_buffer"], state[BASIS]["left"]
    torch.testing.assert_close(found, basis.mT @ (0.9 * before + gradient(weight, 3, 0)))


@pytest.mark.parametrize("slices", [False, True])
def test_moments_in_eight_bits_are_rotated_through_their_codes(slices, monkeypatch):
    if slices:
        monkeypatch.setattr(eight_bit, "_SLICE_ELEMENTS", 4096)
    ends = []
    for kind in (GaLoreAdamW, GaLoreAdamW8bit):
        (weight,) = weights((128, 256))
        group = {"params": [weight], "rank": 64, "update_proj_gap": 3, "moments": "rotate", "stagger": False}
        optimizer = kind([group], lr=0.01, weight_decay=0.0)
        walk(optimizer, [weight], range(8))
        ends.append(weight.detach())
    moved = ends[0] - weights((128, 256))[0]
    assert (ends[1] - ends[0]).norm() < 0.1 * moved.norm()


def test_a_reset_waits_with_a_step_that_is_left_out(monkeypatch):
    """The gradient is finite where the basis is renewed, and what is projected is not."""
    (weight,) = weights((12, 20))
    group = {"params": [weight], "rank": 4, "update_proj_gap": 3, "moments": "reset", "stagger": False}
    optimizer = GaLoreAdamW([group], lr=0.1, skip_nonfinite=True)
    walk(optimizer, [weight], range(3))
    with monkeypatch.context() as patched:
        patched.setattr(TrainedWeight, "inner_grad", lambda one: torch.full((4, 20), float("inf")))
        walk(optimizer, [weight], [3])
    assert int(optimizer.state[weight][INNER]["step"]) == 3
    walk(optimizer, [weight], [4])
    assert int(optimizer.state[weight][INNER]["step"]) == 1
