"""The small LLaMA under FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from galore_torch import attach
from galore_torch.distributed import shard_bases
from tests.distributed.trained import STEPS, batch, llama, loss_of, optimizer_of, weights_of

UNEVEN = {"width": 27, "inner": 41}


def fully_sharded(model: Any, world: int, *, replicas: int = 1, **given: Any) -> Any:
    """A model, each of its layers and the rest sharded."""
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **given)
    return fully_shard(model, mesh=mesh, **given)


def trained_in_shards(
    rank: int,
    world: int,
    *,
    recipe: str = "adamw",
    steps: int = STEPS,
    micro: int = 1,
    clip: float | None = None,
    shape: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    mode: tuple[Any, Any] | None = None,
    replicas: int = 1,
    placement: Any = None,
    mp_policy: Any = None,
    spoils: tuple[int, int] | None = None,
    keys: dict[str, Any] | None = None,
    clips_from: int = 0,
    alike: bool = False,
    to_none: bool = True,
    checkpoints: bool = False,
    in_parts: bool = False,
    frozen: bool = False,
) -> Tensor:
    """The weights after some steps, of one process or of one of several.

    With `alike` each process has the whole batch, so that averages are exact in any dtype.
    """
    model: Any = llama(dtype=dtype, **(shape or {}))
    model.checkpoints = checkpoints
    if frozen:
        model.layers[0].mlp["up_proj"].requires_grad_(False)
    if world > 1:
        given: dict[str, Any] = {} if placement is None else {"shard_placement_fn": placement(model)}
        given |= {} if mp_policy is None else {"mp_policy": mp_policy}
        fully_sharded(model, world, replicas=replicas, **given)
    optimizer = optimizer_of(model, recipe, **(keys or {}))
    if in_parts:
        shard_bases(optimizer)
    if mode is not None:
        attach(model, optimizer, *mode)
    for step in range(steps):
        for number in range(micro):
            if world > 1 and micro > 1:
                model.set_requires_gradient_sync(number == micro - 1)
            parts, part = (1, 0) if alike else (world, rank)
            loss_of_part = loss_of(model, batch(step, number).tensor_split(parts)[part]) / micro
            loss_of_part.backward()
        if spoils is not None and step == spoils[0] and rank == min(spoils[1], world - 1):
            spoil(model)
        if clip is not None and step >= clips_from:
            clip_norm(model, clip)
        optimizer.step()
        empty(model, to_none)
    return weights_of(model)


def clip_norm(model: Any, clip: float, by: Callable[..., Any] = torch.nn.utils.clip_grad_norm_) -> None:
    """Clips by a function; but torch 2.9 adds its 1e-6 to each process' part of the norm, before they are one."""
    if torch.__version__ >= "2.11":
        by(model.parameters(), clip)
        return
    norm: Any = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)


def spoil(model: Any) -> None:
    """Leave a number that is not finite in each gradient."""
    for weight in model.parameters():
        grad = weight.grad.to_local() if hasattr(weight.grad, "to_local") else weight.grad
        if grad.numel():
            grad.view(-1)[-1] = float("nan")


def empty(model: Any, to_none: bool) -> None:
    for weight in model.parameters():
        if to_none:
            weight.grad = None
        elif weight.grad is not None:
            weight.grad.zero_()
