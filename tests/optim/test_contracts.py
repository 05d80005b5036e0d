"""What trainers, checkpoints and shardings may count on: the optimizer's state, its parameters and its bases."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from galore_torch import GaLore, GaLoreAdamW, GaLoreSGD
from galore_torch.projection import DECOMPOSITIONS, PROJ_TYPES
from galore_torch.projection.orthonormal import exact_svd
from tests.device import accelerator
from tests.optim.recipes import RECIPES, every_recipe
from tests.optim.small import assert_same, distance, gradient, groups, mixed, refusing, tensors_in, walk, weights

pytestmark = pytest.mark.filterwarnings("ignore:rank .* saves no memory")


def states(optimizer: torch.optim.Optimizer, trained: list[Any]) -> list[dict[str, Any]]:
    return [optimizer.state[weight] for weight in trained]


# 1. The state is plain -----------------------------------------------------------------------------------------------


@every_recipe
def test_state_holds_tensors_and_numbers_under_string_keys(recipe):
    trained, made = mixed()
    optimizer = recipe(made)
    walk(optimizer, trained, range(2))
    assert_plain(states(optimizer, trained))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=True)["state"], optimizer.state_dict()["state"])


def assert_plain(tree: Any) -> None:
    if isinstance(tree, list):
        for one in tree:
            assert isinstance(one, dict)
            assert_plain(one)
    elif isinstance(tree, dict):
        assert tree
        assert all(type(key) is str for key in tree)
        for value in tree.values():
            assert_plain(value)
    else:
        assert type(tree) in (Tensor, int, float)


def test_state_is_as_documented():
    trained, made = mixed(proj_type="full")
    optimizer = GaLoreAdamW(made)
    walk(optimizer, trained, range(3))
    projected, plain = optimizer.state[trained[0]], optimizer.state[trained[-1]]
    counters = {"step", "renewals", "renewed_step", "gap", "overlaps", "captured", "lacking", "nonfinite"}
    assert set(projected) == {*counters, "basis", "inner"}
    assert (projected["step"], projected["renewals"]) == (3, 2)  # the first step's, and its turn in the third
    assert (projected["gap"], projected["overlaps"].shape) == (3, (5,))
    assert {name: factor.shape for name, factor in projected["basis"].items()} == {"left": (24, 4), "right": (16, 4)}
    assert projected["inner"]["exp_avg"].shape == (4, 4)
    assert set(plain) == {"inner"}
    assert set(plain["inner"]) == {"step", "exp_avg", "exp_avg_sq"}


# 2. The inner state is the rule's own --------------------------------------------------------------------------------


class Watched(SGD):
    """Shows what it worked with."""

    seen: list[Any] = []  # noqa: RUF012 (of all instances, on purpose)

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        Watched.seen = [self.state[parameter] for group in self.param_groups for parameter in group["params"]]


def test_the_inner_state_is_the_very_dict_that_the_rule_uses():
    trained, made = mixed()
    optimizer = GaLore(made, Watched, lr=0.1, momentum=0.9)
    walk(optimizer, trained, range(2))
    assert all(one["inner"] is seen for one, seen in zip(states(optimizer, trained), Watched.seen, strict=True))


@every_recipe
def test_saving_copies_no_tensor(recipe):
    trained, made = mixed()
    optimizer = recipe(made)
    walk(optimizer, trained, range(2))
    saved = optimizer.state_dict()["state"]
    held = [one for state in states(optimizer, trained) for one in tensors_in(state)]
    assert {one.data_ptr() for one in tensors_in(saved)} <= {one.data_ptr() for one in held}


# 3. No casts, no identities, nothing fixed at construction -----------------------------------------------------------


@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreSGD", "GaLore Lion8bit"])
def test_loading_casts_nothing(name):
    """torch would turn 8-bit codes and float32 moments into the weights' bfloat16."""
    ends = []
    for reload in (False, True):
        trained, made = mixed(torch.bfloat16)
        optimizer = RECIPES[name](made, state_dtype=torch.float32)
        walk(optimizer, trained, range(2))
        if reload:
            optimizer.load_state_dict(optimizer.state_dict())
        ends.append(states(optimizer, trained))
    assert_same(*ends)
    dtypes = {one.dtype for state in ends[1] for one in tensors_in(state["inner"])}
    assert torch.float32 in dtypes
    assert (torch.uint8 in dtypes) == ("8bit" in name)
    assert torch.bfloat16 not in dtypes


