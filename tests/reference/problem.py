"""The trajectories that the implementations must share: a small matrix problem whose gradient answers to every step.

It knows no implementation, and it is imported in the tests' process and in the child process of galore-torch 1.0 alike.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = {"tall": (48, 32), "wide": (32, 48), "square": (40, 40)}
PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
RANK = 8
GAP = 20
STEPS = 60  # renewals at steps 0, 20 and 40
LR = 0.02
SCALE = 0.25


@dataclass(frozen=True)
class Problem:
    """Minimize tr((W - T)^T L (W - T) K) / 2, whose gradient L (W - T) K has well separated singular values.

    Attributes:
        start: The first W, m x n.
        target: T, m x n.
        left: L, m x m, symmetric positive definite.
        right: K, n x n, symmetric positive definite.
    """

    start: Tensor
    target: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def make(cls, shape: tuple[int, int], dtype: torch.dtype) -> "Problem":
        """Draw the problem of a shape: the same numbers in every process and, up to rounding, in every dtype."""
        generator = torch.Generator().manual_seed(0)
        start, target = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        left, right = (curvature(size, generator) for size in shape)
        # A small start, so that a trajectory is mostly what the steps made of it.
        return cls(*(matrix.to(dtype) for matrix in (0.1 * start, target, left, right)))

    def gradient(self, weight: Tensor) -> Tensor:
        """Return the gradient of the loss at `weight`."""
        return self.left @ (weight - self.target) @ self.right

    def walk(self, weight: Tensor, step: Callable[[Tensor], object]) -> Tensor:
        """Call `step(gradient)`, which changes `weight` in place, at each step; return all weights, STEPS x m x n."""
        weights = []
        for _ in range(STEPS):
            step(self.gradient(weight.detach()))
            weights.append(weight.detach().clone())
        return torch.stack(weights)


def curvature(size: int, generator: torch.Generator) -> Tensor:
    """Return a symmetric matrix with eigenvalues from 1 down to 1/30 and random eigenvectors."""
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return vectors * torch.logspace(0, -1.5, size, dtype=torch.float64) @ vectors.T


def distance(weights: Tensor, others: Tensor) -> float:
    """Return the relative L2 distance of two trajectories at the step at which they are furthest apart."""
    apart = torch.linalg.matrix_norm(weights.double() - others.double())
    return (apart / torch.linalg.matrix_norm(others.double())).max().item()
