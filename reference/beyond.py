"""What lies outside the subspace, what becomes of the moments, and updates of fixed size: the equations in plain lines.

Read `galore.py` first. Here every residual S is formed, one matrix at a time, in the precision of the weight. G is
m x n and projected on its shorter side: from the left by P if m < n, else from the right, the same of its transpose.
Papers: Fira 2410.01623, APOLLO 2412.05270, Alice 2502.07752, FRUGAL 2411.07837, LDAdam 2410.16103, SCALE 2506.16659,
Muon as in 2502.16982, SUMO 2505.24749.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, linalg

GROWTH = 1.01


@dataclass
class Beyond:
    """GaLore with a residual; it changes the weight `W` in place.

    The optimizer inside is Adam, or with `beta2` of None SGD with Nesterov's momentum `beta1`.
    """

    W: Tensor
    rank: int
    lr: float
    gap: int
    scale: float = 1.0
    residual: str | None = None
    residual_scale: float = 1.0
    moments: str = "keep"
    tracks: bool = False
    normalize: str | None = None
    beta1: float = 0.9
    beta2: float | None = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    t: int = field(default=0, init=False)  # steps taken
    age: int = field(default=0, init=False)  # steps that the moments have seen
    norm: float = field(default=0.0, init=False)  # of the last residual

    def step(self, G: Tensor) -> None:
        """Take one step with the gradient `G` of the loss at W."""
        is_wide = self.W.shape[0] < self.W.shape[1]
        U = self.update(G) if is_wide else self.update(G.T).T
        if self.normalize in ("orthogonal", "blocks") and self.residual is None:
            U = max(U.shape) ** 0.5 * U
        elif self.normalize == "orthogonal":
            U = max(U.shape) ** 0.5 * orthogonal(U)
        elif self.normalize == "blocks":
            U = torch.cat([max(block.shape) ** 0.5 * orthogonal(block) for block in torch.split(U, 2 * self.rank)])
        if self.normalize == "columns":  # of all outputs, for one input
            U = U * U.shape[0] ** 0.5 / linalg.vector_norm(U, dim=0)
        self.W *= 1 - self.lr * self.weight_decay
        self.W -= self.lr * self.scale * U

    def update(self, G: Tensor) -> Tensor:
        """The update for a gradient that is projected from the left, before its size is fixed."""
        if self.t % self.gap == 0:
            self.renew(tracked(G, self.P) if self.tracks and self.t else linalg.svd(G).U[:, : self.rank])
        self.t, self.age = self.t + 1, self.age + 1
        R = self.P.T @ G
        if self.t == 1:
            self.M, self.V, self.p = 0 * R, 0 * R, 0 * G[0]
        psi = self.direction(R)
        if self.residual is None and self.normalize in (
            "orthogonal",
            "blocks",
        ):  # R is all that is needed
            return self.P @ orthogonal(psi)
        inside, S = self.P @ psi, self.outside(G, R, psi)
        return self.residual_scale * S + (0 if self.residual == "apollo" else inside)

    def direction(self, R: Tensor) -> Tensor:
        """What the optimizer inside makes of the projected gradient, at a learning rate of 1."""
        if self.beta2 is None:
            self.M = self.beta1 * self.M + R
            return R + self.beta1 * self.M
        self.M = self.beta1 * self.M + (1 - self.beta1) * R
        self.V = self.beta2 * self.V + (1 - self.beta2) * R**2
        return (self.M / (1 - self.beta1**self.age)) / ((self.V / (1 - self.beta2**self.age)).sqrt() + self.eps)

    def outside(self, G: Tensor, R: Tensor, psi: Tensor) -> Tensor:
        """S, which comes to the update in the subspace or, for APOLLO, takes its place."""
        rest = G - self.P @ R
        match self.residual:
            case None:
                return 0 * G
            case "full":
                return rest
            case "sign":
                return rest.sign()
            case "fira":
                S = linalg.vector_norm(psi, dim=0) / linalg.vector_norm(R, dim=0) * rest
            case "apollo":
                columns = None if self.rank == 1 else 0
                S = linalg.vector_norm(psi, dim=columns) / linalg.vector_norm(R, dim=columns) * G
            case "alice":
                self.p = 0.9 * self.p + 0.1 * (rest**2).sum(0)
                S = (len(G) - self.rank) ** 0.5 * rest / self.p.sqrt()
        norm = float(S.norm())
        limited = min(norm, GROWTH * self.norm) if self.norm else norm
        self.norm = limited
        limited_update: Tensor = S * (limited / norm)
        return limited_update

    def renew(self, P: Tensor) -> None:
        """Put a new basis in the old one's place, and carry the moments over."""
        old, self.P = getattr(self, "P", P), P
        if self.t == 0 or self.moments == "keep":
            return
        if self.moments == "reset":
            self.M, self.V, self.age = 0 * self.M, 0 * self.V, 0
            return
        C = P.T @ old
        if self.beta2 is not None:
            of_mean, of_square = 1 - self.beta1**self.age, 1 - self.beta2**self.age
            mean, square = self.M / of_mean, self.V / of_square
            self.V = of_square * ((C**2) @ (square - mean**2) + (C @ mean) ** 2).abs()
        self.M = C @ self.M


def tracked(G: Tensor, P: Tensor) -> Tensor:
    """The basis after a step of subspace iteration: P turned to the singular directions that it has, times G G^T."""
    Y = G @ (G.T @ P)
    axes = linalg.eigh(P.T @ Y).eigenvectors.flip(1)  # the strongest first
    new: Tensor = linalg.qr(Y @ axes).Q
    return new * (new * P).sum(0).sign()  # along the old columns


def orthogonal(U: Tensor) -> Tensor:
    """Singular values of about 1 in the place of U's: five steps of Muon's Newton-Schulz iteration."""
    if len(U) > U.shape[1]:
        turned: Tensor = orthogonal(U.T).T
        return turned
    X: Tensor = U / linalg.norm(U).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
    return X
