"""The named recipes: what trainers call them with, and the rules they promise."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.optim import SGD, AdamW

from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreMuon, GaLoreSGD
from galore_torch.projection import DECOMPOSITIONS
from tests.optim.small import assert_same, distance, gradient, groups, mixed, refusing, tensors_in, walk, weights

pytestmark = pytest.mark.filterwarnings("ignore:rank .* saves no memory")

CLASSES = [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor, GaLoreMuon, GaLoreSGD]
SHAPES = ((24, 16), (16, 24), (16,))
LR = 0.05


# How they are called -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", CLASSES)
def test_every_argument_has_a_name(recipe):
    """Trainers keep of their arguments those that the signature names."""
    parameters = inspect.signature(recipe).parameters.values()
    assert {one.kind for one in parameters} <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    names = [one.name for one in parameters]
    assert names[:2] == ["params", "lr"]
    assert {"weight_decay", "state_dtype", "skip_nonfinite", "seed"} <= set(names)
    assert all(f"{name}:" in recipe.__doc__ for name in names)
    with pytest.raises(TypeError, match="unknown"):
        recipe(mixed()[1], unknown=1)


ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
CALLS = [
    # Transformers
    (GaLoreAdamW, {"lr": 1e-3}),
    (GaLoreAdamW8bit, {"lr": 1e-3}),
    (GaLoreAdafactor, {"lr": 1e-3, "scale_parameter": False, "relative_step": False}),
    (GaLoreAdafactor, {"lr": 1e-3}),
    # LLaMA-Factory: the arguments of the optimizer that stands behind the name
    (GaLoreAdamW, ADAM),
    (GaLoreAdamW, {**ADAM, "fused": True}),
    (GaLoreAdamW8bit, {**ADAM, "optim_bits": 8}),
    (GaLoreAdamW8bit, {**ADAM, "optim_bits": 8, "is_paged": False}),
    (GaLoreAdafactor, {"lr": 1e-3, "scale_parameter": False, "relative_step": False}),
    # galore-torch 1.0
    (GaLoreAdamW, {**ADAM, "weight_decay": 0.1, "correct_bias": True, "no_deprecation_warning": True}),
    (GaLoreAdafactor, {"lr": None, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None}),
]


@pytest.mark.parametrize(("recipe", "arguments"), CALLS)
def test_trainers_can_call_it(recipe, arguments):
    """With three groups, two of which decay, and with the keys that all of them pass."""
    trained = weights(*SHAPES)
    start = [weight.detach().clone() for weight in trained]
    keys = {"rank": 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    made = [
        {"params": trained[2:], "weight_decay": 0.0},
        {"params": trained[1:2], "weight_decay": 0.1},
        {"params": trained[:1], "weight_decay": 0.1, **keys},
    ]
    optimizer = recipe(made, **arguments)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1, 0.1]
    walk(optimizer, trained, range(2))
    assert all(not torch.equal(weight, old) for weight, old in zip(trained, start, strict=True))


@pytest.mark.parametrize(
    ("recipe", "arguments", "reason"),
    [
        (GaLoreAdamW8bit, {"optim_bits": 4}, "optim_bits is 4"),
        (GaLoreAdafactor, {"beta1": 0.9}, "beta1 is 0.9"),
        (GaLoreAdafactor, {"relative_step": False}, "give a learning rate"),
        (GaLoreAdafactor, {"lr": 1e-3, "relative_step": True}, "leave out one of them"),
        (GaLoreAdafactor, {"lr": 1e-3, "warmup_init": True}, "warmup_init is True"),
        (GaLoreAdafactor, {"clip_threshold": 0.5}, "clip_threshold is 0.5"),
    ],
)
def test_what_cannot_be_served_is_told(recipe, arguments, reason):
    assert reason in refusing(lambda: recipe(mixed()[1], **arguments))


@pytest.mark.parametrize("recipe", [GaLoreAdamW, GaLoreAdamW8bit])
def test_eps_is_that_of_the_paper(recipe):
    optimizer = recipe(mixed()[1])
    assert optimizer.defaults["eps"] == optimizer.param_groups[0]["eps"] == 1e-8


def test_adamw_is_fused_where_torch_can():
    assert all(group["fused"] for group in GaLoreAdamW(mixed()[1]).param_groups)
    assert not GaLoreAdamW(mixed()[1], fused=False).param_groups[0]["fused"]
    elsewhere = [torch.nn.Parameter(torch.zeros(24, 16, device="meta"))]
    assert not GaLoreAdamW(groups(elsewhere)).param_groups[0]["fused"]


def test_without_a_rank_it_is_the_plain_optimizer():
    for ours, theirs in ((GaLoreAdamW, AdamW), (GaLoreSGD, SGD)):
        trained, expected = weights(*SHAPES), weights(*SHAPES)
        walk(ours(iter(trained), lr=LR, weight_decay=0.1), trained, range(3))
        walk(theirs(expected, lr=LR, weight_decay=0.1, fused=True if theirs is AdamW else None), expected, range(3))
        assert_same(trained, expected)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_sgd_of_full_rank_is_sgd(proj_type, decomposition):
    """Whatever the basis: an orthonormal one of full rank loses nothing."""
    shape = (16, 24) if proj_type == "left" else (24, 16) if proj_type == "right" else (16, 16)
    ours, theirs, start = weights(shape), weights(shape), weights(shape)
    keys = {"rank": 16, "scale": 1.0, "proj_type": proj_type, "decomposition": decomposition, "update_proj_gap": 2}
    walk(GaLoreSGD([{"params": ours, **keys}], lr=LR, weight_decay=0.1), ours, range(6))
    walk(SGD(theirs, lr=LR, weight_decay=0.1), theirs, range(6))
    assert distance(theirs, start) > 0.05
    assert distance(ours, theirs) <= 1e-6


# AdamW ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projected", [True, False])
def test_without_bias_correction(projected):
    """W <- (1 - lr * decay) W - lr * m / sqrt(v), the moments as they are."""
    (weight,), (expected,) = weights((24, 16)), weights((24, 16))
    made = groups([weight], decomposition="svd") if projected else [{"params": [weight]}]
    optimizer = GaLoreAdamW(made, lr=LR, weight_decay=0.1, eps=1e-30, correct_bias=False)
    m, v = 0.0, 0.0
    with torch.no_grad():
        for step in range(4):
            grad = gradient(weight, step, 0)
            if step == 0:
                basis = torch.linalg.svd(grad, full_matrices=False).Vh[:4].T if projected else torch.eye(16)
            m = 0.9 * m + 0.1 * (grad @ basis)
            v = 0.999 * v + 0.001 * (grad @ basis) ** 2
            expected *= 1 - LR * 0.1
            expected -= (0.25 if projected else 1.0) * LR * (m / v**0.5) @ basis.T
            walk(optimizer, [weight], [step])
    assert distance([expected], weights((24, 16))) > 0.05
    assert distance([weight], [expected]) < 1e-5


@pytest.mark.parametrize("place", [0, 3], ids=["projected", "plain"])
def test_a_second_moment_in_bfloat16_sticks_and_in_float32_does_not(place):
    """beta2 = 0.999 takes a thousandth off it in each step, less than half of bfloat16's last place."""
    fallen = {}
    for state_dtype in (None, torch.float32):
        trained, made = mixed(torch.bfloat16, update_proj_gap=100)
        optimizer = GaLoreAdamW(made, state_dtype=state_dtype)
        walk(optimizer, trained, [0])
        moment = optimizer.state[trained[place]]["inner"]["exp_avg_sq"]
        assert moment.dtype == (state_dtype or torch.bfloat16)
        before = moment.clone()
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        for _ in range(50):
            optimizer.step()
        fallen[state_dtype] = (moment / before).double().mean().item()
    assert fallen[None] == 1.0
    assert fallen[torch.float32] == pytest.approx(0.999**50, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_state_in_float32_moves_weights_of_bfloat16_as_float32_would(seed):
    """Up to the rounding of the weights themselves, which start alike, and of the basis, which turns few small numbers.

    Beyond a rounding of the weights, 0 to 0.12 of the way that they went were measured over eight seeds.
    """
    trained, made = mixed(torch.bfloat16)
    optimizer = GaLoreAdamW(made, lr=0.01, state_dtype=torch.float32)
    start = [weight.detach().float() for weight in trained]
    exact = [torch.nn.Parameter(weight.clone()) for weight in start]
    twin = GaLoreAdamW(groups(exact, 2, update_proj_gap=3), lr=0.01)
    for index, (weight, other) in enumerate(zip(trained, exact, strict=True)):
        weight.grad = gradient(weight, seed, index)
        other.grad = weight.grad.float()
    optimizer.step()
    twin.step()
    for weight, other, before in zip(trained, exact, start, strict=True):
        assert weight.dtype == torch.bfloat16
        assert {one.dtype for one in tensors_in(optimizer.state[weight]["inner"])} == {torch.float32}
        moved, rounding = weight.detach().float(), other.detach().abs() * 2**-8
        beyond = ((moved - other.detach()).abs() - rounding).clamp(min=0).norm()
        assert beyond <= 0.25 * (other.detach() - before).norm()


# 8 bits --------------------------------------------------------------------------------------------------------------


def test_moments_of_8_bits_take_a_byte_a_number():
    trained = weights((256, 128))
    optimizer = GaLoreAdamW8bit([{"params": trained, "rank": 64}])
    walk(optimizer, trained, range(2))
    inner = optimizer.state[trained[0]]["inner"]
    codes = [one for one in tensors_in(inner) if one.dtype == torch.uint8]
    assert [one.shape for one in codes] == [(256, 64), (256, 64)]
    small = weights((32, 16))
    optimizer = GaLoreAdamW8bit(groups(small))
    walk(optimizer, small, [0])
    assert all(one.dtype == torch.float32 for one in tensors_in(optimizer.state[small[0]]["inner"]))


# Adafactor -----------------------------------------------------------------------------------------------------------

MODES = {
    "relative": {},
    "relative, warmed up": {"warmup_init": True},
    "relative, not scaled": {"scale_parameter": False},
    "manual": {"lr": LR, "scale_parameter": False, "relative_step": False},
    "manual, scaled": {"lr": LR, "scale_parameter": True, "relative_step": False},
    "clipped": {"lr": LR, "scale_parameter": False, "relative_step": False, "clip_threshold": 1.1, "decay_rate": -0.6},
}
every_mode = pytest.mark.parametrize("arguments", MODES.values(), ids=MODES)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@every_mode
def test_adafactor_is_that_of_transformers(arguments, weight_decay, identity_basis):
    shapes = ((24, 16), (16, 24), (3, 8, 6), (16,), (20, 4))
    ours, theirs, start = (weights(*shapes, dtype=torch.float64) for _ in range(3))
    made = [{"params": ours[:2], **identity_basis}, {"params": ours[2:3], "layout": "stack", **identity_basis}]
    made += [{"params": ours[3:]}]
    walk(GaLoreAdafactor(made, weight_decay=weight_decay, state_dtype=None, **arguments), ours, range(5))
    walk(transformers.Adafactor(theirs, weight_decay=weight_decay, **arguments), theirs, range(5))
    moved = [end.detach() - begin.detach() for end, begin in zip(ours, start, strict=True)]
    expected = [end.detach() - begin.detach() for end, begin in zip(theirs, start, strict=True)]
    assert distance(moved, expected) <= 1e-6


@every_mode
def test_adafactor_in_the_subspace_is_its_formula(arguments):
    """Shazeer and Stern 2018, algorithms 4 and 5, on the projected gradient; the rate is the weight's."""
    settings = {"lr": None, "scale_parameter": True, "warmup_init": False, "clip_threshold": 1.0, "decay_rate": -0.8}
    settings |= arguments
    (weight,), (expected,) = weights((24, 16)), weights((24, 16))
    optimizer = GaLoreAdafactor(groups([weight], decomposition="svd"), weight_decay=0.5, **arguments)
    row, column = 0.0, 0.0
    with torch.no_grad():
        for step in range(5):
            grad = gradient(weight, step, 0)
            if step == 0:
                basis = torch.linalg.svd(grad, full_matrices=False).Vh[:4].T
            rate = adafactor_rate(settings, step + 1) * (
                root_mean_square(expected) if settings["scale_parameter"] else 1
            )
            beta2 = 1 - (step + 1) ** settings["decay_rate"]
            squared = (grad @ basis) ** 2
            row = beta2 * row + (1 - beta2) * squared.mean(1, keepdim=True)
            column = beta2 * column + (1 - beta2) * squared.mean(0, keepdim=True)
            update = grad @ basis / (row @ column / row.mean()) ** 0.5
            update /= max(1.0, root_mean_square(update) / settings["clip_threshold"])
            expected *= 1 - rate * 0.5
            expected -= 0.25 * rate * update @ basis.T
            walk(optimizer, [weight], [step])
    assert distance([weight], [expected]) < 1e-6


def root_mean_square(tensor: Tensor) -> float:
    return (tensor.norm() / tensor.numel() ** 0.5).item()


def adafactor_rate(settings: dict[str, Any], step: int) -> float:
    if settings["lr"] is not None:
        return settings["lr"]
    return min(1e-6 * step if settings["warmup_init"] else 1e-2, 1 / math.sqrt(step))


def test_adafactor_keeps_its_moments_in_float32():
    trained, made = mixed(torch.bfloat16)
    optimizer = GaLoreAdafactor(made)
    walk(optimizer, trained, range(2))
    for weight in trained:
        assert {one.dtype for one in tensors_in(optimizer.state[weight]["inner"])} == {torch.float32}
    assert optimizer.state[trained[0]]["inner"]["row_var"].shape == (24, 1)
    assert optimizer.state[trained[0]]["inner"]["col_var"].shape == (1, 4)


def test_a_tiny_weight_is_moved_by_the_least_scale():
    """eps[1] stands for the root mean square of a weight that is almost zero."""
    weight = torch.nn.Parameter(torch.full((24, 16), 1e-7))
    optimizer = GaLoreAdafactor(groups([weight], scale=1.0))
    walk(optimizer, [weight], [0])
    # Of a rate times the least scale, in the rank's share of the coordinates; a step of rows and columns is nearly 1.
    assert root_mean_square(weight.detach()) == pytest.approx(1e-3 * 1e-2 * (4 / 16) ** 0.5, rel=0.2)
