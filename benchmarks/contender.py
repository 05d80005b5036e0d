"""One contender in a process of its own: it makes its weights and gradients, and takes a timed step when it is told to.

`processes.py` starts it as a script. Its one argument is a `Request` in JSON; its commands are "step" and "memory".
"""

import gc
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.serving import Answers, serve
from benchmarks.shapes import LLAMA, LlamaShapes

Parts = dict[str, Callable[[], object]]
"""What a step of a contender consists of: the parts are timed one by one."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a contender is asked to be.

    Attributes:
        contender: Key of `CONTENDERS`.
        shapes: Key of `LLAMA`.
        dtype: Name of the torch dtype of weights and gradients.
        gap: Steps between renewals, where there are any.
        stagger: Whether our layers take turns to renew.
        threads: Threads of torch.
    """

    contender: str
    shapes: str
    dtype: str
    gap: int = 200
    stagger: bool = False
    threads: int = 2

    @property
    def llama(self) -> LlamaShapes:
        """The model whose weights they are."""
        return LLAMA[self.shapes]


def adamw(weights: list[Tensor], _: Request) -> Parts:
    """The fused AdamW of torch, full-rank."""
    return {"step": torch.optim.AdamW(weights, lr=1e-3, fused=True).step}


def galore_2(weights: list[Tensor], request: Request) -> Parts:
    """This package, as it comes."""
    from galore_torch import GaLoreAdamW

    group = {"params": weights, "rank": request.llama.rank, "update_proj_gap": request.gap, "stagger": request.stagger}
    return {"step": GaLoreAdamW([group], lr=1e-3).step}


def galore_1(weights: list[Tensor], request: Request) -> Parts:
    """galore-torch 1.0, with the defaults of its README."""
    from galore_torch import GaLoreAdamW

    group = {
        "params": weights,
        "rank": request.llama.rank,
        "update_proj_gap": request.gap,
        "scale": 0.25,
        "proj_type": "std",
    }
    return {"step": GaLoreAdamW([group], lr=1e-3, no_deprecation_warning=True).step}


def apollo(weights: list[Tensor], request: Request) -> Parts:
    """apollo-torch, with the defaults of its README."""
    from apollo_torch import APOLLOAdamW

    group = {
        "params": weights,
        "rank": request.llama.rank,
        "update_proj_gap": request.gap,
        "scale": 1,
        "proj": "random",
        "proj_type": "std",
        "scale_type": "channel",
    }
    return {"step": APOLLOAdamW([group], lr=1e-3).step}


def floor(weights: list[Tensor], request: Request) -> Parts:
    """What no implementation can do without, each part bare and into memory that is there already."""
    llama, dtype = request.llama, weights[0].dtype
    coordinates = [torch.zeros(shape, dtype=dtype) for shape in llama.coordinates]
    for coordinate in coordinates:
        coordinate.grad = torch.randn_like(coordinate)
    bases = [torch.randn(min(shape), llama.rank, dtype=dtype) for shape in llama.weights]
    updates = [torch.empty_like(weight) for weight in weights]

    def products() -> None:
        for weight, basis, coordinate, update in zip(weights, bases, coordinates, updates, strict=True):
            m, n = weight.shape
            gradient = weight.grad
            assert gradient is not None
            if m >= n:
                torch.mm(gradient, basis, out=coordinate)  # R = G Q, m x r
                torch.mm(coordinate, basis.T, out=update)  # R Q^T
            else:
                torch.mm(basis.T, gradient, out=coordinate)  # R = P^T G, r x n
                torch.mm(basis, coordinate, out=update)  # P R

    def read_and_write_weights() -> None:
        for weight in weights:
            weight.mul_(0.9999)

    inner = torch.optim.AdamW(coordinates, lr=1e-3, fused=True).step
    return {"products": products, "inner": inner, "weights": read_and_write_weights}


CONTENDERS = {
    "galore-torch 2": galore_2,
    "galore-torch 1.0": galore_1,
    "apollo-torch 1.0.3": apollo,
    "AdamW, fused": adamw,
    "floor": floor,
}


def weights_with_gradients(shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """Return weights of the given shapes with random gradients, the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    weights: list[Tensor] = []
    for shape in shapes:
        weight = torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02).to(dtype))
        weight.grad = torch.randn(shape, generator=generator).to(dtype)
        weights.append(weight)
    return weights


def tensors_alive() -> list[Tensor]:
    """Return every tensor that Python holds anywhere in this process."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def held_bytes(known: list[Tensor]) -> dict[str, float]:
    """Return the bytes of all storages alive in this process but those of the `known` tensors.

    Storages are counted, not tensors: a view that keeps a larger tensor alive weighs what it keeps. Step counters and
    other single numbers (8 bytes and less) are told apart as "counters".
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_alive()}
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    counters = sum(nbytes for nbytes in storages.values() if nbytes <= 8)
    return {"state": sum(storages.values()) - counters, "counters": counters}


def timed(parts: Parts) -> dict[str, float]:
    """Run each part once and return its seconds."""
    seconds = {}
    for name, part in parts.items():
        start = time.perf_counter()
        part()
        seconds[name] = time.perf_counter() - start
    return seconds


def answers(argument: str) -> Answers:
    """Build the contender that a request in JSON asks for."""
    request = Request(**json.loads(argument))
    torch.set_num_threads(request.threads)
    weights = weights_with_gradients(request.llama.weights, getattr(torch, request.dtype))
    known = [*tensors_alive(), *(weight.grad for weight in weights if weight.grad is not None)]
    torch.set_grad_enabled(False)  # for good: there is nothing but optimizers here
    parts = CONTENDERS[request.contender](weights, request)
    return {"step": lambda: timed(parts), "memory": lambda: held_bytes(known)}


if __name__ == "__main__":
    serve(answers)
