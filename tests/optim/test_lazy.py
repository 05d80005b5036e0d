"""Lazy renewal: layers whose subspace stays renew less often, the others as before; and what is told of all of them."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_torch import GaLore, GaLoreAdamW, GaLoreSGD, devices
from galore_torch.projection import overlap
from tests.optim.recipes import every_recipe
from tests.optim.small import assert_same, gradient, groups, mixed, walk, weights
from tests.reads import Reads

pytestmark = pytest.mark.filterwarnings("ignore:rank .* saves no memory")

SHAPE, RANK, GAP = (24, 16), 4, 5
LAZY = {"cos_threshold": 0.4, "queue_size": 2}
STAYS, MOVES = 0, 1


def staying(step: int, seed: int = 0) -> Tensor:
    """A gradient whose rows lie in one subspace of four dimensions, whatever the step."""
    rows = torch.randn(RANK, SHAPE[1], generator=torch.Generator().manual_seed(seed))
    return gradient(torch.empty(SHAPE[0], RANK), step, 0) @ rows


def moving(step: int) -> Tensor:
    """A gradient of noise alone."""
    return gradient(torch.empty(SHAPE), step, 1)


def renewals(
    optimizer: GaLore, trained: Sequence[Tensor], kinds: Sequence[Callable[[int], Tensor | None]], steps: Iterable[int]
) -> list[list[int]]:
    """The steps in which each weight renewed its basis."""
    renewed: list[list[int]] = [[] for _ in trained]
    for step in steps:
        before = [optimizer.state.get(weight, {}).get("renewals", 0) for weight in trained]
        for weight, kind in zip(trained, kinds, strict=True):
            weight.grad = kind(step)
        optimizer.step()
        optimizer._outcomes.settle_all()
        for own, weight, count in zip(renewed, trained, before, strict=True):
            own += [step] * (optimizer.state.get(weight, {}).get("renewals", 0) - count)
    return renewed


def pair(**keys: Any) -> tuple[list[torch.nn.Parameter], GaLore]:
    trained = weights(SHAPE, SHAPE)
    return trained, GaLoreAdamW(groups(trained, update_proj_gap=GAP, **keys), lr=0.01)


def test_a_subspace_that_stays_is_renewed_with_growing_gaps_and_one_that_moves_keeps_its_gap():
    trained, optimizer = pair(**LAZY)
    stayed, moved = renewals(optimizer, trained, [staying, moving], range(80))
    # Its turn among two, as many renewals as are averaged, and then 10, 20 and 40 steps.
    assert stayed == [0, 3, 8, 18, 38, 78]
    assert moved == [0, *range(5, 80, 5)]
    told = list(optimizer.subspaces().values())
    assert [one.gap for one in told] == [80, GAP]
    assert told[STAYS].overlap == pytest.approx(1, abs=1e-4)
    assert abs(told[MOVES].overlap) < 0.4


def test_without_a_threshold_every_gap_is_the_same_and_overlaps_are_told_all_the_same():
    trained, optimizer = pair()
    stayed, moved = renewals(optimizer, trained, [staying, moving], range(40))
    assert stayed == [0, *range(3, 40, 5)]
    assert moved == [0, *range(5, 40, 5)]
    told = list(optimizer.subspaces().values())
    assert [one.gap for one in told] == [GAP, GAP]
    assert told[STAYS].overlap > 0.99 > 0.4 > told[MOVES].overlap


def test_a_subspace_that_moves_again_is_renewed_as_often_as_before():
    trained, optimizer = pair(**LAZY)
    stayed, _ = renewals(optimizer, trained, [lambda t: staying(t) if t < 39 else moving(t), moving], range(245))
    # At 38 the gap has grown to 40. At 78 one of the last two overlaps is still 1: it grows once more, then shrinks.
    assert stayed == [0, 3, 8, 18, 38, 78, 158, 198, 218, 228, 233, 238, 243]
    assert list(optimizer.subspaces().values())[STAYS].gap == GAP


@pytest.mark.parametrize("factor", [3, 1.5])
def test_the_gap_grows_by_the_factor(factor):
    trained, optimizer = pair(cos_threshold=0.9, queue_size=1, gamma_proj=factor, stagger=False)
    stayed, _ = renewals(optimizer, trained, [staying, moving], range(130))
    gaps = [later - earlier for earlier, later in itertools.pairwise(stayed)]
    assert gaps[:4] == ([5, 15, 45] if factor == 3 else [5, 8, 12, 18])


@pytest.mark.parametrize("miss", [lambda _: None, lambda _: torch.full(SHAPE, torch.nan)], ids=["none", "nan"])
def test_a_missed_turn_stays_due_and_the_gap_counts_from_when_it_was_taken(miss):
    ends = []
    for missed in ((), range(18, 21)):
        trained, optimizer = pair(**LAZY)
        optimizer._settings["skip_nonfinite"] = True
        kind = lambda t, missed=missed: miss(t) if t in missed else staying(t)  # noqa: E731
        ends.append(renewals(optimizer, trained, [kind, moving], range(70))[STAYS])
    assert ends[0] == [0, 3, 8, 18, 38]
    # A weight without a gradient makes no step, so its own count of steps stands still too.
    assert ends[1] == [0, 3, 8, 21, 41]


def test_a_longer_gap_that_is_asked_for_later_is_kept():
    trained, optimizer = pair(**LAZY)
    renewals(optimizer, trained, [staying, moving], range(6))
    optimizer.param_groups[0]["update_proj_gap"] = 12
    assert [one.gap for one in optimizer.subspaces().values()] == [12, 12]
    stayed, moved = renewals(optimizer, trained, [staying, moving], range(6, 60))
    assert moved == [17, 29, 41, 53]
    assert stayed == [15, 39]


# What is compared -----------------------------------------------------------------------------------------------------

KINDS = {
    "one side": ((24, 16), {}),
    "both sides": ((24, 16), {"proj_type": "full"}),
    "stack": ((3, 24, 16), {"layout": "stack"}),
    "tucker": ((8, 6, 5, 5), {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "keys"), KINDS.values(), ids=KINDS)
def test_overlaps_are_those_of_successive_bases_newest_last(shape, keys, dtype):
    trained = weights(shape, dtype=dtype)
    optimizer = GaLoreAdamW(groups(trained, update_proj_gap=1, queue_size=3, **keys))
    state, expected = optimizer.state[trained[0]], [0.0] * 3
    for step in range(6):
        old = dict(state.get("basis", {}))
        walk(optimizer, trained, [step])
        if step:
            expected.append(float(overlap(state["basis"], old)))
        assert state["overlaps"].tolist() == pytest.approx(expected[-3:], abs=2e-2 if dtype == torch.bfloat16 else 1e-5)
        assert state["overlaps"].dtype == torch.float32
        assert state["overlaps"].untyped_storage().nbytes() == 12
    assert len(set(expected)) > 4
    (told,) = optimizer.subspaces().values()
    assert told.overlap == state["overlaps"][-1]
    assert told.renewals == 6


def test_only_a_lazy_renewal_reads_an_overlap_back():
    counts = {}
    for name, keys in {"fixed": {}, "lazy": LAZY}.items():
        trained, optimizer = pair(**keys, stagger=False)
        for step in range(2 * GAP + 2):
            for weight in trained:
                weight.grad = moving(step)
            with Reads() as reads:
                optimizer.step()
            counts[name, step] = reads.where.count("aten._local_scalar_dense.default")
    renewal, ordinary = counts["fixed", GAP], counts["fixed", 1]
    # Where the host runs ahead of the device it is sent, and read in the next step.
    lazily = 0 if devices.runs_ahead(trained[0]) else len(trained)
    assert counts["fixed", 2 * GAP] == renewal <= counts["fixed", 0]  # whether the first basis is whole is read too
    assert {counts[name, step] for name in ("fixed", "lazy") for step in (2, GAP + 1, 2 * GAP + 1)} == {ordinary}
    assert counts["lazy", 2 * GAP] == renewal + lazily


# What is told ---------------------------------------------------------------------------------------------------------


def test_subspaces_are_told_by_name_of_those_that_have_made_a_step():
    trained, made = mixed(update_proj_gap=1)
    made[0]["param_names"], made[1]["param_names"] = ["first", "second"], ["third", "fourth"]
    optimizer = GaLoreAdamW(made)
    assert optimizer.subspaces() == {}
    assert not optimizer.state
    trained[0].grad = gradient(trained[0], 0, 0)
    optimizer.step()
    (told,) = optimizer.subspaces().items()
    assert told[0] == "first"
    assert (told[1].renewals, told[1].gap) == (1, 1)
    assert math.isnan(told[1].overlap)
    walk(optimizer, trained, range(2))
    told = optimizer.subspaces()
    assert {name: one.renewals for name, one in told.items()} == {"first": 3, "second": 2}
    assert all(-1 <= one.overlap <= 1 for one in told.values())


def test_weights_without_names_are_all_told():
    trained = weights(SHAPE, SHAPE)
    optimizer = GaLoreAdamW([{"params": [weight], "rank": RANK} for weight in trained])
    walk(optimizer, trained, range(1))
    for index, name in enumerate(optimizer.subspaces()):
        assert name == f"parameter 0 of its group, of shape {SHAPE} (projected weight {index})"
    assert len(optimizer.subspaces()) == 2


# Checkpoints ----------------------------------------------------------------------------------------------------------


@every_recipe
@pytest.mark.parametrize("made", [3, 9, 14])
@pytest.mark.broad("3-GaLoreAdamW", "9-GaLoreAdamW uncorrected", "14-GaLoreAdamW8bit", "3-GaLore Muon")
def test_a_lazy_run_resumes_bit_for_bit(recipe, made):
    """The queue is filling, full, and has had its effect."""
    keys = {"cos_threshold": 0.0, "queue_size": 3, "update_proj_gap": 2}
    trained, groups_ = mixed(**keys)
    optimizer = recipe(groups_)
    walk(optimizer, trained, range(made))
    others, groups_ = mixed(**keys)
    other = recipe(groups_)
    for ours, theirs in zip(others, trained, strict=True):
        ours.data.copy_(theirs.data)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert str(other.subspaces()) == str(optimizer.subspaces())  # not a number equals itself as text alone
    for one, weights_ in ((optimizer, trained), (other, others)):
        walk(one, weights_, range(made, 24))
    assert_same(others, trained)
    assert_same([other.state[one] for one in others], [optimizer.state[one] for one in trained])
    assert {one.gap for one in other.subspaces().values()} != {2}


def test_a_zero_gradient_compares_nothing():
    trained, optimizer = pair(**LAZY, stagger=False)
    renewals(optimizer, trained, [staying, moving], range(GAP + 1))
    before = copy.deepcopy(optimizer.state[trained[STAYS]]["overlaps"])
    renewals(optimizer, trained, [torch.zeros_like(trained[0]).mul, moving], range(GAP + 1, 3 * GAP))
    assert_same(optimizer.state[trained[STAYS]]["overlaps"], before)


def test_bases_drawn_at_random_never_earn_a_longer_gap():
    trained = weights(SHAPE)
    optimizer = GaLoreSGD(groups(trained, update_proj_gap=2, decomposition="random", **LAZY), lr=0.1)
    assert renewals(optimizer, trained, [staying], range(30))[0] == list(range(0, 30, 2))
