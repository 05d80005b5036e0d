"""DDP: several processes, each with a part of the batch, make the steps of one process with all of it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from galore_torch import attach
from galore_torch.optim.trained_weight import TrainedWeight
from tests.distributed.pool import Pool
from tests.distributed.trained import BAR, GAP, RANK, batch, distance, llama, loss_of, optimizer_of, trained, weights_of
from tests.modes import MODES, every_mode

LOW_RANK = {name: mode for name, mode in MODES.items() if mode[0] != "full"}
every_low_rank_mode = pytest.mark.parametrize("mode", LOW_RANK.values(), ids=LOW_RANK)
SHORT = 8


def on_one_process(step: int, rank: int) -> bool:
    return step % 3 == 1 and rank == 1


def on_all_processes(step: int, rank: int) -> bool:
    return step % 3 != 1


def at_first_on_one(step: int, rank: int) -> bool:
    return step < 2 and rank == 0


VARIANTS: dict[str, dict[str, Any]] = {
    "accumulated with no_sync": {"micro": 2},
    "accumulated, averaged each time": {"micro": 2, "no_sync": False},
    "clipped, accumulated": {"micro": 2, "clip": 0.05},
    "gradients set to zero": {"micro": 2, "to_none": False},
    "static_graph": {"ddp": {"static_graph": True}},
    "find_unused_parameters": {"ddp": {"find_unused_parameters": True}},
    "gradient_as_bucket_view": {"ddp": {"gradient_as_bucket_view": True}},
    "tied": {"shape": {"tied": True}},
    "accumulated in another dtype": {"attachment": {"grad_dtype": torch.float64}},
    "unused on one process": {"skips": on_one_process, "ddp": {"find_unused_parameters": True}},
    "unused on all processes": {"skips": on_all_processes, "ddp": {"find_unused_parameters": True}},
    "unused on one process at first": {"skips": at_first_on_one, "ddp": {"find_unused_parameters": True}},
    "unused, accumulated": {"skips": at_first_on_one, "micro": 2, "ddp": {"find_unused_parameters": True}},
    "lazy": {"cos_threshold": 0.2, "queue_size": 2},
    "not staggered": {"stagger": False},
    "both sides": {"proj_type": "full"},
    "every matrix": {"target_modules": "all-linear"},
}


def of_one_layer(given: dict[str, Any]) -> dict[str, Any]:
    """What is varied is in each layer, but where layers are tied or skipped."""
    return given if "skips" in given or "shape" in given else {**given, "shape": {"layers": 1}}


def assert_as_one(pool: Any, world: int, bar: float = BAR, **given: Any) -> None:
    ranks = pool.run(trained, world, **given)
    assert all(torch.equal(ranks[0], other) for other in ranks[1:])
    own = {key: value for key, value in given.items() if key != "ddp"}
    assert distance(ranks[0], trained(0, 1, **own, parts=world)) <= bar


@every_mode
@pytest.mark.broad("fused, in backward")
def test_two_processes_train_as_one(pool, mode):
    assert_as_one(pool, 2, mode=mode, steps=2 * GAP + 2)


@pytest.mark.slow
@every_mode
def test_four_processes_train_as_one(pool, mode):
    assert_as_one(pool, 4, mode=mode)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("gradients", ["projected", "fused"])
@pytest.mark.broad("fused-clipped, accumulated", "projected-unused, accumulated", "fused-lazy")
def test_a_variant_trains_as_one(pool, name, gradients):
    assert_as_one(pool, 2, mode=(gradients, "step"), steps=SHORT, **of_one_layer(VARIANTS[name]))


@pytest.mark.parametrize("gradients", ["full", "fused"])
@pytest.mark.parametrize("name", ["find_unused_parameters", "tied", "not staggered", "both sides", "every matrix"])
@pytest.mark.broad("tied-fused")
def test_a_variant_applied_in_the_backward_trains_as_one(pool, name, gradients):
    assert_as_one(pool, 2, mode=(gradients, "backward"), steps=SHORT, **of_one_layer(VARIANTS[name]))


@every_low_rank_mode
@pytest.mark.slow
def test_small_buckets_change_nothing(pool, mode):
    assert_as_one(pool, 2, mode=mode, steps=SHORT, ddp={"bucket_cap_mb": 600 / 2**20})


@every_low_rank_mode
@pytest.mark.broad("fused, in backward")
def test_all_begin_from_the_first_ones_weights(pool, mode):
    ranks = pool.run(from_its_own_start, 2, mode=mode)
    assert torch.equal(*ranks)
    assert distance(ranks[0], trained(0, 1, mode=mode, steps=SHORT)) <= BAR


def from_its_own_start(rank: int, world: int, mode: Any) -> torch.Tensor:
    return trained(rank, world, mode=mode, steps=SHORT, seed_of_model=rank)


def attached(world: int, mode: Any) -> tuple[Any, Any, Any]:
    """A model with its optimizer, and what its training runs: DDP around it, or itself in one process."""
    model = llama()
    optimizer = optimizer_of(model)
    attach(model, optimizer, *mode)
    return model, optimizer, DistributedDataParallel(model) if world > 1 else model


@every_low_rank_mode
@pytest.mark.broad("fused, at step")
def test_a_model_that_is_run_by_itself_before_a_backward_trains_as_one(pool, mode):
    ranks = pool.run(run_by_itself_between, 2, mode=mode)
    assert torch.equal(*ranks)
    assert distance(ranks[0], run_by_itself_between(0, 1, mode=mode)) <= BAR


def run_by_itself_between(rank: int, world: int, mode: Any) -> torch.Tensor:
    model, optimizer, net = attached(world, mode)
    for step in range(SHORT):
        loss = loss_of(net, batch(step).tensor_split(world)[rank])
        loss_of(model, batch(step, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


@pytest.mark.parametrize("mode", [("full", "step"), ("fused", "step"), ("fused", "backward")], ids=" ".join)
@pytest.mark.broad("fused step")
def test_a_model_that_one_process_runs_by_itself_before_a_step_trains_as_one(pool, mode):
    ranks = pool.run(run_by_one_before_a_step, 2, mode=mode)
    assert torch.equal(*ranks)
    assert distance(ranks[0], run_by_one_before_a_step(0, 1, mode=mode)) <= BAR


def run_by_one_before_a_step(rank: int, world: int, mode: Any) -> torch.Tensor:
    model, optimizer, net = attached(world, mode)
    for step in range(10):
        loss_of(net, batch(step).tensor_split(world)[rank]).backward()
        if rank == 0:
            loss_of(model, batch(step))  # a figure for a log, say, without no_grad
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


@every_mode
@pytest.mark.broad("fused, at step")
def test_a_gradient_that_is_not_finite_on_one_process_is_so_on_all(pool, mode):
    ranks = pool.run(with_an_infinite_gradient, 2, mode=mode)
    for counts, weights in ranks:
        assert set(counts.values()) == {2}
        assert bool(weights.isfinite().all())
    assert torch.equal(*(weights for _, weights in ranks))


def with_an_infinite_gradient(rank: int, world: int, mode: Any, wrap: Any = None, **keys: Any) -> Any:
    model = llama()
    model = model if wrap is None else wrap(model)  # FSDP2 before the optimizer is made, DDP after it is attached
    optimizer = optimizer_of(model, skip_nonfinite=True, **keys)
    attach(model, optimizer, *mode)
    net: Any = DistributedDataParallel(model) if wrap is None else model
    for step in range(SHORT):
        spoilt = rank == 1 and step in (0, 5)
        (loss_of(net, batch(step).tensor_split(world)[rank]) * (float("inf") if spoilt else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.nonfinite_counts(), weights_of(model)


@pytest.mark.parametrize("mode", [("fused", "step"), ("fused", "backward"), ("full", "step")])
@pytest.mark.parametrize("recipe", ["sgd", "adafactor"])
@pytest.mark.broad("sgd-mode0")
def test_a_recipe_trains_as_one(pool, recipe, mode):
    assert_as_one(pool, 2, **of_one_layer({"mode": mode, "recipe": recipe}))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["adamw", "torch's adafactor", "muon"])
def test_so_does_every_other(pool, recipe):
    assert_as_one(pool, 2, **of_one_layer({"mode": ("fused", "step"), "recipe": recipe}))


@pytest.mark.parametrize("mode", [("fused", "step"), ("projected", "step"), ("full", "backward")])
@pytest.mark.parametrize(
    "given", [{"recipe": "adamw8bit"}, {"recipe": "qgalore", "int8": True}], ids=["8bit", "qgalore"]
)
@pytest.mark.slow
def test_in_few_bits_all_processes_hold_the_same(pool, given, mode):
    assert torch.equal(*pool.run(trained, 2, mode=mode, dtype=torch.float32, **of_one_layer(given)))


@pytest.mark.slow
@every_mode
def test_svd_trains_as_one(pool, mode):
    """Its directions turn with the last digits of a gradient: rounding alone moves weights as far in one process."""
    assert_as_one(pool, 2, bar=1e-6, mode=mode, steps=2 * SHORT, decomposition="svd")


@pytest.mark.slow
@every_mode
def test_in_float32_processes_differ_by_rounding_alone(pool, mode):
    """By no more than three times what the same sums in another order differ by, in one process."""
    ours = pool.run(trained, 2, mode=mode, dtype=torch.float32)[0]
    alone, otherwise = (trained(0, 1, mode=mode, dtype=torch.float32, reverses=flip) for flip in (False, True))
    assert distance(ours, alone) <= 3 * distance(otherwise, alone)


# What a step sends, and who decomposes --------------------------------------------------------------------------------


@every_low_rank_mode
@pytest.mark.broad("fused, at step")
def test_an_ordinary_step_sends_projected_gradients_alone(pool, mode):
    for first, ordinary, projected_grads, full in pool.run(bytes_of_steps, 2, mode=mode):
        assert ordinary <= 1.02 * projected_grads
        assert first <= 1.8 * full


def bytes_of_steps(rank: int, world: int, mode: Any, **keys: Any) -> tuple[float, float, float, float]:
    """Of projected layers, what a process sends: at first, in the third step; of projected gradients, of full ones.

    In an all-reduce each process sends 2 (world - 1) / world of it, in a broadcast one sends what all others get.
    """
    model = llama(width=96, inner=160)
    optimizer = optimizer_of(model, stagger=False, **keys)
    attach(model, optimizer, *mode)
    net = DistributedDataParallel(model)
    sent: list[float] = []
    steps: list[float] = []
    reduce, broadcast = dist.all_reduce, dist.broadcast
    share = (world - 1) / world

    def counted_reduce(one: torch.Tensor, **given: Any) -> Any:
        sent.append(2 * share * one.nbytes)
        return reduce(one, **given)

    def counted_broadcast(one: torch.Tensor, **given: Any) -> Any:
        sent.append(share * one.nbytes)
        return broadcast(one, **given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "all_reduce", counted_reduce)
        patched.setattr(dist, "broadcast", counted_broadcast)
        for step in range(3):
            sent.clear()
            loss_of(net, batch(step).tensor_split(world)[rank]).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(sum(sent))
    held = [one for group in optimizer.param_groups if "rank" in group for one in group["params"]]
    projected_grads = sum(RANK * max(weight.shape) * weight.element_size() for weight in held)
    full = sum(weight.numel() * weight.element_size() for weight in held)
    return steps[0], steps[2], 2 * share * projected_grads, 2 * share * full


@pytest.mark.parametrize("mode", [("fused", "step"), ("full", "step")], ids=["fused", "full"])
@pytest.mark.broad("fused")
def test_renewals_are_divided(pool, mode):
    counts = pool.run(decompositions, 4, mode=mode)
    assert sum(counts) == 14 * 2
    assert max(counts) <= -(-14 // 4) * 2


def decompositions(rank: int, world: int, mode: Any) -> int:
    """How many bases a process finds: 14 weights, twice."""
    found = []
    decompose = TrainedWeight.decompose
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainedWeight, "decompose", lambda one, *given: found.append(one) or decompose(one, *given))
        trained(rank, world, mode=mode, steps=GAP + 1, stagger=False)
    return len(found)


def test_a_process_that_dies_in_a_renewal_ends_the_others():
    pool = Pool(2)
    try:
        (answer,) = [one for one in pool.ask(dying, 2, survivors=1) if one is not None]
        assert answer.kind in ("RuntimeError", "DistBackendError", "DistNetworkError")
    finally:
        pool.close()


def dying(rank: int, world: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        if rank == 1:
            patched.setattr(TrainedWeight, "decompose", lambda *_: os._exit(1))
        trained(rank, world, mode=("fused", "step"), steps=GAP + 1)


def test_a_process_that_has_drifted_apart_is_found_at_the_next_renewal(pool):
    for answer in pool.ask(drifting, 2):
        assert answer.kind == "RuntimeError"
        assert "different values of" in answer.text


def drifting(rank: int, world: int) -> None:
    model = llama()
    optimizer = optimizer_of(model)
    attach(model, optimizer)
    net = DistributedDataParallel(model)
    for step in range(2 * GAP):
        loss_of(net, batch(step).tensor_split(world)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3 and rank == 1:
            with torch.no_grad():
                next(one for group in optimizer.param_groups if "rank" in group for one in group["params"]).mul_(1.001)
