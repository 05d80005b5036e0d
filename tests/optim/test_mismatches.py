"""No checkpoint that does not fit reaches a kernel: each raises an error that names it, or loaded right."""

from __future__ import annotations

import pytest
import torch

from galore_torch import GaLore, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD
from tests.forked import TORCH, begin
from tests.optim.mismatches import judge, main
from tests.optim.small import assert_same, groups, mixed, refusing, snapshot, walk, weights
from tests.waiting import DEADLINE

pytestmark = pytest.mark.filterwarnings("ignore:.*too small for state in few bits")


@pytest.mark.filterwarnings("ignore")
def test_random_mismatches_are_refused_by_name_or_loaded_right():
    verdicts = [judge(seed) for seed in range(15)]
    assert {verdict.split()[0] for verdict in verdicts} == {"refused", "loaded"}, verdicts


@pytest.mark.slow
@pytest.mark.of_cpu("a forked process cannot use the GPU that its parent uses")
def test_a_thousand_more_end_no_process(tmp_path):
    first, count = 15, 1000
    said = [tmp_path / "stdout", tmp_path / "stderr"]
    child = TORCH.start(judging, first, count, said)
    child.join(2 * DEADLINE)
    lines = said[0].read_text(encoding="utf-8").splitlines()
    assert child.exitcode == 0, (child.exitcode, lines[-1:], said[1].read_text(encoding="utf-8")[-500:])
    assert len(lines) == count + 1
    assert lines[-1] == "done"
    assert [line for line in lines if line.startswith("wrong")] == []
    verdicts = {line.split()[0] for line in lines[:-1]}
    assert verdicts == {"refused", "loaded"}


def judging(first, count, said):
    begin(said)
    main(first, count)


# By name -------------------------------------------------------------------------------------------------------------


def named(trained, order, split=2, **keys):
    """Groups over weights called a, b, c and d, the first of them projected."""
    made = [{"params": [trained[at] for at in order if at < split], "rank": 4, **keys}]
    made.append({"params": [trained[at] for at in order if at >= split]})
    for group, chosen in zip(made, (lambda at: at < split, lambda at: at >= split), strict=True):
        group["param_names"] = ["abcd"[at] for at in order if chosen(at)]
    return made


def test_weights_and_groups_are_matched_by_name():
    """Two of one shape change places, and so do the groups: each keeps the moments that are its own."""
    shapes = [(24, 16), (24, 16), (16, 8), (16, 8)]
    trained = weights(*shapes)
    optimizer = GaLoreAdamW(named(trained, (0, 1, 2, 3), scale=0.5))
    walk(optimizer, trained, range(2))
    others = weights(*shapes)
    other = GaLoreAdamW(named(others, (1, 0, 3, 2))[::-1])
    other.load_state_dict(optimizer.state_dict())
    for mine, its in zip(others, trained, strict=True):
        assert_same(other.state[mine], optimizer.state[its])
    assert other.param_groups[1]["param_names"] == ["b", "a"]
    assert other.param_groups[1]["scale"] == 0.5
    assert not torch.equal(other.state[others[0]]["inner"]["exp_avg"], other.state[others[1]]["inner"]["exp_avg"])


def test_what_wrappers_put_into_names_does_not_matter():
    trained, others = weights((24, 16), (24, 16), (16, 8), (16, 8)), weights((24, 16), (24, 16), (16, 8), (16, 8))
    optimizer = GaLoreAdamW(named(trained, (0, 1, 2, 3)))
    walk(optimizer, trained, range(1))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["param_names"] = [f"module._orig_mod.{name}" for name in group["param_names"]]
    other = GaLoreAdamW(named(others, (1, 0, 2, 3)))
    other.load_state_dict(saved)
    assert_same(other.state[others[0]], optimizer.state[trained[0]])
    assert other.param_groups[0]["param_names"] == ["b", "a"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made[0]["param_names"].__setitem__(0, "new"), ["has no new", "has a, which", "param_names"]),
        (lambda made: made[1]["param_names"].__setitem__(1, "d.bias"), ["has no d.bias", "has d, which"]),
    ],
)
def test_other_names_are_refused(change, said):
    trained, others = (weights((24, 16), (24, 16), (16, 8), (16, 8)) for _ in range(2))
    optimizer = GaLoreAdamW(named(trained, (0, 1, 2, 3)))
    walk(optimizer, trained, range(1))
    made = named(others, (0, 1, 2, 3))
    change(made)
    other = GaLoreAdamW(made)
    message = refusing(lambda: other.load_state_dict(optimizer.state_dict()))
    assert all(part in message for part in said), message


