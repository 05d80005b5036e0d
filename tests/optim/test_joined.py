"""Alike weights are moved as one tensor, and nothing but the time it takes shows it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_torch import GaLore, GaLoreAdamW, GaLoreSGD
from galore_torch.optim import chunks, joined
from galore_torch.optim.rule import InnerParam, Rule
from tests.optim.small import gradient, weights

SHAPES = [(16, 8)] * 3 + [(8, 16)] * 2 + [(12, 4)]
"""Of three kinds, of which one has a weight alone: it is moved by itself."""
RANK = 4
KINDS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "fused": {"fused": True},
    "not fused": {"fused": False},
    "amsgrad": {"amsgrad": True},
    "decay": {"weight_decay": 0.1},
    "float64": {"state_dtype": torch.float64},
}


def made(**keywords: Any) -> tuple[list[torch.nn.Parameter], GaLore]:
    torch.manual_seed(0)
    trained = weights(*SHAPES)
    keys = {key: keywords.pop(key) for key in ("moments",) if key in keywords}
    group = {"params": trained, "rank": RANK, "update_proj_gap": 3, **keys}
    return trained, GaLoreAdamW([group], lr=1e-2, **keywords)


def run(trained: list[torch.nn.Parameter], optimizer: GaLore, steps: range, *, without: dict[int, int] | None = None):
    """Step; `without` has for some steps the place of a weight that has no gradient there."""
    for step in steps:
        for index, weight in enumerate(trained):
            weight.grad = None if (without or {}).get(step) == index else gradient(weight, step, index)
        optimizer.step()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many dimensions each tensor has that the rule moves, call by call."""
    calls: list[list[int]] = []
    plain = Rule.step

    def step(self: Rule, params: list[InnerParam]) -> Any:
        calls.append([one.tensor.dim() for one in params])
        return plain(self, params)

    monkeypatch.setattr(Rule, "step", step)
    return calls


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Check that a run of joined weights ends as the run of weights that are moved one by one."""

    def check(train: Callable[[list[torch.nn.Parameter], GaLore], None], **keywords: Any) -> None:
        ends, held = [], []
        for can_be_joined in (lambda _: False, joined.can_be_joined):
            monkeypatch.setattr(chunks, "can_be_joined", can_be_joined)
            trained, optimizer = made(**keywords)
            train(trained, optimizer)
            ends.append(trained)
            held.append([optimizer.state[weight]["inner"] for weight in trained])
        assert_equal(*ends)
        for inner, known in zip(*held, strict=True):
            assert list(inner) == list(known)
            assert_equal(list(inner.values()), list(known.values()))

    return check


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("keywords", KINDS.values(), ids=KINDS)
def test_weights_and_states_are_those_of_weights_moved_one_by_one(keywords, both, seen):
    both(lambda *made: run(*made, range(8)), **keywords)
    assert [2] * len(SHAPES) in seen
    assert seen[-1] == [3, 3, 2]


def test_the_optimizer_inside_gets_one_tensor_of_each_kind(seen):
    run(*made(), range(3))
    assert seen[-3:] == [[3, 3, 2]] * 3


@pytest.mark.parametrize("keywords", [{"moments": "reset"}, {"rounding": "stochastic"}], ids=str)
def test_what_depends_on_single_weights_is_not_joined(keywords, seen):
    trained, optimizer = made(**keywords)
    for weight in trained:
        weight.data = weight.data.bfloat16()
    run(trained, optimizer, range(2))
    assert seen[-1] == [2] * len(SHAPES)


def test_moments_that_begin_anew_from_some_step_on_do(both):
    def train(trained: list[torch.nn.Parameter], optimizer: GaLore) -> None:
        run(trained, optimizer, range(4))
        optimizer.param_groups[0]["moments"] = "reset"
        run(trained, optimizer, range(4, 8))

    both(train)


def test_another_optimizer_and_large_weights_are_not_joined(monkeypatch, seen):
    trained = weights(*SHAPES)
    run(trained, GaLoreSGD([{"params": trained, "rank": RANK}], lr=0.1, momentum=0.9), range(2))
    assert seen[-1] == [2] * len(SHAPES)
    monkeypatch.setattr(joined, "SMALL", 16 * RANK - 1)
    run(*made(), range(2))
    assert seen[-1] == [2] * len(SHAPES)


def test_groups_with_other_settings_are_apart(seen):
    trained = weights((16, 8), (16, 8), (16, 8), (16, 8))
    groups = [{"params": trained[:2], "rank": RANK}, {"params": trained[2:], "rank": RANK, "betas": (0.5, 0.9)}]
    run(trained, GaLoreAdamW(groups), range(2))
    assert seen[-1] == [3, 3]


@pytest.mark.parametrize("missing", [{0: 1}, {3: 1}, {2: 0, 5: 4}], ids=str)
def test_a_weight_that_misses_steps_is_moved_by_itself_from_then_on(missing, both):
    both(lambda *made: run(*made, range(8), without=missing))


def change_in_place(inner: dict[str, Tensor]) -> None:
    inner["exp_avg"].zero_()


def replace_one(inner: dict[str, Tensor]) -> None:
    inner["exp_avg"] = torch.zeros_like(inner["exp_avg"])


def replace_count(inner: dict[str, Tensor]) -> None:
    inner["step"] = inner["step"] + 3


def change_count(inner: dict[str, Tensor]) -> None:
    inner["step"] += 3


@pytest.mark.parametrize("change", [change_in_place, replace_one, replace_count, change_count])
def test_a_state_that_is_changed_by_hand_is_heeded(change, both):
    def train(trained: list[torch.nn.Parameter], optimizer: GaLore) -> None:
        run(trained, optimizer, range(4))
        change(optimizer.state[trained[1]]["inner"])
        run(trained, optimizer, range(4, 8))

    both(train)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "saved"])
def test_a_resumed_run_is_the_run_and_joined_again(way, seen, tmp_path):
    expected, whole = made()
    run(expected, whole, range(8))
    trained, optimizer = made()
    run(trained, optimizer, range(4))
    if way == "deepcopy":
        trained, optimizer = copy.deepcopy((trained, optimizer))
    else:
        state = optimizer.state_dict()
        if way == "saved":
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
        optimizer = GaLoreAdamW([{"params": trained, "rank": RANK, "update_proj_gap": 3}], lr=1e-2)
        optimizer.load_state_dict(copy.deepcopy(state))
    run(trained, optimizer, range(4, 8))
    assert_equal(trained, expected)
    assert seen[-1] == [3, 3, 2]


def test_a_state_holds_no_memory_but_that_of_all_states():
    trained, optimizer = made()
    run(trained, optimizer, range(3))
    moments = [optimizer.state[weight]["inner"]["exp_avg"] for weight in trained]
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in moments}
    assert sum(held.values()) == sum(4 * one.numel() for one in moments)
