"""Gradients that are not finite, zero, sparse or complex: what a step makes of them, and what it reads to know."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_torch import GaLore, GaLoreAdamW, GaLoreSGD, ProjectedGradient, devices
from galore_torch.projection import Projection, decompositions
from tests.optim.recipes import every_recipe
from tests.optim.small import assert_same, gradient, groups, mixed, refusing, snapshot, state_of, walk, weights
from tests.reads import Reads

MATRIX = (24, 16)


def spoiled(weight: Tensor, step: int, value: float) -> Tensor:
    grad = gradient(weight, step, 0)
    grad.view(-1)[5] = value
    return grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("due", [True, False])
@pytest.mark.parametrize(("proj_type", "decomposition"), [("left", "warm"), ("right", "svd"), ("full", "random")])
@pytest.mark.filterwarnings("error")  # it is not even tried
def test_a_gradient_that_is_not_finite_renews_nothing_and_is_counted(value, due, proj_type, decomposition):
    """The update is what torch's SGD makes of it: not finite."""
    (weight,) = weights(MATRIX)
    keys = {"update_proj_gap": 2 if due else 100, "proj_type": proj_type, "decomposition": decomposition}
    optimizer = GaLoreSGD(groups([weight], stagger=False, **keys), lr=0.1)
    walk(optimizer, [weight], range(2))
    state = optimizer.state[weight]
    basis = {name: factor.clone() for name, factor in state["basis"].items()}
    assert optimizer.nonfinite_counts() == {}
    weight.grad = spoiled(weight, 2, value)
    optimizer.step()
    state = state_of(optimizer, weight)
    assert (state["step"], state["renewals"], state["renewed_step"]) == (3, 1, 0)
    assert_same(state["basis"], basis)
    assert not weight.isfinite().all()
    assert list(optimizer.nonfinite_counts().values()) == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 5, 383])
@pytest.mark.parametrize(("shape", "keys"), [(MATRIX, {}), ((4, 12, 8), {"layout": "stack"}), ((8, 6, 4, 2), {})])
def test_one_number_anywhere_in_the_gradient_is_found(shape, keys, position, value):
    (weight,) = weights(shape)
    optimizer = GaLoreSGD(groups([weight], **keys), lr=0.1, skip_nonfinite=True)
    walk(optimizer, [weight], [0])
    before = snapshot(optimizer)
    weight.grad = gradient(weight, 1, 0)
    weight.grad.view(-1)[position] = value
    optimizer.step()
    assert_same(weight.detach(), before[0][0])
    assert list(optimizer.nonfinite_counts().values()) == [1]


def test_the_first_gradient_may_be_the_bad_one():
    """Then there is no basis yet, and the next finite gradient makes the first."""
    trained = weights(MATRIX)
    optimizer = GaLoreAdamW(groups(trained), skip_nonfinite=True)
    start = trained[0].detach().clone()
    trained[0].grad = spoiled(trained[0], 0, float("nan"))
    optimizer.step()
    assert_same(trained[0].detach(), start)
    walk(optimizer, trained, [1])
    assert optimizer.state[trained[0]]["renewals"] == 1
    assert not torch.equal(trained[0], start)


@every_recipe
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.broad(
    "True-GaLoreAdamW uncorrected",
    "False-GaLoreAdamW8bit",
    "False-GaLoreSGD",
    "False-GaLore Muon",
    "False-GaLoreAdafactor",
)
def test_a_weight_whose_gradient_is_not_finite_may_be_left_out(recipe, projected):
    """State and all; the others go on as if nothing had been."""
    (trained, made), (expected, other) = mixed(), mixed()
    optimizer, twin = recipe(made, skip_nonfinite=True), recipe(other)
    walk(optimizer, trained, range(2))
    walk(twin, expected, range(2))
    place = 0 if projected else 3
    before = snapshot(optimizer)
    for index, (weight, healthy) in enumerate(zip(trained, expected, strict=True)):
        weight.grad = gradient(weight, 2, index)
        healthy.grad = gradient(weight, 2, index)
    trained[place].grad.view(-1)[3] = float("inf")
    expected[place].grad = None
    optimizer.step()
    twin.step()
    assert_same(trained[place].detach(), before[0][place])
    state = {key: value for key, value in state_of(optimizer, trained[place]).items() if key != "nonfinite"}
    assert_same(state, {key: value for key, value in before[1][place].items() if key != "nonfinite"})
    assert_same(trained, expected)
    assert list(optimizer.nonfinite_counts().values()) == ([1] if projected else [])


def test_names_come_with_the_counts():
    (weight,) = weights(MATRIX)
    optimizer = GaLoreAdamW([{"params": [("layers.3.mlp", weight)], "rank": 4}], skip_nonfinite=True)
    for step in range(3):
        weight.grad = spoiled(weight, step, float("nan"))
        optimizer.step()
    assert optimizer.nonfinite_counts() == {"layers.3.mlp": 3}


