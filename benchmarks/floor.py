"""The physical floor of a training step: its matrix products and its optimizer's traffic, at this machine's speeds.

Shape suffixes as everywhere: m x n is a weight, r the rank. Operations are multiplications and additions, two for each
pair of entries that meet in a product.
"""

import time
from dataclasses import dataclass, field
from statistics import median

import torch

from benchmarks.methods import METHODS
from benchmarks.training import Training


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What no implementation of a method can do without.

    Attributes:
        operations: Of the matrix products in a step.
        nbytes: What the optimizer must read and write in a step.
    """

    operations: float
    nbytes: float


def demand(training: Training) -> Demand:
    """Return what a step demands.

    Forward and gradients of the inputs take 4 N m n for N tokens; the gradients of the weights 2 N m n, or when they
    are fused 2 N r (m + n). Projecting and projecting back take 2 r m n each. Attention is causal: half of the
    products of queries with keys, and of the weights with values, forward once and backward twice.
    """
    method, tokens, rank = METHODS[training.method], training.tokens, training.rank
    projects = method.gradients != "full rank"
    head = training.vocabulary * training.hidden
    operations = 6.0 * tokens * head + 6.0 * tokens * training.sequence * training.hidden * training.layers
    item = getattr(torch, training.dtype).itemsize
    moment = 1 if method.eight_bit else item
    others = 2 * head + (2 * training.layers + 1) * training.hidden  # embedding, head and norms
    nbytes = float(others * (3 * item + 4 * moment))  # read weight, gradient, moments; write weight, moments
    for m, n in training.shapes.weights:
        operations += 4.0 * tokens * m * n
        image = rank * max(m, n)
        if method.gradients == "fused":
            operations += 2.0 * tokens * rank * (m + n)
        else:
            operations += 2.0 * tokens * m * n + (2.0 * rank * m * n if projects else 0)
        if projects:
            operations += 2.0 * rank * m * n
            nbytes += 2 * m * n * item + image * (item + 4 * moment) + 2 * rank * min(m, n) * item
        else:
            nbytes += m * n * (3 * item + 4 * moment)
    return Demand(operations=operations, nbytes=nbytes)


@dataclass(kw_only=True)
class Speeds:
    """How fast this machine multiplies matrices and moves bytes, measured between the steps of the methods.

    Attributes:
        training: Whose tokens, shapes, dtype and device the products have: an MLP matrix, forward and backward.
        operations_per_s: One measurement a round.
        bytes_per_s: One measurement a round.
    """

    training: Training
    operations_per_s: list[float] = field(default_factory=list)
    bytes_per_s: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """Measure once more. The first time everything runs twice, and the second run counts."""
        training = self.training
        dtype: torch.dtype = getattr(torch, training.dtype)
        made = {"dtype": dtype, "device": training.device}
        rows = training.batch * training.sequence
        x = torch.randn(rows, training.hidden, **made)  # type: ignore[call-overload]
        grad_y = torch.randn(rows, training.intermediate, **made)  # type: ignore[call-overload]
        weight = torch.randn(training.intermediate, training.hidden, **made)  # type: ignore[call-overload]
        traffic = torch.zeros(2**26 // dtype.itemsize, **made)  # type: ignore[call-overload]
        for _ in range(2 if not self.operations_per_s else 1):
            start_s = self._now_s()
            x @ weight.T, grad_y @ weight, grad_y.T @ x
            multiplied_s = self._now_s()
            traffic.mul_(1.0)
            moved_s = self._now_s()
        self.operations_per_s.append(6 * rows * weight.numel() / (multiplied_s - start_s))
        self.bytes_per_s.append(2 * 2**26 / (moved_s - multiplied_s))

    def floor_s(self, demanded: Demand) -> float:
        """Return the least seconds that a step can take."""
        return demanded.operations / median(self.operations_per_s) + demanded.nbytes / median(self.bytes_per_s)

    def _now_s(self) -> float:
        if self.training.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