def test_other_targets_are_refused_with_the_weight_that_moved():
    shapes = [(24, 16), (24, 16), (16, 8), (16, 8)]
    trained, others = weights(*shapes), weights(*shapes)
    optimizer = GaLoreAdamW(named(trained, (0, 1, 2, 3), split=3))
    walk(optimizer, trained, range(1))
    message = refusing(lambda: GaLoreAdamW(named(others, (0, 1, 2, 3))).load_state_dict(optimizer.state_dict()))
    assert "c moved between groups" in message


# Shapes, dtypes and optimizers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [GaLoreAdamW, GaLoreAdamW8bit])
@pytest.mark.parametrize("rows", [80, 120, 100_000])
@pytest.mark.broad
def test_a_weight_that_grew_is_named_with_both_shapes(recipe, rows):
    trained, others = weights((24, 16), (100, 16)), weights((24, 16), (rows, 16))
    optimizer, other = recipe(groups(trained, 1)), recipe(groups(others, 1))
    walk(optimizer, trained, range(1))
    before = snapshot(other)
    message = refusing(lambda: other.load_state_dict(optimizer.state_dict()))
    assert f"({rows}, 16)" in message
    assert recipe is GaLoreAdamW8bit or "(100, 16)" in message
    assert_same(snapshot(other)[:2], before[:2])


@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("end", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_state_takes_the_dtype_that_is_asked_for_now(start, end, state_dtype):
    trained, made = mixed(start)
    optimizer = GaLoreAdamW(made)
    walk(optimizer, trained, range(2))
    others, made = mixed(end)
    other = GaLoreAdamW(made, state_dtype=state_dtype)
    other.load_state_dict(optimizer.state_dict())
    for mine, its in zip(others, trained, strict=True):
        expected = optimizer.state[its]["inner"]["exp_avg"].to(state_dtype or end)
        assert_same(other.state[mine]["inner"]["exp_avg"], expected)
        assert other.state[mine]["inner"]["step"].dtype == torch.float32
    walk(other, others, range(2, 5))


def test_codes_are_never_cast():
    trained, made = mixed(torch.bfloat16)
    optimizer = GaLoreAdamW8bit(made, min_8bit_size=16)
    walk(optimizer, trained, range(1))
    others, made = mixed(torch.float32)
    other = GaLoreAdamW8bit(made, min_8bit_size=16)
    other.load_state_dict(optimizer.state_dict())
    assert_same(other.state[others[0]]["inner"], optimizer.state[trained[0]]["inner"])
    assert other.state[others[0]]["basis"]["right"].dtype == torch.float32
    saved = optimizer.state_dict()
    saved["state"][0]["inner"]["state1"] = torch.full_like(saved["state"][0]["inner"]["state1"], 0.5, dtype=torch.float)
    assert "inner.state1 is torch.float32, where torch.uint8 is needed" in refusing(
        lambda: other.load_state_dict(saved)
    )


def test_another_optimizers_state_is_refused_by_name():
    trained, made = mixed()
    optimizer = GaLoreAdamW(made)
    walk(optimizer, trained, range(1))
    message = refusing(lambda: GaLoreSGD(mixed()[1], momentum=0.9).load_state_dict(optimizer.state_dict()))
    assert "as that of AdamW (GaLoreAdamW) does" in message
    assert "torch.optim.sgd.SGD keeps momentum_buffer here" in message


def test_a_rule_is_tried_without_a_trace():
    """Not in its random numbers, and not in what it counts by itself."""

    class Counting(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            torch.rand(3)
            return super().step(closure)

    trained, made = mixed()
    optimizer = GaLore(made, optimizer_class=Counting, lr=0.1, momentum=0.9)
    walk(optimizer, trained, range(2))
    random = torch.get_rng_state()
    steps = optimizer._rules.rule._optimizer.steps
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(torch.get_rng_state(), random)
    assert optimizer._rules.rule._optimizer.steps == steps


# Changed by hand between steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rank", 8, "rank from 4 to 8"),
        ("proj_type", "reverse_std", "proj_type from 'std' to 'reverse_std'"),
        ("layout", "stack", "layout from 'tucker' to 'stack'"),
        ("basis_bits", 4, "basis_bits from 16 to 4"),
        ("basis_group_size", 64, "basis_group_size from 256 to 64"),
    ],
)
def test_a_group_that_was_changed_is_refused_before_anything_moves_or_begun_anew(key, value, said):
    trained, made = mixed()
    optimizer = GaLoreAdamW(made)
    walk(optimizer, trained, range(2))
    group = optimizer.param_groups[0]
    old, group[key] = group[key], value
    before = snapshot(optimizer)
    assert said in refusing(lambda: walk(optimizer, trained, [2]))
    assert_same(snapshot(optimizer)[:2], before[:2])
    group[key] = old
    walk(optimizer, trained, [2])
    group[key] = value
    for weight in group["params"]:  # the remedy that the message gives
        optimizer.state.pop(weight, None)
    walk(optimizer, trained, range(3, 6))
    if key == "rank":
        assert optimizer.state[trained[0]]["inner"]["exp_avg"].shape == (24, 8)