def test_a_projected_gradient_that_is_not_finite_is_left_out_too():
    (weight,) = weights(MATRIX)
    optimizer = GaLoreAdamW(groups([weight]), skip_nonfinite=True)
    walk(optimizer, [weight], [0])
    before = snapshot(optimizer)
    projection, basis = Projection.of(MATRIX, 4), optimizer.state[weight]["basis"]
    weight.grad = ProjectedGradient.of(spoiled(weight, 1, float("nan")), projection, basis)
    optimizer.step()
    assert_same(weight.detach(), before[0][0])
    assert list(optimizer.nonfinite_counts().values()) == [1]


@pytest.mark.parametrize("make", [GaLoreAdamW, functools.partial(GaLoreSGD, momentum=0.9)])
def test_zero_gradients_move_nothing_and_renew_nothing(make):
    trained, made = mixed()
    optimizer = make(made, lr=0.1)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    for _ in range(4):
        optimizer.step()
    assert_same([weight.detach() for weight in trained], [weight.detach() for weight in mixed()[0]])
    assert [state_of(optimizer, weight)["renewals"] for weight in trained[:2]] == [0, 0]


@pytest.mark.parametrize("place", [1, 3], ids=["projected", "plain"])
@pytest.mark.parametrize("made_steps", [0, 2])
def test_a_sparse_gradient_is_refused_before_anything_moves(place, made_steps):
    trained, made = mixed()
    made[0]["param_names"], made[1]["param_names"] = ["a", "b"], ["c", "d"]
    optimizer = GaLoreAdamW(made)
    walk(optimizer, trained, range(made_steps))
    before = snapshot(optimizer)
    for index, weight in enumerate(trained):
        weight.grad = gradient(weight, 2, index)
    trained[place].grad = trained[place].grad.to_sparse()
    message = refusing(optimizer.step)
    assert message.startswith(f"the gradient of {'abcd'[place]} is sparse")
    assert "sparse=False" in message
    assert_same(snapshot(optimizer)[:2], before[:2])


def test_a_complex_gradient_is_refused_before_anything_moves():
    trained = [*weights(MATRIX), torch.nn.Parameter(torch.zeros(5, dtype=torch.complex64))]
    optimizer = GaLoreAdamW(groups(trained, 1))
    trained[0].grad, trained[1].grad = gradient(trained[0], 0, 0), torch.ones_like(trained[1])
    before = snapshot(optimizer)
    assert "is complex; GaLore trains real weights" in refusing(optimizer.step)
    assert_same(snapshot(optimizer)[:2], before[:2])


def test_a_decomposition_that_fails_keeps_the_old_basis(monkeypatch):
    def fails(*_: Any) -> dict[str, Tensor]:
        raise torch.linalg.LinAlgError("did not converge")

    (weight,) = weights(MATRIX)
    optimizer = GaLoreSGD(groups([weight], update_proj_gap=1, decomposition="svd"), lr=0.1)
    walk(optimizer, [weight], [0])
    basis = optimizer.state[weight]["basis"]["right"].clone()
    with monkeypatch.context() as patch:
        patch.setitem(decompositions.DECOMPOSITIONS, "svd", fails)
        with pytest.warns(UserWarning, match="keeps its basis for now: the decomposition failed"):
            walk(optimizer, [weight], [1])
    state = optimizer.state[weight]
    assert (state["step"], state["renewals"]) == (2, 1)
    assert_same(state["basis"]["right"], basis)
    walk(optimizer, [weight], [2])
    assert state["renewals"] == 2


# No waiting for the device -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(GaLoreAdamW, fused=True, weight_decay=0.1),
        functools.partial(GaLoreAdamW, fused=True, weight_decay=0.1, lr=torch.tensor(0.1)),
        functools.partial(GaLoreAdamW, fused=True, state_dtype=torch.float32),
        functools.partial(GaLoreSGD, momentum=0.9, weight_decay=0.1),
    ],
)
def test_an_ordinary_step_reads_nothing_from_the_device(make: Callable[..., GaLore]):
    """Nor does a renewal where the host runs ahead of the device; elsewhere it does."""
    trained, made = mixed(update_proj_gap=4, stagger=False)
    optimizer = make(made)
    readings = []
    for step in range(6):
        for index, weight in enumerate(trained):
            weight.grad = gradient(weight, step, index)
        with Reads() as reads:
            optimizer.step()
        readings.append(reads.count)
    renews = not devices.runs_ahead(trained[0])
    assert [count > 0 for count in readings] == [renews, False, False, False, renews, False]