@every_recipe
def test_accelerate_may_take_the_state_through_a_round_trip_at_once(recipe):
    ends = []
    for prepare in (False, True):
        trained, made = mixed()
        optimizer = recipe(made)
        wrapped = accelerator().prepare(optimizer) if prepare else optimizer
        walk(wrapped, trained, range(4))
        ends.append((trained, states(optimizer, trained)))
    assert_same(*ends)


@every_recipe
def test_parameters_may_be_swapped_inside_the_groups(recipe):
    """Sharding replaces them, after construction and before the first step."""
    trained, made = mixed()
    optimizer = recipe(made)
    swapped, _ = mixed()
    replacement = dict(zip(trained, swapped, strict=True))
    for group in optimizer.param_groups:
        group["params"] = [replacement[weight] for weight in group["params"]]
    walk(optimizer, swapped, range(4))
    expected, made = mixed()
    walk(recipe(made), expected, range(4))
    assert_same(swapped, expected)
    assert set(optimizer.state) == set(swapped)


def test_wrong_arguments_are_told_at_construction():
    message = refusing(lambda: GaLore(groups(weights((8, 6))), SGD, momentun=0.9))
    assert message == "momentun=0.9 is no argument of SGD; did you mean momentum?"
    assert "2.0" in refusing(lambda: GaLore(groups(weights((8, 6))), AdamW, betas=(2.0, 0.9)))
    message = refusing(lambda: GaLore(groups(weights((8, 6))), torch.optim.Muon, AdamW, momentun=0.9))
    assert message == "momentun=0.9 is no argument of Muon and AdamW; did you mean momentum?"
    for wrong, meant in {"optimizer": "optimizer_class", "fallback": "fallback_class", "dtype": "state_dtype"}.items():
        assert meant in refusing(lambda wrong=wrong: GaLore(groups(weights((8, 6))), SGD, lr=0.1, **{wrong: AdamW}))


def test_the_inner_optimizers_defaults_are_ours():
    optimizer = GaLore(groups(weights((8, 6))), AdamW, lr=0.5)
    plain = AdamW(weights((8, 6)), lr=0.5)
    assert {key: optimizer.defaults[key] for key in plain.defaults} == plain.defaults
    assert {key: optimizer.param_groups[0][key] for key in plain.defaults} == plain.defaults


def one_cycle(optimizer: torch.optim.Optimizer) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.2, total_steps=10)


def halving(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


@pytest.mark.parametrize("schedule", [one_cycle, halving])
@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (AdamW, {"lr": 0.1, "weight_decay": 0.1}),
        (AdamW, {"lr": torch.tensor(0.1), "weight_decay": 0.1}),
        (AdamW, {"lr": torch.tensor(0.1), "fused": True, "weight_decay": 0.1}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.Adafactor, {"lr": 0.1, "weight_decay": 0.1}),
    ],
)
@pytest.mark.broad
def test_a_scheduler_is_obeyed(optimizer, arguments, schedule, identity_basis):
    """Of the learning rate, a tensor or not, and of the momentum (OneCycleLR)."""
    if optimizer is torch.optim.Adafactor and schedule is one_cycle:
        schedule = halving  # it has no momentum to cycle
    start, ours, theirs = (weights((24, 16)) for _ in range(3))
    galore = GaLore([{"params": ours, **identity_basis}], optimizer, **cloned(arguments))
    plain = optimizer(theirs, **cloned(arguments))
    schedules = [schedule(one) for one in (galore, plain)]
    for step in range(6):
        walk(galore, ours, [step])
        walk(plain, theirs, [step])
        for one in schedules:
            one.step()
    assert float(galore.param_groups[0]["lr"]) == float(plain.param_groups[0]["lr"]) != 0.1
    assert distance(theirs, start) > 0.01
    assert distance(ours, theirs) <= 1e-6


def cloned(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}


