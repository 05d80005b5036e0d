"""One optimizer in a process of its own: it makes its weights and gradients, and takes a timed step when told to."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.floor import Bare
from benchmarks.common.memory import held_bytes, tensors_alive
from benchmarks.common.optimizers import CONTENDERS, weights_with_gradients
from benchmarks.common.sizes import Llama
from benchmarks.common.timing import Call, seconds_of
from benchmarks.common.worker import Commands

FLOOR = "floor"


def floor(weights: list[Tensor], rank: int, **_: Any) -> dict[str, Call]:
    """What no implementation can do without, part by part."""
    bare, updates = Bare(weights, rank), [torch.empty_like(weight) for weight in weights]
    for coordinate in bare.coordinates:
        coordinate.grad = torch.randn_like(coordinate)

    def products() -> None:
        bare.project()
        bare.project_back(updates)

    def read_and_write_weights() -> None:
        for weight in weights:
            weight.mul_(0.9999)

    inner = torch.optim.AdamW(bare.coordinates, lr=1e-3, fused=True).step
    return {"products": products, "inner": inner, "weights": read_and_write_weights}


def timed(parts: dict[str, Call]) -> dict[str, float]:
    """Run each part once and return its seconds."""
    return {name: seconds_of(part, "cpu") for name, part in parts.items()}


def commands(request: dict[str, Any]) -> Commands:
    """Build an optimizer, or the floor: "step" takes a step, "memory" tells what is kept beside weights and gradients.

    Args:
        request: `contender` (key of `CONTENDERS`, or `FLOOR`), `size`, `dtype`, `stagger` and `threads`.
    """
    torch.set_num_threads(request["threads"])
    size = Llama(**request["size"])
    weights = weights_with_gradients(size.weights, getattr(torch, request["dtype"]))
    known = [*tensors_alive(), *(weight.grad for weight in weights if weight.grad is not None)]
    torch.set_grad_enabled(False)  # for good: there is nothing but optimizers here
    keys = {"rank": size.rank, "gap": size.gap, "stagger": request["stagger"]}
    parts: dict[str, Callable[[], object]]
    if request["contender"] == FLOOR:
        parts = floor(weights, **keys)
    else:
        parts = {"step": CONTENDERS[request["contender"]].build(weights, **keys).step}
    return {"step": partial(timed, parts), "memory": partial(held_bytes, known)}
