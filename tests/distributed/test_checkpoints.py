"""Distributed checkpoints: what some processes have saved others load, sharded or not, and go on as if nothing was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from galore_torch import attach
from galore_torch.distributed import shard_bases
from tests.distributed.sharded import UNEVEN, fully_sharded
from tests.distributed.trained import BAR, RANK, batch, distance, llama, loss_of, optimizer_of, weights_of

HALF, STEPS = 5, 10
KINDS = {"one": ("one", 1), "ddp": ("ddp", 2), "fsdp": ("fsdp", 2), "fsdp of 3": ("fsdp", 3)}
PARTS = {f"bases in parts, {world}": ("bases in parts", world) for world in (1, 2, 3, 4)}
SAVERS = {**KINDS, **PARTS, "ddp of 4": ("ddp", 4), "fsdp of 4": ("fsdp", 4)}
OPTIONS: dict[str, dict[str, Any]] = {
    "nested": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True, "cpu_offload": True},
}
ROWS = 12


def built(kind: str, world: int) -> tuple[Any, Any, Any]:
    """A model, what runs it, and its optimizer."""
    model = llama(**UNEVEN, layers=1)
    if kind in ("fsdp", "bases in parts"):
        fully_sharded(model, world)
    optimizer = optimizer_of(model, update_proj_gap=4, rank=RANK)
    if kind == "bases in parts":
        shard_bases(optimizer)
    if kind == "ddp":
        attach(model, optimizer)
    return model, DistributedDataParallel(model) if kind == "ddp" else model, optimizer


def walk(net: Any, optimizer: Any, rank: int, world: int, steps: range) -> None:
    for step in steps:
        ids = torch.cat((batch(step), batch(step, 1)))[:ROWS]
        loss_of(net, ids.tensor_split(world)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(rank: int, world: int, kind: str, folder: str, options: dict[str, Any]) -> Tensor:
    """Saves half-way, and returns the weights at the end."""
    model, net, optimizer = built(kind, world)
    walk(net, optimizer, rank, world, range(HALF))
    model_state, state = get_state_dict(model, optimizer, options=StateDictOptions(**options))
    if options.get("full_state_dict"):
        if rank == 0:
            torch.save({"model": model_state, "optimizer": state}, Path(folder) / "full.pt")
    else:
        dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=folder)
    walk(net, optimizer, rank, world, range(HALF, STEPS))
    return weights_of(model)


def load(rank: int, world: int, kind: str, folder: str, options: dict[str, Any]) -> Tensor:
    """Loads into other weights, goes on, and returns the weights at the end."""
    model, net, optimizer = built(kind, world)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
    chosen = StateDictOptions(**options)
    if options.get("full_state_dict"):
        saved = torch.load(Path(folder) / "full.pt", weights_only=True)
        model_state, state = saved["model"], saved["optimizer"]
    else:
        model_state, state = get_state_dict(model, optimizer, options=chosen)
        dcp.load({"model": model_state, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state, options=chosen)
    walk(net, optimizer, rank, world, range(HALF, STEPS))
    return weights_of(model)


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory) -> Callable[[str, str], tuple[str, Tensor]]:
    """Have some processes save once with some options: in which folder, and their weights at the end."""

    @functools.cache
    def saved_once(by: str, options: str) -> tuple[str, Tensor]:
        folder = str(tmp_path_factory.mktemp("saved"))
        kind, world = SAVERS[by]
        return folder, pool.run(save, world, kind=kind, folder=folder, options=OPTIONS[options])[0]

    return saved_once


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loaded_by", KINDS)
@pytest.mark.parametrize("saved_by", ["one", "ddp", "fsdp"])
@pytest.mark.broad("fsdp-one-nested")
def test_what_some_have_saved_others_load(pool, saved, saved_by, loaded_by, options):
    if options == "flattened" and torch.__version__ < "2.10":
        with pytest.raises(RuntimeError, match=r"NotImplementedError: Flattening .* 'dict'"):  # as a basis is
            saved(saved_by, options)
        return
    folder, went_on = saved(saved_by, options)
    kind, world = SAVERS[loaded_by]
    ranks = pool.run(load, world, kind=kind, folder=folder, options=OPTIONS[options])
    assert all(torch.equal(ranks[0], other) for other in ranks)
    assert distance(ranks[0], went_on) <= BAR


@pytest.mark.slow
@pytest.mark.parametrize("loaded_by", KINDS)
@pytest.mark.parametrize("saved_by", ["ddp of 4", "fsdp of 4"])
def test_what_four_have_saved_one_and_two_and_three_load(pool, saved, saved_by, loaded_by):
    test_what_some_have_saved_others_load(pool, saved, saved_by, loaded_by, "nested")


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "options"),
    [
        *(("bases in parts, 4", f"bases in parts, {world}", "nested") for world in (1, 2, 3)),
        ("bases in parts, 4", "one", "full"),
        ("bases in parts, 4", "one", "nested"),
        ("bases in parts, 4", "ddp", "nested"),
        ("bases in parts, 4", "fsdp of 3", "flattened"),
        ("one", "bases in parts, 2", "full"),
        ("fsdp of 4", "bases in parts, 2", "nested"),
    ],
)
@pytest.mark.broad("bases in parts, 4-bases in parts, 3-nested")
def test_bases_in_parts_are_loaded_in_others_and_whole(pool, saved, saved_by, loaded_by, options):
    test_what_some_have_saved_others_load(pool, saved, saved_by, loaded_by, options)


@pytest.mark.parametrize("in_parts", [False, True], ids=["whole bases", "bases in parts"])
def test_the_optimizers_own_state_dict_of_one_process_is_loaded_in_shards(pool, tmp_path, in_parts):
    """`load_state_dict` by itself, as Accelerate calls it."""
    alone = pool.run(save_by_itself, 1, path=str(tmp_path / "state.pt"))[0]
    ranks = pool.run(load_by_itself, 2, path=str(tmp_path / "state.pt"), in_parts=in_parts)
    assert torch.equal(*ranks)
    assert distance(ranks[0], alone) <= BAR


def save_by_itself(rank: int, world: int, path: str) -> Tensor:
    model, net, optimizer = built("one", world)
    walk(net, optimizer, rank, world, range(HALF))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    walk(net, optimizer, rank, world, range(HALF, STEPS))
    return weights_of(model)


def load_by_itself(rank: int, world: int, path: str, in_parts: bool) -> Tensor:
    saved = torch.load(path, weights_only=True)
    model = llama(**UNEVEN, layers=1)
    model.load_state_dict(saved["model"])
    fully_sharded(model, world)
    optimizer = optimizer_of(model, update_proj_gap=4, rank=RANK)
    if in_parts:
        shard_bases(optimizer)
    optimizer.load_state_dict(saved["optimizer"])
    walk(model, optimizer, rank, world, range(HALF, STEPS))
    return weights_of(model)
