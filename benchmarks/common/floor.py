"""What no implementation of a step can do without, by arithmetic and bare.

Shape suffixes as everywhere: m x n is a weight, r the rank. Operations are multiplications and additions, two for each
pair of entries that meet in a product.
"""

from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from benchmarks.common.methods import Method
from benchmarks.common.sizes import Llama
from benchmarks.common.timing import now_s


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The operations of a step's matrix products, and the bytes that its optimizer must read and write."""

    operations: float
    nbytes: float


def demand(size: Llama, method: Method, tokens: int, dtype: torch.dtype) -> Demand:
    """Return what a whole training step demands.

    Forward and gradients of the inputs take 4 N m n for N tokens; the gradients of the weights 2 N m n, or when they
    are fused 2 N r (m + n). Projecting and projecting back take 2 r m n each. Attention is causal: half of the
    products of queries with keys, and of the weights with values, forward once and backward twice.
    """
    rank, projects, fused = size.rank, method.gradients != "full rank", method.gradients == "fused"
    item, moment = dtype.itemsize, 1 if method.state_bits == 8 else dtype.itemsize
    operations = 6.0 * tokens * size.hidden * (size.vocabulary + size.sequence * size.layers)
    nbytes = float(size.other_elements * (3 * item + 4 * moment))  # read weight, gradient, moments; write all but one
    for m, n in size.weights:
        image = rank * max(m, n)
        operations += 4.0 * tokens * m * n + 2.0 * tokens * (rank * (m + n) if fused else m * n)
        if projects:
            operations += 2.0 * rank * m * n * (1 if fused else 2)
            nbytes += 2 * m * n * item + image * (item + 4 * moment) + 2 * rank * min(m, n) * item
        else:
            nbytes += m * n * (3 * item + 4 * moment)
    return Demand(operations=operations, nbytes=nbytes)


@dataclass(kw_only=True)
class Speeds:
    """How fast a machine multiplies matrices and moves bytes: those of an MLP matrix, forward and backward."""

    size: Llama  # whose matrix
    tokens: int  # how many go through it
    dtype: torch.dtype  # of all
    device: str  # where
    operations_per_s: list[float] = field(default_factory=list)  # one measurement a round
    bytes_per_s: list[float] = field(default_factory=list)  # one measurement a round

    def measure(self) -> None:
        """Measure once more. The first time everything runs twice, and the second run counts."""

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=self.dtype, device=self.device)

        hidden, intermediate = self.size.hidden, self.size.intermediate
        x, grad_y, weight = draw(self.tokens, hidden), draw(self.tokens, intermediate), draw(intermediate, hidden)
        traffic = torch.zeros(2**26 // self.dtype.itemsize, dtype=self.dtype, device=self.device)
        for _ in range(1 if self.operations_per_s else 2):
            start_s = now_s(self.device)
            x @ weight.T, grad_y @ weight, grad_y.T @ x
            multiplied_s = now_s(self.device)
            traffic.mul_(1.0)
            moved_s = now_s(self.device)
        self.operations_per_s.append(6 * self.tokens * weight.numel() / (multiplied_s - start_s))
        self.bytes_per_s.append(2 * 2**26 / (moved_s - multiplied_s))

    def floor_s(self, demanded: Demand) -> float:
        """Return the least seconds that a step can take."""
        return demanded.operations / median(self.operations_per_s) + demanded.nbytes / median(self.bytes_per_s)


class Bare:
    """The products of GaLore on some weights with gradients, bare and into memory that is there already.

    Args:
        weights: Projected on their shorter side, as `proj_type="std"` does.
        rank: Of the projection.
        tokens: Of the inputs and output gradients that fused projections are made of.
    """

    def __init__(self, weights: list[Tensor], rank: int, tokens: int = 0) -> None:
        self._all: list[tuple[Tensor, ...]] = []
        self.coordinates: list[Tensor] = []
        for weight in weights:
            m, n = weight.shape
            shapes = (min(m, n), rank), (m, rank) if m >= n else (rank, n), (tokens, m), (tokens, n)
            basis, image, grad_y, x = (torch.randn(shape, dtype=weight.dtype) for shape in shapes)
            assert weight.grad is not None
            self._all.append((weight.detach(), weight.grad, basis, image, grad_y, x))
            self.coordinates.append(image)

    def project(self) -> None:
        """Project full gradients: G Q, or P^T G."""
        for weight, grad, basis, image, *_ in self._all:
            torch.mm(*((grad, basis) if _is_tall(weight) else (basis.mT, grad)), out=image)

    def project_fused(self) -> None:
        """Form projected gradients of inputs and output gradients: dY^T (X Q), or (dY P)^T X."""
        for weight, _, basis, image, grad_y, x in self._all:
            torch.mm(*((grad_y.mT, x @ basis) if _is_tall(weight) else ((grad_y @ basis).mT, x)), out=image)

    def project_back(self, updates: list[Tensor]) -> None:
        """Project coordinates back into tensors of the weights' shapes: R Q^T, or P R."""
        for (weight, _, basis, image, *_), update in zip(self._all, updates, strict=True):
            torch.mm(*((image, basis.mT) if _is_tall(weight) else (basis, image)), out=update)

    def fold(self) -> None:
        """Project coordinates back and add them to the weights."""
        for weight, _, basis, image, *_ in self._all:
            weight.addmm_(*((image, basis.mT) if _is_tall(weight) else (basis, image)), alpha=1e-4)


def _is_tall(weight: Tensor) -> bool:
    return weight.shape[0] >= weight.shape[1]
