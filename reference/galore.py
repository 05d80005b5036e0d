"""GaLore with Adam as the paper writes it (arXiv 2403.03507, Algorithms 1 and 2), in plain lines and exact SVDs.

Read this file to learn the method. It is slow on purpose: one weight at a time and nothing fused, in the precision
of the weight it is given (float64 too), so that the package can be held to it.

Shapes: W and its gradient G are m x n and r is the rank. P (m x r) spans the leading left singular vectors of G and
Q (n x r) the leading right ones. R = project(G) is r x n with P alone, m x r with Q alone, r x r with both.
"""

from dataclasses import dataclass, field

from torch import Tensor, linalg


def sides(m: int, n: int, proj_type: str) -> tuple[bool, bool]:
    """Say whether `proj_type` projects an m x n gradient from the left (by P) and from the right (by Q)."""
    tall = m >= n
    return {
        "std": (not tall, tall),  # the basis of the shorter side: it is the smaller one
        "reverse_std": (tall, not tall),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }[proj_type]


def find_basis(G: Tensor, rank: int, proj_type: str) -> tuple[Tensor | None, Tensor | None]:
    """Return (P, Q), the leading singular vectors of G on each side that is projected and None on the other."""
    U, _, Vh = linalg.svd(G, full_matrices=False)  # equation 12: G = U S V^T
    left, right = sides(G.shape[0], G.shape[1], proj_type)
    return (U[:, :rank] if left else None), (Vh[:rank].T if right else None)


def project(G: Tensor, P: Tensor | None, Q: Tensor | None) -> Tensor:
    """R = P^T G Q, where a side without a basis is left as it is (equation 13)."""
    R = G if P is None else P.T @ G
    return R if Q is None else R @ Q


def project_back(R: Tensor, P: Tensor | None, Q: Tensor | None) -> Tensor:
    """P R Q^T: the m x n matrix whose coordinates are R."""
    G = R if P is None else P @ R
    return G if Q is None else G @ Q.T


@dataclass
class GaLoreAdam:
    """AdamW whose moments live in the subspace of the gradient; it changes the weight `W` (m x n) in place.

    The basis is renewed at steps 0, gap, 2 gap, ... and the moments are kept as they are when it is.

    Two things are as in torch.optim.AdamW and not as in galore-torch 1.0. The decay acts on W before the update, where
    1.0 lets it follow. And eps is added to the corrected second moment, sqrt(v / (1 - b2^t)) + eps, where 1.0 adds it
    to the raw one, sqrt(v) + eps: its eps weighs 1 / sqrt(1 - b2^t) times as much. Without decay, and with an eps that
    is negligible, the two are one algorithm.
    """

    W: Tensor
    rank: int
    lr: float
    gap: int = 200
    scale: float = 0.25
    proj_type: str = "std"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    t: int = field(default=0, init=False)  # steps taken

    def step(self, G: Tensor) -> None:
        """Take one step with the gradient `G` (m x n) of the loss at W."""
        if self.t % self.gap == 0:
            self.P, self.Q = find_basis(G, self.rank, self.proj_type)
        R = project(G, self.P, self.Q)
        if self.t == 0:
            self.M, self.V = 0 * R, 0 * R
        self.t += 1

        # Adam in the subspace (Algorithm 2); N is its normalized direction.
        b1, b2 = self.betas
        self.M = b1 * self.M + (1 - b1) * R
        self.V = b2 * self.V + (1 - b2) * R**2
        N = (self.M / (1 - b1**self.t)) / ((self.V / (1 - b2**self.t)).sqrt() + self.eps)

        # W <- W - lr scale P N Q^T, after the decay.
        self.W *= 1 - self.lr * self.weight_decay
        self.W -= self.lr * self.scale * project_back(N, self.P, self.Q)
