"""What one step does: where decay acts, which weights are stepped together, and what random numbers depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer

from galore_torch import GaLore, GaLoreAdamW, GaLoreSGD, devices
from galore_torch.optim import chunks
from galore_torch.optim.groups import projection_in
from galore_torch.projection import DECOMPOSITIONS
from tests.optim.recipes import every_recipe
from tests.optim.small import assert_same, distance, gradient, groups, mixed, state_of, walk, weights

pytestmark = pytest.mark.filterwarnings("ignore:rank .* saves no memory")
LR, DECAY, SCALE = 0.1, 0.3, 0.25


# Decay acts on W -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [LR, torch.tensor(LR)], ids=["number", "tensor"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", [(24, 16), (8, 6, 5, 5)])
@pytest.mark.broad
def test_adamw_decays_the_weight_before_the_update(shape, maximize, lr):
    """W <- (1 - lr * decay) W - scale * lr * P n, where n is the normalized direction: the whole weight decays."""
    (start,), (weight,) = weights(shape), weights(shape)
    optimizer = GaLoreAdamW(groups([weight]), lr=lr, weight_decay=DECAY, maximize=maximize, eps=0.0)
    walk(optimizer, [weight], [0])
    basis = optimizer.state[weight]["basis"]
    projected = start.detach() * 0 + gradient(start, 0, 0)
    projection = projection_in(optimizer.param_groups[0], weight)
    direction = projection.project_back(projection.project(projected, basis).sign(), basis)  # Adam's first step
    sign = -1 if maximize else 1
    torch.testing.assert_close(weight.detach(), (1 - LR * DECAY) * start - sign * SCALE * LR * direction)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_sgd_decays_through_the_gradient(proj_type, maximize):
    """L2: the projected gradient is that of G + decay * W (-G + decay * W to maximize, as torch's SGD)."""
    (start,), (weight,) = weights((24, 16)), weights((24, 16))
    arguments = {"lr": LR, "momentum": 0.9, "weight_decay": DECAY, "maximize": maximize}
    optimizer = GaLoreSGD(groups([weight], proj_type=proj_type), **arguments)
    expected, momentum = start.detach().clone(), 0.0
    for step in range(3):
        walk(optimizer, [weight], [step])
        basis = optimizer.state[weight]["basis"]
        projection = projection_in(optimizer.param_groups[0], weight)
        grad = (-1 if maximize else 1) * gradient(start, step, 0) + DECAY * expected
        momentum = 0.9 * momentum + projection.project(grad, basis)
        expected -= SCALE * LR * projection.project_back(momentum, basis)
    torch.testing.assert_close(weight.detach(), expected)


def test_a_group_may_have_a_decay_of_its_own():
    trained = weights((24, 16), (24, 16))
    made = [{"params": [trained[0]], "rank": 4, "weight_decay": 0.0}, {"params": [trained[1]], "rank": 4}]
    optimizer = GaLoreAdamW(made, lr=LR, weight_decay=DECAY)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    start = weights((24, 16), (24, 16))
    assert_same(trained[0], start[0])
    torch.testing.assert_close(trained[1], start[1] * (1 - LR * DECAY))


# Many weights in one call, or in many --------------------------------------------------------------------------------


class Counted(SGD):
    """Counts how often it is called, and with how many parameters."""

    calls: list[int] = []  # noqa: RUF012 (of all instances, on purpose)

    def step(self, closure=None):
        Counted.calls.append(sum(len(group["params"]) for group in self.param_groups))
        return super().step(closure)


class JointlyNormalized(Optimizer):
    """Divides by the norm of all gradients together: stepping one parameter after the other is another rule."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        moved = [parameter for group in self.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in moved])
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad / norm)


@every_recipe
@pytest.mark.broad("GaLoreAdamW", "GaLoreAdafactor", "GaLoreAdamW8bit", "GaLore Muon")
def test_many_chunks_end_where_one_ends(recipe, monkeypatch):
    ends = []
    for elements in (1, 150, 2**23):
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", elements)
        trained, made = mixed()
        optimizer = recipe(made)
        walk(optimizer, trained, range(5))
        ends.append((trained, [optimizer.state[weight] for weight in trained]))
    assert_same(ends[0], ends[2])
    assert_same(ends[1], ends[2])


def test_chunks_hold_as_many_weights_as_fit(monkeypatch):
    """Coordinates of 96, 96, 128 and 16 numbers, at most 200 together, or one weight alone."""
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 200)
    monkeypatch.setattr(devices, "ON_GPU", 200)
    trained, made = mixed()
    optimizer = GaLore(made, Counted, lr=0.1)
    Counted.calls = []
    walk(optimizer, trained, [0])
    assert Counted.calls == [2, 2]


def test_a_rule_that_looks_at_all_parameters_gets_them_in_one_call(monkeypatch, identity_basis):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 1)
    ours, theirs, start = (weights((24, 16), (16, 24), (8,)) for _ in range(3))
    optimizer = GaLore([{"params": ours[:2], **identity_basis}, {"params": ours[2:]}], JointlyNormalized, lr=1.0)
    plain = JointlyNormalized(theirs, lr=1.0)
    walk(optimizer, ours, range(3))
    walk(plain, theirs, range(3))
    assert distance(theirs, start) > 0.01
    assert distance(ours, theirs) <= 1e-6


# Weights of any strides, and scaled losses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "order", "keys"),
    [
        ((24, 16), (1, 0), {}),
        ((24, 16), (1, 0), {"proj_type": "full"}),
        ((3, 12, 8), (1, 0, 2), {"layout": "stack"}),
        ((3, 2, 12, 8), (1, 0, 2, 3), {"layout": "stack"}),
        ((8, 6, 5, 5), (0, 2, 3, 1), {}),
        ((8, 6, 5, 5), (0, 2, 3, 1), {"layout": "reshape"}),
    ],
)
def test_a_weight_of_other_strides_moves_alike(shape, order, keys):
    """Its axes lie in memory in another order, as those of a transposed matrix or of a channels-last convolution."""
    (weight,), (start,) = weights(shape), weights(shape)
    back = sorted(range(len(order)), key=order.__getitem__)
    strided = torch.nn.Parameter(start.detach().permute(order).contiguous().permute(back))
    assert not strided.is_contiguous()
    for one in (weight, strided):
        walk(GaLoreAdamW(groups([one], **keys), lr=LR, weight_decay=DECAY), [one], range(3))
    assert distance([weight], [start]) > 0.01
    torch.testing.assert_close(strided, weight, rtol=1e-5, atol=1e-6)


def test_a_loss_scaler_changes_nothing_and_keeps_infinities_out(device):
    ends = []
    for scaled in (True, False):
        trained, made = mixed()
        optimizer = GaLoreAdamW(made, lr=LR)
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=scaled)
        for step in range(4):
            if step != 2 or scaled:
                loss = sum((weight * gradient(weight, step, i)).sum() for i, weight in enumerate(trained))
                scaler.scale(loss * float("inf") if step == 2 else loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        ends.append((trained, [optimizer.state[weight] for weight in trained]))
    assert_same(*ends)
    assert ends[0][1][0]["step"] == 3


# Renewals ------------------------------------------------------------------------------------------------------------


def renewed_in(trained: list[Any], made: list[Any], steps: int) -> list[list[int]]:
    """In which steps each projected weight got a new basis."""
    optimizer = GaLoreSGD(made, lr=0.1)
    found: list[list[int]] = [[] for _ in trained]
    for step in range(steps):
        walk(optimizer, trained, [step])
        for index, weight in enumerate(trained):
            if optimizer.state[weight]["renewed_step"] == step:
                found[index].append(step)
    return found


def test_all_weights_renew_at_once_or_take_turns():
    trained = weights(*[(12, 8)] * 4)
    assert renewed_in(trained, groups(trained, update_proj_gap=8, stagger=False), 20) == [[0, 8, 16]] * 4
    assert renewed_in(trained, groups(trained, update_proj_gap=8), 20) == [
        [0, 2, 10, 18],
        [0, 4, 12],
        [0, 6, 14],
        [0, 8, 16],
    ]


def test_turns_are_taken_across_groups():
    trained = weights(*[(12, 8)] * 4)
    halves = (groups(half, update_proj_gap=8) for half in (trained[:2], trained[2:]))
    made = [*next(halves), {"params": [], "lr": 0.1}, *next(halves)]
    assert renewed_in(trained, made, 10) == [[0, 2], [0, 4], [0, 6], [0, 8]]


@pytest.mark.parametrize("miss", [None, float("nan"), 0.0], ids=["no gradient", "not finite", "zero"])
def test_a_missed_turn_stays_due(miss):
    trained = weights((24, 16), (24, 16))
    optimizer = GaLoreSGD(groups(trained, update_proj_gap=4, stagger=False), lr=0.1, skip_nonfinite=True)
    walk(optimizer, trained, range(4))
    trained[0].grad = None if miss is None else torch.full_like(trained[0], miss)
    trained[1].grad = gradient(trained[1], 4, 1)
    optimizer.step()
    assert [state_of(optimizer, weight)["renewals"] for weight in trained] == [1, 2]
    walk(optimizer, trained, [5])
    assert [state_of(optimizer, weight)["renewals"] for weight in trained] == [2, 2]
    walk(optimizer, trained, range(6, 8))
    assert [state_of(optimizer, weight)["renewals"] for weight in trained] == [2, 2]


# Random numbers ------------------------------------------------------------------------------------------------------

randomly = pytest.mark.parametrize("decomposition", [name for name in DECOMPOSITIONS if name != "svd"])


def bases(decomposition: str, *, seed: int = 0, present: tuple[int, ...] = (0, 1, 2), steps: int = 2) -> list[Any]:
    """The bases of three weights of one shape that meet the same gradients; `present` have one in each step."""
    trained = weights(*[(24, 16)] * 3)
    optimizer = GaLoreSGD(groups(trained, decomposition=decomposition, update_proj_gap=1), lr=0.1, seed=seed)
    for step in range(steps):
        for index in present:
            trained[index].grad = gradient(trained[index], step, 0)
        optimizer.step()
    return [optimizer.state[trained[index]]["basis"]["right"] for index in present]


@randomly
def test_random_numbers_come_from_the_seed_and_not_from_torch(decomposition):
    state = torch.get_rng_state()
    first = bases(decomposition)
    assert_same(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert_same(bases(decomposition), first)
    assert not torch.equal(bases(decomposition, seed=1)[0], first[0])


@randomly
def test_random_numbers_do_not_depend_on_what_other_weights_do(decomposition):
    assert_same(bases(decomposition, present=(2,))[0], bases(decomposition)[2])


@randomly
def test_random_numbers_differ_from_weight_to_weight_and_from_renewal_to_renewal(decomposition):
    one, other, _ = bases(decomposition, steps=1)
    assert not torch.equal(one, other)
    later = bases("random", steps=2)[0]
    assert (later.T @ bases("random", steps=1)[0]).norm() < 1.9  # it would be 2 for one and the same subspace


def test_a_resumed_run_draws_the_same_random_numbers():
    trained, made = mixed(decomposition="random", update_proj_gap=1)
    optimizer = GaLoreSGD(made, lr=0.1)
    walk(optimizer, trained, range(2))
    other, made = mixed(decomposition="random", update_proj_gap=1)
    resumed = GaLoreSGD(made, lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    walk(optimizer, trained, [2])
    walk(resumed, other, [2])
    for weight, twin in zip(trained[:2], other[:2], strict=True):
        assert_same(optimizer.state[weight]["basis"], resumed.state[twin]["basis"])


# The closure ---------------------------------------------------------------------------------------------------------


def test_the_closure_computes_gradients():
    (weight,) = weights((24, 16))
    optimizer = GaLoreSGD(groups([weight]), lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
