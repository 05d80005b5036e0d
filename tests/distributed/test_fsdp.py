"""FSDP2: weights that are sharded over processes are trained as one process trains whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard

from galore_torch import attach
from galore_torch.distributed import shard_placement
from galore_torch.distributed.cut import Cut
from galore_torch.projection import Projection
from tests.distributed.pool import assert_every_process_raises
from tests.distributed.sharded import UNEVEN, fully_sharded, trained_in_shards
from tests.distributed.trained import BAR, RANK, STEPS, batch, distance, llama, loss_of, optimizer_of

SHORT = 7
VARIANTS: dict[str, dict[str, Any]] = {
    "as it comes": {"steps": 10},
    "uneven": {"shape": UNEVEN},
    "left": {"keys": {"proj_type": "left"}},
    "right": {"keys": {"proj_type": "right"}},
    "both sides": {"keys": {"proj_type": "full"}},
    "clipped, accumulated": {"micro": 2, "clip": 0.05},
    "lazy": {"keys": {"cos_threshold": 0.2, "queue_size": 2}, "steps": 10},
    "SGD": {"recipe": "sgd"},
    "moments rotated": {"keys": {"moments": "rotate"}, "shape": UNEVEN, "steps": 10},
    "attached": {"mode": ("full", "step")},
    "not finite in one part": {"spoils": (3, 1), "keys": {"skip_nonfinite": True}},
    "Adafactor": {"recipe": "adafactor", "shape": UNEVEN},
    "torch's Adafactor": {"recipe": "torch's adafactor", "shape": UNEVEN},
    "Muon": {"recipe": "muon", "shape": UNEVEN},
    "every matrix": {"keys": {"target_modules": "all-linear"}, "shape": UNEVEN},
}


def assert_as_one(pool: Any, world: int, *, bar: float = BAR, **given: Any) -> None:
    ranks = pool.run(trained_in_shards, world, **{key: value for key, value in given.items() if key != "theirs"})
    assert all(torch.equal(ranks[0], other) for other in ranks[1:])
    alone = {key: value for key, value in given.items() if key not in ("replicas", "placement", "theirs", "in_parts")}
    alone["mode"] = given.get("theirs", given.get("mode"))  # the first basis is that of all micro-batches, as in full
    assert distance(ranks[0], trained_in_shards(0, 1, **alone)) <= bar


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.broad("clipped, accumulated")
def test_shards_train_as_one_process(pool, name):
    assert_as_one(pool, 2, **{"steps": SHORT, **VARIANTS[name]})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["adamw", "sgd", "adafactor", "torch's adafactor", "muon"])
def test_shards_of_every_recipe_train_as_one_process(pool, recipe):
    assert_as_one(pool, 2, **of_one_layer({"recipe": recipe, "shape": UNEVEN, "steps": STEPS}))


EARLY: dict[str, dict[str, Any]] = {
    "projected": {"mode": ("projected", "step"), "shape": UNEVEN, "steps": 10},
    "fused": {"mode": ("fused", "step"), "steps": 10},
    "fused, uneven": {"mode": ("fused", "step"), "shape": UNEVEN},
    "fused, clipped": {"mode": ("fused", "step"), "clip": 0.05, "clips_from": 1},  # in the first step all are full
    "fused, accumulated": {"mode": ("fused", "step"), "micro": 2, "theirs": None},
    "projected, zeros left": {"mode": ("projected", "step"), "to_none": False},
    "fused, SGD with L2 decay": {"mode": ("fused", "step"), "recipe": "sgd", "keys": {"weight_decay": 0.1}},
    "fused, Muon": {"mode": ("fused", "step"), "recipe": "muon", "shape": UNEVEN},
    "fused, lazy": {"mode": ("fused", "step"), "keys": {"cos_threshold": 0.2, "queue_size": 2}, "steps": 10},
    "fused, run again in the backward": {"mode": ("fused", "step"), "checkpoints": True},
    "fused, a layer frozen": {"mode": ("fused", "step"), "frozen": True},
    "applied in the backward": {"mode": ("fused", "backward"), "shape": UNEVEN},
    "full, applied in the backward": {"mode": ("full", "backward")},
}


@pytest.mark.parametrize("name", EARLY)
@pytest.mark.broad("applied in the backward")
def test_gradients_that_are_projected_early_train_as_one_process(pool, name):
    assert_as_one(pool, 2, **{"steps": SHORT, **EARLY[name]})


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_four_shards_train_as_one_process(pool, name):
    """Some parts are shorter than others, and some are empty."""
    assert_as_one(pool, 4, **of_one_layer(VARIANTS[name]))


def of_one_layer(variant: dict[str, Any]) -> dict[str, Any]:
    """What is varied is in each layer."""
    return {"steps": SHORT, **variant, "shape": {**variant.get("shape", {}), "layers": 1}}


@pytest.mark.slow
@pytest.mark.parametrize("name", EARLY)
def test_gradients_that_are_projected_early_train_in_four_processes_as_in_one(pool, name):
    assert_as_one(pool, 4, **of_one_layer(EARLY[name]))


@pytest.mark.parametrize("mode", [None, ("fused", "step")], ids=["full", "fused"])
@pytest.mark.slow
def test_replicas_of_shards_train_as_one_process(pool, mode):
    assert_as_one(pool, 4, replicas=2, steps=SHORT, mode=mode)


ALIKE = {
    "8 bits": {"recipe": "adamw8bit", "dtype": torch.float32, "shape": {"width": 72, "inner": 104}, "steps": STEPS},
    "8 bits in parts": {"recipe": "adamw8bit", "dtype": torch.float32, "shape": {"width": 129, "inner": 128}},
    "4-bit bases": {"recipe": "qgalore", "dtype": torch.float32, "shape": {"width": 72, "inner": 104}, "steps": STEPS},
    "stochastic": {"recipe": "stochastic", "dtype": torch.bfloat16, "shape": UNEVEN, "steps": STEPS},
    "compensated": {"recipe": "compensated", "dtype": torch.bfloat16, "shape": UNEVEN},
}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.broad("compensated")
def test_numbers_of_few_bits_are_those_of_one_process(pool, name):
    assert_as_one(pool, 2, bar=0, alike=True, keys={"proj_type": "right", "rank": 64}, **of_one_layer(ALIKE[name]))


@pytest.mark.slow
def test_moments_of_few_bits_are_rotated_as_in_one_process(pool):
    keys = {"proj_type": "right", "rank": 64, "moments": "rotate"}
    assert_as_one(pool, 2, bar=0, alike=True, keys=keys, **of_one_layer(ALIKE["8 bits in parts"]))


def test_state_in_few_bits_is_divided_between_blocks(pool, tmp_path):
    """And what two processes have saved one loads, to the bit."""
    codes, held = pool.run(few_bits_saved, 2, folder=str(tmp_path))[0]
    assert all(shape[0] < whole[0] for shape, whole in held)
    assert len(held) == 2 * 2 * 7  # two moments, and the scales of their blocks
    alone = pool.run(few_bits_loaded, 1, folder=str(tmp_path))[0]
    assert codes.keys() == alone.keys()
    for name, value in codes.items():
        assert torch.equal(value, alone[name])


def few_bits(world: int) -> Any:
    model = llama(dtype=torch.float32, width=144, inner=128)
    if world > 1:
        fully_sharded(model, world)
    return model, optimizer_of(model, "adamw8bit", rank=64, proj_type="right")


def few_bits_saved(rank: int, world: int, folder: str) -> Any:
    model, optimizer = few_bits(world)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    state = get_state_dict(model, optimizer)[1]
    dcp.save({"optimizer": state}, checkpoint_id=folder)
    tensors = flat_state(state)
    held = [
        (one.to_local().shape, one.shape)
        for name, one in tensors.items()
        if "layers.0" in name and "proj" in name and isinstance(one, DTensor)
    ]
    return {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in tensors.items()}, held


def few_bits_loaded(rank: int, world: int, folder: str) -> Any:
    model, optimizer = few_bits(world)
    model_state, state = get_state_dict(model, optimizer)
    dcp.load({"optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state)
    return flat_state(get_state_dict(model, optimizer)[1])


def flat_state(state: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": one
        for name, held in state["state"].items()
        for key, one in held.get("inner", held).items()
        if isinstance(one, torch.Tensor)
    }


@pytest.mark.slow
def test_svd_trains_as_one_process(pool):
    assert_as_one(pool, 2, bar=1e-6, keys={"decomposition": "svd"})


def of_free_axes(model: nn.Module) -> Any:
    return shard_placement(model, 2, rank=RANK)


@pytest.mark.parametrize("mode", [None, ("fused", "step")], ids=["full", "fused"])
@pytest.mark.broad("fused")
def test_weights_cut_where_they_are_not_projected_train_as_one_process(pool, mode):
    assert_as_one(pool, 2, placement=of_free_axes, steps=SHORT, mode=mode)


@pytest.mark.slow
def test_projected_gradients_of_layers_in_16_bits_move_weights_in_32(pool):
    given = {"dtype": torch.float32, "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32), "steps": SHORT}
    full = pool.run(trained_in_shards, 2, **given)[0]
    ranks = pool.run(trained_in_shards, 2, mode=("fused", "step"), **given)
    assert torch.equal(*ranks)
    moved = distance(trained_in_shards(0, 1, dtype=torch.float32, steps=0), full)
    assert distance(ranks[0], full) <= 0.1 * moved


# What is sent, and what is held --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "placement"), [({"proj_type": "right"}, None), ({}, of_free_axes)])
def test_where_the_projected_axis_is_whole_an_ordinary_step_sends_no_projected_gradient(pool, keys, placement):
    assert pool.run(floats_sent, 2, keys=keys, placement=placement) == [0, 0]


def test_an_ordinary_step_reduces_projected_gradients_in_place_of_full_ones(pool):
    full, images = pool.run(numbers_reduced, 2, mode=("fused", "step"))[0]
    assert images == RANK * (4 * 2 * 24 + 3 * 2 * 40)
    assert full == sum(one.numel() for name, one in llama().named_parameters() if "proj" not in name)


def numbers_reduced(rank: int, world: int, mode: Any, **keys: Any) -> tuple[int, int]:
    """How many numbers of full gradients FSDP2 averages in the second step, and how many of projected ones we do."""
    model = llama()
    fully_sharded(model, world)
    optimizer = optimizer_of(model, stagger=False, **keys)
    attach(model, optimizer, *mode)
    sent: list[int] = []
    for step in range(2):
        sent.clear()
        with pytest.MonkeyPatch.context() as patched:
            for of, name in ((Cut, "reduce"), (dist, "all_reduce")):
                patched.setattr(of, name, counting(getattr(of, name), sent))
            loss_of(model, batch(step).tensor_split(world)[rank]).backward()
        full = sum(one.numel() for one in model.parameters() if isinstance(one.grad, DTensor))
        optimizer.step()
        optimizer.zero_grad()
    return full, sum(sent)


def counting(reduce: Any, sent: list[int]) -> Any:
    def counted(*given: Any, **named: Any) -> Any:
        sent.append(given[-1].numel() if given[-1].is_floating_point() else 0)
        return reduce(*given, **named)

    return counted


def test_where_it_is_cut_an_ordinary_step_sums_images(pool):
    sums = pool.run(floats_sent, 2, keys={"proj_type": "left"}, placement=None)
    assert sums == [sum(RANK * columns for columns in (24,) * 6 + (40,)) * 2] * 2


def floats_sent(rank: int, world: int, keys: Any, placement: Any) -> int:
    """How many floating-point numbers `step()` sums over processes, without a renewal."""
    model = llama()
    fully_sharded(model, world, **({} if placement is None else {"shard_placement_fn": placement(model)}))
    optimizer = optimizer_of(model, stagger=False, **keys)
    sent: list[int] = []
    for step in range(2):
        loss_of(model, batch(step).tensor_split(world)[rank]).backward()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(dist, "all_reduce", counting(dist.all_reduce, sent))
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
    "stochastic": "rounding='stochastic'",
    "grad_bits": "grad_bits is 8",
    "no sync, applied in the backward": "use update='step'",
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
    fully_sharded(model, world, **({"shard_placement_fn": of_free_axes(model)} if name == "stochastic" else {}))
    given: dict[str, Any] = {}
    match name:
        case "before":
            optimizer = early
        case "stochastic":
            optimizer = optimizer_of(model, name)
        case "another rank":
            optimizer = optimizer_of(model, rank=RANK + rank)
        case "another seed":
            optimizer = optimizer_of(model, seed=rank)
        case "grad_bits":
            optimizer, given = optimizer_of(model), {"gradients": "fused", "grad_bits": 8}
        case _:
            optimizer, given = optimizer_of(model), {"gradients": "full", "update": "backward"}
            model.set_requires_gradient_sync(False)
    if given:
        attach(model, optimizer, **given)
    loss_of(model, batch(0).tensor_split(world)[rank]).backward()
    optimizer.step()


def test_placements_of_more_than_one_axis_are_refused():
    with pytest.raises(ValueError, match="cut along one axis"):
        raise_of(torch.nn.Parameter(torch.zeros(4, 4)), (Shard(0), Shard(1)))


def raise_of(weight: torch.Tensor, placements: Any) -> None:
    class Placed:
        device_mesh = None

    Placed.placements, Placed.shape = placements, weight.shape
    Cut.of(Placed(), Projection.of((4, 4), 2), "a weight")


def test_fsdp1_is_refused_by_name(pool):
    for answers in (pool.ask(under_fsdp1, 1, flat=flat) for flat in (True, False)):
        assert_every_process_raises(answers, "fully_shard (FSDP2")


def under_fsdp1(rank: int, world: int, flat: bool) -> None:
    model = FullyShardedDataParallel(llama(), device_id=torch.device("cpu"), use_orig_params=not flat)
    optimizer_of(model)
