"""Renewals from sketches: under DDP a full gradient never travels, and all train as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from galore_torch.projection.sketches import sketch_columns
from tests.distributed.test_ddp import (
    SHORT,
    assert_as_one,
    at_first_on_one,
    bytes_of_steps,
    every_low_rank_mode,
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
    assert_as_one(pool, 2, mode=("fused", "step"), steps=SHORT, **SKETCHED, **VARIANTS[name])


@pytest.mark.parametrize("name", ["not staggered", "both sides"])
@pytest.mark.broad("not staggered")
def test_a_variant_applied_in_the_backward_trains_as_one(pool, name):
    assert_as_one(pool, 2, mode=("fused", "backward"), steps=SHORT, **SKETCHED, **VARIANTS[name])


HELD = {
    "averaged each time": {"micro": 2, "no_sync": False},  # the basis is that of the first micro-batch
    "qgalore": {"recipe": "qgalore", "int8": True, "dtype": torch.float32},
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.broad("averaged each time")
def test_all_processes_hold_the_same(pool, name):
    ranks = pool.run(trained, 2, mode=("fused", "step"), **SKETCHED, **HELD[name])
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
