"""What an optimizer writes into its parameter group is kept: once a step, however it is made, and in checkpoints."""

from __future__ import annotations

import copy
import io

import bitsandbytes
import pytest
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from galore_torch import GaLore, GaLoreAdamW, attach, param_groups
from galore_torch.optim import chunks
from tests.optim.small import assert_same, gradient, refusing, walk, weights

pytestmark = pytest.mark.filterwarnings("ignore:rank .* saves no memory", "ignore:.*rank.*:UserWarning")


class CountsInGroup(Optimizer):
    """Adam that counts its steps in the group, in a number or in a tensor that it changes in place."""

    def __init__(self, params, lr=1e-2, in_tensor=False):
        super().__init__(params, {"lr": lr, "in_tensor": in_tensor})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if group["in_tensor"]:
                group.setdefault("step", torch.zeros((), dtype=torch.int64)).add_(1)
            else:
                group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["lr"], int(group["step"]))

    def _move(self, parameter, lr, step):
        state = self.state[parameter]
        if not state:
            state["m"], state["v"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["m"].lerp_(parameter.grad, 0.1)
        state["v"].lerp_(parameter.grad.square(), 0.001)
        parameter.sub_(lr * (state["m"] / (1 - 0.9**step)) / ((state["v"] / (1 - 0.999**step)).sqrt() + 1e-8))


class CountsInItself(CountsInGroup):
    """The same with a count that no checkpoint holds."""

    made = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.made += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                self._move(parameter, group["lr"], self.made)


SHAPES = ((12, 8), (8, 12), (8,))
both_kinds = pytest.mark.parametrize("in_tensor", [False, True], ids=["number", "tensor"])


def rest_at_times(optimizer: Optimizer, trained: list[Tensor]) -> None:
    """Nine steps, in some of which a weight, a group or all have no gradient."""
    for step in range(9):
        for index, weight in enumerate(trained):
            absent = (step == 2 and index == 0) or (step in (0, 4) and index == 2) or step == 6
            weight.grad = None if absent else gradient(weight, step, index)
        optimizer.step()


@both_kinds
@pytest.mark.parametrize("elements", [1, 2**23])
def test_it_is_the_optimizer_alone(in_tensor, elements, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", elements)
    ours, theirs = weights(*SHAPES), weights(*SHAPES)
    galore = GaLore([{"params": ours[:2]}, {"params": ours[2:]}], CountsInGroup, in_tensor=in_tensor)
    alone = CountsInGroup([{"params": theirs[:2]}, {"params": theirs[2:]}], in_tensor=in_tensor)
    rest_at_times(galore, ours)
    rest_at_times(alone, theirs)
    assert_same([weight.detach() for weight in ours], [weight.detach() for weight in theirs])
    assert [int(group["step"]) for group in galore.param_groups] == [9, 9]


@both_kinds
def test_a_checkpoint_holds_it(in_tensor):
    def made() -> tuple[list[torch.nn.Parameter], GaLore]:
        trained = weights(*SHAPES)
        groups = [{"params": trained[:1], "rank": 4}, {"params": trained[1:]}]
        return trained, GaLore(groups, CountsInGroup, in_tensor=in_tensor)

    trained, optimizer = made()
    walk(optimizer, trained, range(5))
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [weight.detach() for weight in trained]], file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    twins, resumed = made()
    resumed.load_state_dict(state)
    with torch.no_grad():
        for twin, value in zip(twins, values, strict=True):
            twin.copy_(value)
    walk(optimizer, trained, range(5, 9))
    walk(resumed, twins, range(5, 9))
    assert_same([weight.detach() for weight in trained], [weight.detach() for weight in twins])


@both_kinds
def test_updates_inside_the_backward_count_one_step(in_tensor):
    ends = []
    for update in ("step", "backward"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 16))
        groups = param_groups(model, rank=4, target_modules="all-linear")
        optimizer = GaLore(groups, CountsInGroup, in_tensor=in_tensor)
        data = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
        with attach(model, optimizer, gradients="fused", update=update):
            for _ in range(6):
                model(data).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(copy.deepcopy(model.state_dict()))
        assert {int(group["step"]) for group in optimizer.param_groups} == {6}
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_what_is_kept_elsewhere_is_refused_by_name():
    message = refusing(lambda: GaLore([{"params": weights((8, 6)), "rank": 2}], CountsInItself))
    assert "CountsInItself cannot run inside GaLore" in message
    assert "in another place" in message


def test_settings_of_single_weights_hold_inside():
    """bitsandbytes' manager: 32 bits for one weight, whatever its place in a call."""
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    trained = weights((64, 64), (64, 64))
    try:
        manager.register_parameters(trained)
        manager.override_config(trained[1], "optim_bits", 32)
        optimizer = GaLore([{"params": trained, "rank": 64}], bitsandbytes.optim.AdamW8bit, lr=1e-3)
        walk(optimizer, trained, [0])
        kinds = [optimizer.state[weight]["inner"]["state1"].dtype for weight in trained]
        assert kinds == [torch.uint8, torch.float32]
    finally:
        manager.initialize()


# Rounding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"rank": 8, "scale": 1.0}], ids=["plain", "projected"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.broad
def test_small_updates_of_bfloat16_add_up_where_it_is_asked(rounding, keys):
    """Forty to a last digit; what float32 does with the same gradients is the reference."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
        asked = rounding if dtype is torch.bfloat16 else "nearest"
        optimizer = GaLoreAdamW([{"params": [weight], **keys}], lr=2e-4, rounding=asked)
        grad = 0.5 + torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
        for _ in range(100):
            weight.grad = grad.to(dtype)
            optimizer.step()
        moved[dtype] = weight.detach().float() - 1
    share = float((moved[torch.bfloat16] * moved[torch.float32]).sum() / moved[torch.float32].square().sum())
    if rounding == "nearest":
        assert share == 0
    else:
        assert share == pytest.approx(1, abs=0.15)  # moments in bfloat16 make other steps than those in float32


def test_draws_are_resumed_and_differ_from_seed_to_seed():
    ends = []
    for seed, saved in ((0, False), (0, True), (1, False)):
        trained = weights((24, 16), dtype=torch.bfloat16)
        made = [{"params": trained, "rank": 4, "decomposition": "svd"}]
        optimizer = GaLoreAdamW(made, lr=1e-4, rounding="stochastic", seed=seed)
        walk(optimizer, trained, range(3))
        if saved:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = GaLoreAdamW(made, lr=1e-4, rounding="stochastic", seed=seed)
            optimizer.load_state_dict(state)
        walk(optimizer, trained, range(3, 6))
        ends.append(trained[0].detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_a_rounding_without_effect_or_of_no_name_is_told():
    with pytest.warns(UserWarning, match="rounding='stochastic' has no effect"):
        GaLoreAdamW(weights((8, 6)), rounding="stochastic")
    assert "rounding is 'up'" in refusing(lambda: GaLoreAdamW(weights((8, 6)), rounding="up"))


def test_moments_in_float16_are_told():
    half = weights((24, 16), dtype=torch.float16)
    with pytest.warns(UserWarning, match="kept in float16"):
        GaLore([{"params": half, "rank": 4}], AdamW, lr=1e-3)
    GaLore([{"params": half, "rank": 4}], torch.optim.SGD, lr=1e-3)
    GaLore([{"params": half, "rank": 4}], AdamW, lr=1e-3, state_dtype=torch.float32)
