"""A model, its optimizer and the process groups of both are freed once nobody holds them, whatever was attached."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from tests.distributed.sharded import trained_in_shards
from tests.distributed.trained import Llama, trained

SKETCHED = {"decomposition": "sketched"}
TRAININGS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "DDP, full": (trained, {"mode": ("full", "step")}),
    "DDP, fused": (trained, {"mode": ("fused", "step")}),
    "DDP, sketched": (trained, {"mode": ("projected", "step"), **SKETCHED}),
    "DDP, applied in the backward": (trained, {"mode": ("fused", "backward")}),
    "FSDP2, full": (trained_in_shards, {"mode": ("full", "step")}),
    "FSDP2, projected": (trained_in_shards, {"mode": ("projected", "step")}),
    "FSDP2, fused": (trained_in_shards, {"mode": ("fused", "step")}),
    "FSDP2, sketched": (trained_in_shards, {"mode": ("fused", "step"), "keys": SKETCHED}),
    "FSDP2, applied in the backward": (trained_in_shards, {"mode": ("fused", "backward")}),
    "FSDP2, bases in parts": (trained_in_shards, {"mode": ("fused", "step"), "in_parts": True}),
}


def alive_after(rank: int, world: int, *, name: str) -> int:
    """How many models are alive after a training that has returned its weights alone."""
    training, given = TRAININGS[name]
    training(rank, world, steps=3, **given)
    gc.collect()
    return sum(type(one).__mro__.count(Llama) for one in gc.get_objects())  # isinstance asks proxies, which may be dead


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.broad("FSDP2, sketched")
def test_a_model_is_freed(pool, name):
    assert pool.run(alive_after, 2, name=name) == [0, 0]