def test_a_rank_given_or_taken_between_steps_is_refused_too():
    trained, made = mixed()
    optimizer = GaLoreAdamW(made)
    walk(optimizer, trained, range(2))
    projected, plain = optimizer.param_groups
    rank = projected.pop("rank")
    assert "rank from 4 to None" in refusing(lambda: walk(optimizer, trained, [2]))
    projected["rank"] = rank
    plain["params"].pop()
    plain["rank"] = 2
    assert "rank from None to 2" in refusing(lambda: walk(optimizer, trained, [2]))
    del plain["rank"]
    walk(optimizer, trained, [2])


def test_a_rank_changed_before_the_first_step_is_the_rank():
    trained, made = mixed()
    optimizer = GaLoreAdamW(made)
    optimizer._trained_weight(trained[0])
    optimizer.param_groups[0]["rank"] = 8
    walk(optimizer, trained, range(2))
    assert optimizer.state[trained[0]]["inner"]["exp_avg"].shape == (24, 8)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("index", [0, 2])
def test_state_that_was_edited_never_reaches_a_kernel(fused, index):
    trained, made = mixed()
    optimizer = GaLoreAdamW(made, fused=fused)
    walk(optimizer, trained, range(2))
    inner = optimizer.state[trained[index]]["inner"]
    kept, inner["exp_avg"] = inner["exp_avg"], torch.zeros(2, 2)
    before = snapshot(optimizer)
    assert "inner.exp_avg has shape (2, 2)" in refusing(lambda: walk(optimizer, trained, [2]))
    assert_same(snapshot(optimizer)[:2], before[:2])
    inner["exp_avg"] = kept
    walk(optimizer, trained, [2])


def test_a_weight_resized_in_place_never_reaches_a_kernel():
    trained, made = mixed()
    optimizer = GaLoreAdamW(made)
    walk(optimizer, trained, range(2))
    trained[2].data = torch.zeros(1000, 8)
    assert "inner.exp_avg has shape (16, 8), where (1000, 8)" in refusing(lambda: walk(optimizer, trained, [2]))


@pytest.mark.parametrize("recipe", [GaLoreAdamW, GaLoreAdamW8bit])
def test_state_follows_weights_to_another_dtype(recipe):
    trained, made = mixed()
    optimizer = recipe(made)
    walk(optimizer, trained, range(2))
    for weight in trained:
        weight.data = weight.data.to(torch.bfloat16)
    walk(optimizer, trained, range(2, 5))
    assert optimizer.state[trained[0]]["basis"]["right"].dtype == torch.bfloat16
    assert optimizer.state[trained[0]]["step"] == 5
