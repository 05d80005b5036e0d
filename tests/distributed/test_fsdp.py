"""FSDP2: weights that are sharded over processes are trained as one process trains whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from galore_torch import GaLore, attach, param_groups
from galore_torch.distributed import shard_placement
from tests.distributed.pool import assert_every_process_raises
from tests.distributed.sharded import UNEVEN, fully_sharded, trained_in_shards
from tests.distributed.trained import BAR, RANK, batch, distance, llama, loss_of, optimizer_of

SHORT = 12
VARIANTS: dict[str, dict[str, Any]] = {
    "as it comes": {"steps": 30},
    "uneven": {"shape": UNEVEN},
    "left": {"keys": {"proj_type": "left"}},
    "right": {"keys": {"proj_type": "right"}},
    "both sides": {"keys": {"proj_type": "full"}},
    "clipped, accumulated": {"micro": 2, "clip": 0.05},
    "lazy": {"keys": {"cos_threshold": 0.2, "queue_size": 2}, "steps": 20},
    "SGD": {"recipe": "sgd"},
    "attached": {"attached": True},
    "not finite in one part": {"spoils": (3, 1), "keys": {"skip_nonfinite": True}},
    "every matrix": {"keys": {"target_modules": "all-linear"}, "shape": UNEVEN},
}


def assert_as_one(pool: Any, world: int, *, bar: float = BAR, **given: Any) -> None:
    ranks = pool.run(trained_in_shards, world, **given)
    assert all(torch.equal(ranks[0], other) for other in ranks[1:])
    alone = {key: value for key, value in given.items() if key not in ("replicas", "placement")}
    assert distance(ranks[0], trained_in_shards(0, 1, **alone)) <= bar


@pytest.mark.parametrize("name", VARIANTS)
def test_shards_train_as_one_process(pool, name):
    assert_as_one(pool, 2, **{"steps": SHORT, **VARIANTS[name]})


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_four_shards_train_as_one_process(pool, name):
    """Some parts are shorter than others, and some are empty."""
    assert_as_one(pool, 4, **{"steps": SHORT, **VARIANTS[name]})


def test_replicas_of_shards_train_as_one_process(pool):
    assert_as_one(pool, 4, replicas=2, steps=SHORT)


def test_svd_trains_as_one_process(pool):
    assert_as_one(pool, 2, bar=1e-6, keys={"decomposition": "svd"})


def of_free_axes(model: nn.Module) -> Any:
    return shard_placement(model, 2, rank=RANK)


def test_weights_cut_where_they_are_not_projected_train_as_one_process(pool):
    assert_as_one(pool, 2, placement=of_free_axes, steps=SHORT)


# What is sent, and what is held --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "placement"), [({"proj_type": "right"}, None), ({}, of_free_axes)])
def test_where_the_projected_axis_is_whole_an_ordinary_step_sends_no_projected_gradient(pool, keys, placement):
    assert pool.run(floats_sent, 2, keys=keys, placement=placement) == [0, 0]


def test_where_it_is_cut_an_ordinary_step_sums_images(pool):
    sums = pool.run(floats_sent, 2, keys={"proj_type": "left"}, placement=None)
    assert sums == [sum(RANK * columns for columns in (24,) * 6 + (40,)) * 2] * 2


def floats_sent(rank: int, world: int, keys: Any, placement: Any) -> int:
    """How many floating-point numbers `step()` sums over processes, without a renewal."""
    model = llama()
    fully_sharded(model, world, **({} if placement is None else {"shard_placement_fn": placement(model)}))
    optimizer = optimizer_of(model, stagger=False, **keys)
    sent: list[int] = []
    reduce = dist.all_reduce
    for step in range(2):
        loss_of(model, batch(step).tensor_split(world)[rank]).backward()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                dist,
                "all_reduce",
                lambda one, **given: sent.append(one.numel() if one.is_floating_point() else 0) or reduce(one, **given),
            )
            sent.clear()
            optimizer.step()
        optimizer.zero_grad()
    return sum(sent)


def test_weights_and_state_without_bases_are_divided(pool):
    """The counters, and the little that does not come out even, are what is above a quarter."""
    for held in pool.run(held_by_a_process, 4):
        assert held <= 1.05 * held_by_a_process(0, 1) / 4


def held_by_a_process(rank: int, world: int) -> int:
    """Bytes of weights and state, without bases."""
    model = llama(width=96, inner=160)
    if world > 1:
        fully_sharded(model, world, shard_placement_fn=shard_placement(model, world, rank=RANK))
    optimizer = optimizer_of(model)
    loss_of(model, batch(0).tensor_split(world)[rank]).backward()
    optimizer.step()
    inner = [value for state in optimizer.state.values() for value in state.get("inner", state).values()]
    tensors = [*model.parameters(), *(value for value in inner if isinstance(value, torch.Tensor))]
    return sum((one.to_local() if isinstance(one, DTensor) else one).nbytes for one in tensors)


# What is not supported -----------------------------------------------------------------------------------------------

REFUSED = {
    "adafactor": "moves a tensor as a whole",
    "muon": "moves a tensor as a whole",
    "adamw8bit": "blocks of numbers",
    "stochastic": "rounding='stochastic'",
    "fused": 'gradients="full"',
    "applied in the backward": 'update="step"',
    "another rank": "rank 1",
    "another seed": "seed",
    "before": "Make the optimizer after",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused(pool, name):
    assert_every_process_raises(pool.ask(refused, 2, name=name), REFUSED[name])


def refused(rank: int, world: int, name: str) -> None:
    model = llama(dtype=torch.bfloat16 if name == "stochastic" else torch.float32)
    early = optimizer_of(model) if name == "before" else None
    fully_sharded(model, world)
    given: dict[str, Any] = {}
    match name:
        case "before":
            optimizer = early
        case "muon":
            groups = param_groups(model, rank=RANK)
            optimizer = GaLore(groups, torch.optim.Muon, torch.optim.AdamW, lr=1e-2)
        case "stochastic":
            optimizer = GaLore(param_groups(model, rank=RANK), lr=1e-2, rounding="stochastic")
        case "adafactor" | "adamw8bit":
            optimizer = optimizer_of(model, name)
        case "another rank":
            optimizer = optimizer_of(model, rank=RANK + rank)
        case "another seed":
            optimizer = optimizer_of(model, seed=rank)
        case "fused":
            optimizer, given = optimizer_of(model), {"gradients": "fused"}
        case _:
            optimizer, given = optimizer_of(model), {"gradients": "full", "update": "backward"}
    if given:
        attach(model, optimizer, **given)
    loss_of(model, batch(0).tensor_split(world)[rank]).backward()
    optimizer.step()


def test_placements_of_more_than_one_axis_are_refused():
    with pytest.raises(ValueError, match="cut along one axis"):
        raise_of(torch.nn.Parameter(torch.zeros(4, 4)), (Shard(0), Shard(1)))


def raise_of(weight: torch.Tensor, placements: Any) -> None:
    from galore_torch.distributed.cut import Cut

    class Placed:
        device_mesh = None

    Placed.placements, Placed.shape = placements, weight.shape
    Cut.of(Placed(), "a weight")
