"""What no implementation of a step can do without, by arithmetic and bare.

Shape suffixes as everywhere: m x n is a weight, r the rank. Operations are multiplications and additions, two for each
pair of entries that meet in a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.common.measuring import Call, seconds_by_part, seconds_of
from benchmarks.common.methods import OPTIMIZERS
from benchmarks.common.sizes import Llama

if TYPE_CHECKING:
    from benchmarks.common.cases import Training

SLICE_ELEMENTS = 2**22
"""What bitsandbytes gets at a time: on a CPU it copies all that it is given into float32."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The operations of a step's matrix products, and the bytes that its optimizer must read and write."""

    operations: float
    nbytes: float


def demand(training: Training) -> Demand:
    """Return what a whole training step demands.

    Forward and gradients of the inputs take 4 N m n for N tokens; the gradients of the weights 2 N m n, or when they
    are fused 2 N r (m + n). Projecting and projecting back take 2 r m n each. Attention is causal: half of the
    products of queries with keys, and of the weights with values, forward once and backward twice.
    """
    size, method, tokens, item = training.size, training.method, training.tokens, training.torch_dtype.itemsize
    rank, projects, fused = size.rank, method.projects, method.gradients == "fused"
    moment = 1 if method.state_bits == 8 else item
    operations = 6.0 * tokens * size.hidden * (size.vocabulary + size.sequence * size.layers)
    nbytes = float(size.other_elements * (3 * item + 4 * moment))  # read weight, gradient, moments; write all but one
    for m, n in size.weights:
        projected = rank * max(m, n)
        operations += 4.0 * tokens * m * n + 2.0 * tokens * (rank * (m + n) if fused else m * n)
        if projects:
            operations += 2.0 * rank * m * n * (1 if fused else 2)
            nbytes += 2 * m * n * item + projected * (item + 4 * moment) + 2 * rank * min(m, n) * item
        else:
            nbytes += m * n * (3 * item + 4 * moment)
    return Demand(operations=operations, nbytes=nbytes)


