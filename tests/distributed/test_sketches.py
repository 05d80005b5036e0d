"""Renewals from sketches: a full gradient never travels, and all train as one process does, under DDP and FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from galore_torch.projection.sketches import sketch_columns
from tests.distributed import test_fsdp
from tests.distributed.sharded import UNEVEN, fully_sharded
from tests.distributed.test_ddp import (
    SHORT,
    assert_as_one,
    at_first_on_one,
    bytes_of_steps,
    every_low_rank_mode,
    of_one_layer,
    on_all_processes,
    on_one_process,
    with_an_infinite_gradient,
)
from tests.distributed.trained import GAP, RANK, llama, trained

SKETCHED = {"decomposition": "sketched"}
VARIANTS: dict[str, dict[str, Any]] = {
    "accumulated with no_sync": {"micro": 2},
    "gradients set to zero": {"micro": 2, "to_none": False},
    "accumulated in another dtype": {"attachment": {"grad_dtype": torch.float64}},
    "unused on one process": {"skips": on_one_process, "ddp": {"find_unused_parameters": True}},
    "unused on all processes": {"skips": on_all_processes, "ddp": {"find_unused_parameters": True}},
    "unused on one process at first, accumulated": {
        "skips": at_first_on_one,
        "micro": 2,
        "ddp": {"find_unused_parameters": True},
    },
    "lazy": {"cos_threshold": 0.2, "queue_size": 2},
    "not staggered": {"stagger": False},
    "both sides": {"proj_type": "full"},
    "moments rotated": {"moments": "rotate"},
}


@every_low_rank_mode
@pytest.mark.broad("fused, at step")
def test_two_processes_train_as_one(pool, mode):
    assert_as_one(pool, 2, mode=mode, steps=2 * GAP + 2, **SKETCHED)


@pytest.mark.slow
def test_four_processes_train_as_one(pool):
    assert_as_one(pool, 4, mode=("fused", "step"), **SKETCHED)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.broad("accumulated with no_sync", "unused on one process")
def test_a_variant_trains_as_one(pool, name):
    assert_as_one(pool, 2, mode=("fused", "step"), steps=SHORT, **SKETCHED, **of_one_layer(VARIANTS[name]))


@pytest.mark.parametrize("name", ["not staggered", "both sides"])
@pytest.mark.slow
def test_a_variant_applied_in_the_backward_trains_as_one(pool, name):
    assert_as_one(pool, 2, mode=("fused", "backward"), steps=SHORT, **SKETCHED, **of_one_layer(VARIANTS[name]))


HELD = {
    "averaged each time": {"micro": 2, "no_sync": False},  # the basis is that of the first micro-batch
    "qgalore": {"recipe": "qgalore", "int8": True, "dtype": torch.float32},
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.broad("averaged each time")
def test_all_processes_hold_the_same(pool, name):
    ranks = pool.run(trained, 2, mode=("fused", "step"), **SKETCHED, **of_one_layer(HELD[name]))
    assert torch.equal(*ranks)
    assert bool(ranks[0].isfinite().all())


def test_where_weights_are_averaged_a_renewal_is_from_the_full_gradient(pool):
    given = {"mode": ("fused", "step"), "steps": 2 * GAP, "alike": True, **SKETCHED}
    ranks = pool.run(trained, 2, **given, attachment={"average_every": 4})
    assert torch.equal(*ranks)
    assert torch.equal(ranks[0], trained(0, 1, **given))


@every_low_rank_mode
@pytest.mark.broad("fused, at step")
def test_a_gradient_that_is_not_finite_on_one_process_is_so_on_all(pool, mode):
    ranks = pool.run(with_an_infinite_gradient, 2, mode=mode, **SKETCHED)
    for counts, weights in ranks:
        assert set(counts.values()) == {2}
        assert bool(weights.isfinite().all())
    assert torch.equal(*(weights for _, weights in ranks))


@every_low_rank_mode
@pytest.mark.broad("fused, at step")
def test_a_renewal_sends_a_sketch_and_a_projected_gradient(pool, mode):
    """And from the owner the basis, which is half of an average; the first step sends weights, too."""
    weights = [one for name, one in llama(width=96, inner=160).named_parameters() if "proj" in name]
    sketches, bases = ((sum(n * min(one.shape) for one in weights)) for n in (sketch_columns((96, 96), RANK), RANK))
    for first, renewing, projected_grads, full in pool.run(bytes_of_steps, 2, mode=mode, update_proj_gap=2, **SKETCHED):
        expected = projected_grads + 8 * (sketches + bases / 2)
        assert expected <= renewing <= 1.02 * expected
        assert renewing < 0.3 * full
        assert first <= 1.02 * (expected + full / 2)


# FSDP2 ---------------------------------------------------------------------------------------------------------------

SHARDED: dict[str, dict[str, Any]] = {
    "fused": {"steps": 2 * GAP + 2},
    "projected, uneven": {"mode": ("projected", "step"), "shape": UNEVEN, "steps": 2 * GAP + 2},
    "applied in the backward": {"mode": ("fused", "backward")},
    "accumulated": {"micro": 2, "theirs": None},
    "projected, accumulated": {"mode": ("projected", "step"), "micro": 2, "theirs": None},
    "zeros left": {"to_none": False},
    "left, moments rotated": {"keys": {"proj_type": "left", "moments": "rotate"}, "shape": UNEVEN, "steps": 10},
    "right": {"keys": {"proj_type": "right"}},
    "both sides": {"keys": {"proj_type": "full"}},
    "lazy": {"keys": {"cos_threshold": 0.2, "queue_size": 2}, "steps": 10},
    "not staggered": {"keys": {"stagger": False}},
    "bases in parts": {"in_parts": True, "shape": UNEVEN},
    "cut where it is not projected": {"placement": test_fsdp.of_free_axes},
    "run again in the backward": {"checkpoints": True},
    "Muon": {"recipe": "muon", "shape": UNEVEN},
}


def sharded(name: str) -> dict[str, Any]:
    given = {"steps": SHORT, "mode": ("fused", "step"), **SHARDED[name]}
    return {**given, "keys": {**SKETCHED, **given.get("keys", {})}}


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.broad("fused", "accumulated")
def test_shards_train_as_one(pool, name):
    test_fsdp.assert_as_one(pool, 2, **test_fsdp.of_one_layer(sharded(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fused", "projected, uneven", "accumulated", "bases in parts"])
def test_four_shards_train_as_one(pool, name):
    test_fsdp.assert_as_one(pool, 4, **test_fsdp.of_one_layer(sharded(name)))


@pytest.mark.slow
def test_replicas_of_shards_train_as_one(pool):
    test_fsdp.assert_as_one(pool, 4, replicas=2, steps=SHORT, mode=("fused", "step"), keys=SKETCHED)


def test_a_renewal_of_shards_sends_sketches_and_projected_gradients(pool):
    projected = [one for name, one in llama().named_parameters() if "proj" in name]
    columns = sketch_columns((24, 24), RANK)
    sketches, grads = (sum(n * side(one.shape) for one in projected) for n, side in ((columns, min), (RANK, max)))
    full, sent = pool.run(test_fsdp.numbers_reduced, 2, mode=("fused", "step"), update_proj_gap=1, **SKETCHED)[0]
    assert sent == sketches + grads
    assert full == sum(one.numel() for name, one in llama().named_parameters() if "proj" not in name)


@pytest.mark.parametrize("mode", [("fused", "step"), ("fused", "backward")])
@pytest.mark.broad("mode0")
def test_a_gradient_that_is_not_finite_on_one_process_is_so_in_all_shards(pool, mode):
    ranks = pool.run(with_an_infinite_gradient_in_shards, 2, mode=mode)
    for counts, weights in ranks:
        assert set(counts.values()) == {2}
        assert bool(weights.isfinite().all())
    assert torch.equal(*(weights for _, weights in ranks))


def with_an_infinite_gradient_in_shards(rank: int, world: int, mode: Any) -> Any:
    return with_an_infinite_gradient(rank, world, mode, wrap=lambda model: fully_sharded(model, world), **SKETCHED)
