"""FSDP2 with bases of which each process keeps a part: the steps and the state of those that are whole in each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from galore_torch import attach
from galore_torch.distributed import shard_bases, shard_placement
from tests.distributed.pool import assert_every_process_raises
from tests.distributed.sharded import UNEVEN, fully_sharded, trained_in_shards
from tests.distributed.test_fsdp import of_one_layer
from tests.distributed.trained import GAP, RANK, batch, llama, loss_of, optimizer_of, weights_of
from tests.modes import MODES

CASES: dict[str, dict[str, Any]] = {
    **{name: {"mode": mode, "shape": UNEVEN} for name, mode in MODES.items()},
    "rotated": {"keys": {"moments": "rotate", "proj_type": "right"}},
    "both sides": {"keys": {"proj_type": "full"}, "shape": UNEVEN},
    "rows": {"keys": {"proj_type": "left"}},
    "accumulated": {"mode": ("fused", "step"), "micro": 2},
    "Muon": {"recipe": "muon", "shape": UNEVEN},
    "lazy": {"keys": {"cos_threshold": 0.2, "queue_size": 2}},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.broad("fused, at step")
def test_steps_are_those_with_whole_bases_to_the_bit(pool, name):
    assert_the_same_in_parts(pool, 2, **of_one_layer({"steps": 2 * GAP + 2, **CASES[name]}))


@pytest.mark.slow
def test_so_are_those_of_four_processes_some_of_which_have_nothing(pool):
    assert_the_same_in_parts(pool, 4, steps=GAP + 2, mode=("fused", "step"), shape={**UNEVEN, "layers": 1})


@pytest.mark.slow
def test_so_are_those_of_replicas(pool):
    assert_the_same_in_parts(pool, 4, steps=GAP + 2, replicas=2, shape={"layers": 1})


def assert_the_same_in_parts(pool: Any, world: int, **given: Any) -> None:
    whole, parts = (pool.run(trained_in_shards, world, in_parts=in_parts, **given) for in_parts in (False, True))
    assert all(torch.equal(whole[0], one) for one in parts)


@pytest.mark.parametrize("placed", [False, True], ids=["rows", "free axes"])
def test_a_process_holds_its_part_of_each_basis_to_the_byte(pool, placed):
    for held, counted in pool.run(bytes_of_bases, 4, placed=placed):
        assert held == counted


def bytes_of_bases(rank: int, world: int, placed: bool) -> tuple[int, int]:
    """Bytes that bases keep alive in a process after a step, and how many there should be: its rows of each."""
    model = llama(**UNEVEN)
    given = {"shard_placement_fn": shard_placement(model, world, rank=RANK)} if placed else {}
    fully_sharded(model, world, **given)
    optimizer = optimizer_of(model)
    shard_bases(optimizer)
    loss_of(model, batch(0).tensor_split(world)[rank]).backward()
    optimizer.step()
    held = counted = 0
    for state in optimizer.state.values():
        for factor in state.get("basis", {}).values():
            assert isinstance(factor, DTensor)
            assert factor.placements == (Shard(0),)
            held += factor.to_local().untyped_storage().nbytes()
            size = -(-factor.shape[0] // world)
            counted += max(0, min(size, factor.shape[0] - size * rank)) * factor.shape[1] * factor.element_size()
    return held, counted


def test_an_ordinary_step_gathers_a_basis_once_and_none_where_the_cut_axis_is_projected(pool):
    assert pool.run(gathers, 2, side="right") == [14] * 2
    assert pool.run(gathers, 2, side="left") == [0] * 2


def gathers(rank: int, world: int, side: str) -> int:
    """How many factors are gathered in a step without a renewal."""
    model = llama()
    fully_sharded(model, world)
    optimizer = optimizer_of(model, stagger=False, proj_type=side)
    shard_bases(optimizer)
    counts: list[int] = []
    full_tensor = DTensor.full_tensor
    for step in range(2):
        loss_of(model, batch(step).tensor_split(world)[rank]).backward()
        counts.clear()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(DTensor, "full_tensor", lambda one, **given: counts.append(1) or full_tensor(one, **given))
            optimizer.step()
        optimizer.zero_grad()
    return len(counts)


@pytest.mark.slow
def test_bases_can_be_divided_between_two_steps(pool):
    whole, parts = (pool.run(divided_after, 2, in_parts=in_parts)[0] for in_parts in (False, True))
    assert torch.equal(whole, parts)


def divided_after(rank: int, world: int, in_parts: bool) -> torch.Tensor:
    model = llama()
    fully_sharded(model, world)
    optimizer = optimizer_of(model)
    attach(model, optimizer)
    for step in range(2 * GAP):
        if in_parts and step in (3, 5):  # the second time it changes nothing
            shard_bases(optimizer)
        loss_of(model, batch(step).tensor_split(world)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


REFUSED = {
    "one process": "is not sharded",
    "few bits": "basis_bits is 8",
    "one of both alone": "shard_bases",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused(pool, name):
    assert_every_process_raises(pool.ask(refused, 2, name=name), REFUSED[name])


def refused(rank: int, world: int, name: str) -> None:
    model = llama()
    if name != "one process":
        fully_sharded(model, world)
    optimizer = optimizer_of(model, **({"basis_bits": 8} if name == "few bits" else {}))
    if name != "one of both alone" or rank == 0:
        shard_bases(optimizer)
    loss_of(model, batch(0).tensor_split(world)[rank]).backward()
    optimizer.step()