@dataclass(kw_only=True)
class Speeds:
    """How fast a machine multiplies matrices and moves bytes: those of an MLP matrix, forward and backward."""

    training: Training  # whose model; a batch goes through its matrix
    operations_per_s: list[float] = field(default_factory=list)  # one measurement a round
    bytes_per_s: list[float] = field(default_factory=list)  # one measurement a round

    def measure(self) -> None:
        """Measure once more. The first time everything runs twice, and the second run counts."""
        training, size = self.training, self.training.size
        tokens, dtype, device = training.batch * size.sequence, training.torch_dtype, training.device
        shapes = (tokens, size.hidden), (tokens, size.intermediate), (size.intermediate, size.hidden)
        x, grad_y, weight = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
        traffic = torch.zeros(2**26 // dtype.itemsize, dtype=dtype, device=device)
        for _ in range(1 if self.operations_per_s else 2):
            multiplied_s = seconds_of(lambda: (x @ weight.T, grad_y @ weight, grad_y.T @ x), device)
            moved_s = seconds_of(lambda: traffic.mul_(1.0), device)
        self.operations_per_s.append(6 * tokens * weight.numel() / multiplied_s)
        self.bytes_per_s.append(2 * 2**26 / moved_s)

    def floor_s(self, demanded: Demand) -> float:
        """Return the least seconds that a step can take."""
        return demanded.operations / median(self.operations_per_s) + demanded.nbytes / median(self.bytes_per_s)


def weights_with_gradients(
    shapes: Iterable[tuple[int, int]], dtype: torch.dtype, device: str = "cpu", *, in_int8: bool = False
) -> list[Tensor]:
    """Return weights of these shapes, if asked for in INT8, with random gradients: the same at every call."""
    generator = torch.Generator(device).manual_seed(0)
    weights: list[Tensor] = []
    for number, shape in enumerate(shapes):
        drawn = (torch.randn(shape, generator=generator, device=device).mul_(scale) for scale in (0.02, 1e-3))
        weight, grad = (one.to(dtype) for one in drawn)
        if in_int8:
            from galore_torch.lowbit import QuantizedWeight

            weight = QuantizedWeight.of(weight, seed=number)
        weights.append(torch.nn.Parameter(weight))
        weights[-1].grad = grad
    return weights


def products(weights: list[Tensor], rank: int, tokens: int = 0) -> tuple[list[Tensor], dict[str, Call]]:
    """Return random coordinates of weights with gradients, and GaLore's products, bare and into memory that is there.

    Weights with m < n are projected on the left, by P, others on the right, by Q, as `proj_type="std"` does;
    `tokens` are those of the inputs and output gradients that fused projections are made of.
    """
    coordinates: list[Tensor] = []
    parts: dict[str, list[Call]] = {"project": [], "project_fused": [], "project_back": [], "fold": []}
    for weight in weights:
        m, n = weight.shape
        tall, grad = m >= n, weight.grad
        assert grad is not None
        shapes = (min(m, n), rank), (m, rank) if tall else (rank, n), (tokens, m), (tokens, n)
        basis, coordinate, grad_y, x = (torch.randn(shape, dtype=weight.dtype) for shape in shapes)
        factors = (coordinate, basis.mT) if tall else (basis, coordinate)  # R Q^T, or P R
        gradient = (grad, basis) if tall else (basis.mT, grad)  # G Q, or P^T G
        coordinates.append(coordinate)
        parts["project"].append(partial(torch.mm, *gradient, out=coordinate))
        parts["project_fused"].append(partial(_fused, tall, basis, grad_y, x, coordinate))
        parts["project_back"].append(partial(torch.mm, *factors, out=torch.empty_like(weight)))
        parts["fold"].append(partial(weight.detach().addmm_, *factors, alpha=1e-4))
    return coordinates, {name: partial(_all, calls) for name, calls in parts.items()}


def _fused(tall: bool, basis: Tensor, grad_y: Tensor, x: Tensor, into: Tensor) -> None:
    """Form a projected gradient of inputs and output gradients: dY^T (X Q), or (dY P)^T X."""
    torch.mm(*((grad_y.mT, x @ basis) if tall else ((grad_y @ basis).mT, x)), out=into)


def _all(calls: list[Call]) -> None:
    for call in calls:
        call()


def layered_floor_s(
    case: Training, ids: Tensor, rounds: int, advance: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return the seconds of a step's floor by part, medians of so many rounds after one that nobody counts.

    One layer's are timed, and counted as often as there are layers. Some `ids`, (1, tokens), go through; `advance` is
    called after each round.
    """
    size, layers = case.size, case.size.layers
    coordinates, bare = products(weights_with_gradients(size.weights[:7], torch.bfloat16), size.rank, case.tokens)
    parts: dict[str, Call] = {
        **_pass("no layer", replace(size, layers=0), ids),
        **_pass("one layer", replace(size, layers=1), ids),
        "project": bare["project_fused" if case.method.gradients == "fused" else "project"],
        "fold": bare["fold"],
        "inner": _adamw_step(size, [coordinate.numel() for coordinate in coordinates]),
        "embeddings": _adamw_step(size, [size.vocabulary * size.hidden]),
    }
    taken = []
    for _ in range(1 + rounds):
        taken.append(seconds_by_part(parts))
        advance()
    one = {name: median(seconds[name] for seconds in taken[1:]) for name in taken[0]}
    passes = {
        way: one[f"no layer, {way}"] + layers * max(0.0, one[f"one layer, {way}"] - one[f"no layer, {way}"])
        for way in ("forward_s", "backward_s")
    }
    inner_s = layers * one["inner_s"] + 2 * one["embeddings_s"]
    return {**passes, "inner_s": inner_s, "fold_s": layers * one["fold_s"], "other_s": layers * one["project_s"]}


def _pass(name: str, size: Llama, ids: Tensor) -> dict[str, Call]:
    """A forward, and a backward that drops every gradient."""
    model = size.model(torch.bfloat16)
    losses: list[Tensor] = []

    def drop(weight: Tensor) -> None:
        weight.grad = None

    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]
    return {
        f"{name}, forward": lambda: losses.append(model(input_ids=ids, labels=ids).loss),
        f"{name}, backward": lambda: losses.pop().backward(),  # type: ignore[no-untyped-call]
    }


def _adamw_step(size: Llama, elements: list[int]) -> Call:
    """A step of bitsandbytes' AdamW on tensors of these many elements, in slices."""
    wholes = [torch.zeros(number, dtype=torch.bfloat16) for number in elements]
    parameters = [nn.Parameter(part) for whole in wholes for part in torch.split(whole, SLICE_ELEMENTS)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    step: Call = OPTIMIZERS["adam8bit"].build([], parameters, size).step
    return step
