"""What the gradients of one weight come to, looked at now and then while it trains.

Of a gradient only the Gram matrix of its shorter side is formed, and of that only the directions are kept, as long as
bases of that age are judged: k^2 numbers in float32 a basis, where the weight has m n >= k^2. A look costs an
eigendecomposition in float64, about 9 k^3 operations, and 2 k^3 for each basis that is judged: the directions D of a
basis and those of the gradient, with energies e, give cos^2 between all of them, C = (D_old^T D)^2. Then C e is the
gradient's energy along each old direction (so its running sum is what the old basis captures, at every rank), and the
mean of C over both bases' first r is their overlap.

The bases are those of the shorter side, as ``std`` has them. Of stacked matrices (experts) a share is of the energy of
all together, and a rank is a rank of each.

Shape suffixes: k the shorter side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from galore_torch.projection.spectra import Spectrum, gram, rank_that_holds

SHARES = (0.5, 0.9, 0.99)
"""Shares of the energy whose ranks are told."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """One gradient.

    Attributes:
        step: of the optimizer that it was for, from 1.
        stable_rank: ||G||_F^2 / ||G||_2^2.
        ranks: that hold each of `SHARES` of its energy.
        own: share of its energy in its own strongest directions, as many as the rank is.
        captured: the same in those of the gradient at the look before; None where there was none.
        overlap: of these two bases, corrected for chance; None where there was none.
    """

    step: int
    stable_rank: float
    ranks: tuple[int, ...]
    own: float
    captured: float | None
    overlap: float | None


@dataclass
class Aged:
    """What bases of one age held of later gradients.

    Attributes:
        pairs: how many gradients were judged.
        captured: sum over them of the share in the first 1 to k directions, (k,), float64.
        at_first: the same of the bases of the least age, on the same gradients: what they held when they were young
            is no measure, for gradients change too.
        overlap: sum over them of the overlap of the old basis with the gradient's own.
    """

    captured: Tensor
    at_first: Tensor
    pairs: int = 0
    overlap: float = 0.0


@dataclass
class Watch:
    """The gradients of one weight.

    Args:
        name: the weight's.
        shape: its shape; all but the last two axes are a stack.
        rank: at which figures are told; no more than the shorter side has.
        ages: of bases that are judged, in looks, from 1 to this.
        looks: what was seen.
        held: sum over the looks of the share of the energy in the gradient's own first 1 to k directions, (k,).
        by_age: what bases of each age held, the youngest first.
        left_out: steps whose gradient was missing, zero or not finite.
    """

    name: str
    shape: Sequence[int]
    rank: int
    ages: int
    looks: list[Look] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rank = min(self.rank, self.side)
        self.held = torch.zeros(self.side, dtype=torch.float64)
        self.by_age = [Aged(torch.zeros_like(self.held), torch.zeros_like(self.held)) for _ in range(self.ages)]
        self._bases: deque[tuple[Tensor, Tensor] | None] = deque(maxlen=self.ages)

    @property
    def side(self) -> int:
        """Length of the shorter side, k."""
        return min(self.shape[-2:])

    def look(self, step: int, grad: Tensor | None) -> None:
        """Take a gradient into account. It is not changed and not kept.

        Args:
            step: of the optimizer, from 1.
            grad: of the weight's shape; what is missing, zero or not finite is left out and counted.
        """
        if grad is None or not bool(torch.isfinite(grad).all()) or not bool(grad.any()):
            self.left_out.append(step)
            self._bases.appendleft(None)
            return
        if grad.device.type == "mps":  # which has no float64
            grad = grad.cpu()
        spectrum = Spectrum.of(gram(grad).reshape(-1, self.side, self.side))
        whole = spectrum.energies.sum()
        alive = spectrum.energies.sum(-1) > 0  # an expert that met no token has no directions
        directions = spectrum.directions.float()
        held = (spectrum.energies.sum(0).cumsum(-1) / whole).cpu()
        self.held += held
        captured, overlap = self._judge((directions, alive), spectrum.energies / whole)
        self._bases.appendleft((directions, alive))
        self.looks.append(
            Look(
                step=step,
                stable_rank=float(spectrum.stable_rank[alive].mean()),
                ranks=tuple(rank_that_holds(held, share) for share in SHARES),
                own=float(held[self.rank - 1]),
                captured=captured,
                overlap=overlap,
            )
        )

    def _judge(self, new: tuple[Tensor, Tensor], shares: Tensor) -> tuple[float | None, float | None]:
        """Count what the bases of all ages hold of a gradient, if there is one of the least age.

        Args:
            new: the gradient's own directions, and which of its matrices have any.
            shares: of its energy, along each of them.

        Returns:
            What the youngest basis captures at the rank, and its overlap with the gradient's own.
        """
        first = None
        for old, aged in zip(self._bases, self.by_age, strict=False):
            if old is None and first is None:
                break
            if old is None:
                continue
            cos2 = (old[0].mT @ new[0]).double().square()
            captured = (cos2 @ shares[..., None]).squeeze(-1).sum(0).cumsum(-1).cpu()
            captured = captured / captured[-1]  # which is 1 but for rounding
            overlap = self._overlap(cos2[old[1] & new[1]])
            first = first or (captured, overlap)
            aged.pairs += 1
            aged.captured += captured
            aged.at_first += first[0]
            aged.overlap += overlap
        return (None, None) if first is None else (float(first[0][self.rank - 1]), first[1])

    def _overlap(self, cos2: Tensor) -> float:
        """As `galore_torch.projection.overlap` has it."""
        if self.rank == self.side or not len(cos2):
            return 1.0
        shared = float(cos2[:, : self.rank, : self.rank].sum((-2, -1)).mean()) / self.rank
        chance = self.rank / self.side
        return (shared - chance) / (1 - chance)