def test_any_hyperparameter_of_a_group_may_be_changed_between_steps(identity_basis):
    ours, theirs = weights((24, 16)), weights((24, 16))
    galore, plain = GaLoreSGD([{"params": ours, **identity_basis}], lr=0.1), SGD(theirs, lr=0.1)
    for step, changes in enumerate(({}, {"momentum": 0.9}, {"weight_decay": 0.5}, {"maximize": True}, {"lr": 0.3})):
        for optimizer, trained in ((galore, ours), (plain, theirs)):
            optimizer.param_groups[0].update(changes)
            walk(optimizer, trained, [step])
        assert distance(ours, theirs) <= 1e-6, changes
    galore.param_groups[0]["scale"] = 2.0
    before = ours[0].detach().clone()
    galore.param_groups[0].update(weight_decay=0.0, momentum=0.0, maximize=False)
    walk(galore, ours, [9])
    torch.testing.assert_close(before - ours[0], 2.0 * 0.3 * gradient(before, 9, 0))


# 4. A step on zero gradients -----------------------------------------------------------------------------------------


def shapes(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: shapes(value) for key, value in tree.items()}
    return (tree.shape, tree.dtype) if isinstance(tree, Tensor) else type(tree)


@every_recipe
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.broad
def test_a_step_on_zero_gradients_creates_all_state_and_fixes_no_subspace(recipe, proj_type):
    trained, made = mixed(proj_type=proj_type, decomposition="svd")
    optimizer = recipe(made)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    created = [shapes(optimizer.state[weight]) for weight in trained]
    for weight in trained[:2]:
        assert optimizer.state[weight]["renewals"] == 0
    walk(optimizer, trained, [0])
    assert [shapes(optimizer.state[weight]) for weight in trained] == created
    fresh, made = mixed(proj_type=proj_type, decomposition="svd")
    other = recipe(made)
    walk(other, fresh, [0])
    for weight, twin in zip(trained[:2], fresh[:2], strict=True):
        assert optimizer.state[weight]["renewals"] == 1
        assert_same(optimizer.state[weight]["basis"], other.state[twin]["basis"])


# 5. Bases ------------------------------------------------------------------------------------------------------------

LAYOUTS = {"matrix": ((24, 16), {}), "stack": ((3, 24, 16), {"layout": "stack"}), "tucker": ((8, 6, 5, 5), {})}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize(("shape", "keys"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.broad
def test_a_basis_is_contiguous_and_keeps_no_memory_but_its_own(shape, keys, decomposition, dtype):
    for proj_type in PROJ_TYPES if len(shape) < 4 else ("std",):
        trained = weights(shape, dtype=dtype)
        made = groups(trained, proj_type=proj_type, decomposition=decomposition, update_proj_gap=1, **keys)
        optimizer = GaLoreAdamW(made)
        walk(optimizer, trained, range(2))
        assert optimizer.state[trained[0]]["renewals"] == 2
        for factor in optimizer.state[trained[0]]["basis"].values():
            assert factor.is_contiguous()
            assert factor.dtype == dtype
            assert factor.untyped_storage().nbytes() == factor.numel() * factor.element_size()


@pytest.mark.parametrize("decomposition", [name for name in DECOMPOSITIONS if name != "svd"])
@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_a_renewed_basis_points_along_the_old(decomposition, proj_type):
    """Moments are kept in the old coordinates, so no axis may be turned round."""
    trained = weights((24, 16))
    made = groups(trained, proj_type=proj_type, decomposition=decomposition, update_proj_gap=1)
    optimizer = GaLoreSGD(made, lr=0.0)
    walk(optimizer, trained, [0])
    for step in range(1, 6):
        old = dict(optimizer.state[trained[0]]["basis"])
        walk(optimizer, trained, [step])
        for name, factor in optimizer.state[trained[0]]["basis"].items():
            assert not torch.equal(factor, old[name])
            assert ((factor * old[name]).sum(0) >= 0).all()


def test_svd_keeps_the_signs_of_the_devices_library():
    """Trajectories of the paper's code depend on them, which are LAPACK's on a CPU."""
    trained = weights((24, 16))
    optimizer = GaLoreSGD(groups(trained, decomposition="svd", proj_type="full", update_proj_gap=1), lr=0.0)
    for step in range(4):
        walk(optimizer, trained, [step])
        left, _, right = exact_svd(gradient(trained[0], step, 0))
        assert_same(optimizer.state[trained[0]]["basis"], {"left": left[:, :4], "right": right[:4].T})
