"""The gradients of one weight, measured now and then while it trains.

Of a gradient only the directions of its shorter side are kept, as long as bases of that age are judged: k^2 numbers in
float32 a basis, where the weight has m n >= k^2. A snapshot costs an eigendecomposition in float64, about 9 k^3
operations, and 2 k^3 for each basis that is judged: the directions D of a basis and those of the gradient, of energies
e, give cos^2 between all of them, C = (D_old^T D)^2. C e is the gradient's energy along each old direction, so that its
running sum is what the old basis captures, at every rank; the mean of C over both bases' first r is their overlap.

The bases are those of the shorter side, as ``std`` has them. Of stacked matrices (experts) a share is of the energy of
all together, and a rank is a rank of each. Shape suffixes: k the shorter side.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from galore_torch.projection.spectra import Spectrum, gram, rank_that_holds
from galore_torch.projection.subspace_overlap import corrected_for_chance

SHARES = (0.5, 0.9, 0.99)  # of the energy, whose ranks are reported


@dataclass(frozen=True, kw_only=True)
class GradientSnapshot:
    """One gradient of one weight."""

    step: int  # of the optimizer that it was for, from 1
    stable_rank: float  # ||G||_F^2 / ||G||_2^2
    ranks: tuple[int, ...]  # that hold each of `SHARES` of its energy
    own: float  # share of its energy in its own strongest directions, as many as the rank is
    captured: float | None  # the same in those of the gradient at the snapshot before; None where there was none
    overlap: float | None  # of these two bases, corrected for chance; None where there was none


class GradientHistory:
    """The snapshots of one weight's gradients, and what earlier gradients' bases held of them.

    Args:
        name: the weight's.
        shape: its shape; all but the last two axes are a stack.
        rank: of the bases that figures are about; no more than the shorter side has.
        ages: of bases that are judged, in snapshots, from 1 to this.

    Attributes:
        side: length of the shorter side, k.
        snapshots: of the gradients so far.
        skipped: steps whose gradient was missing, zero or not finite.
        held: sum over the snapshots of the share of the energy in the gradient's own first 1 to k directions, (k,).
        pairs: how many gradients the bases of each age were judged by, the youngest first, (ages,).
        captured: sums over these of the share in the old bases' first 1 to k directions, (ages, k), float64.
        by_youngest: the same of the bases of the least age on the same gradients, (ages, k): what the old ones held
            when they were young is no measure, for gradients change too.
        overlap: sums of the overlap of the old bases with the gradients' own, (ages,).
    """

    def __init__(self, name: str, shape: tuple[int, ...], rank: int, ages: int) -> None:
        self.name, self.shape, self.ages = name, shape, ages
        self.side = min(shape[-2:])
        self.rank = min(rank, self.side)
        self.snapshots: list[GradientSnapshot] = []
        self.skipped: list[int] = []
        self.held = torch.zeros(self.side, dtype=torch.float64)
        self.captured, self.by_youngest = torch.zeros(2, ages, self.side, dtype=torch.float64)
        self.pairs, self.overlap = torch.zeros(2, ages, dtype=torch.float64)
        self._bases: deque[tuple[Tensor, Tensor] | None] = deque(maxlen=ages)

    def add(self, step: int, grad: Tensor | None) -> None:
        """Take a snapshot of a gradient, which is not changed and not kept.

        Args:
            step: of the optimizer, from 1.
            grad: of the weight's shape; what is missing, zero or not finite is skipped.
        """
        if grad is None or not bool(torch.isfinite(grad).all()) or not bool(grad.any()):
            self.skipped.append(step)
            self._bases.appendleft(None)
            return
        grad = grad.cpu() if grad.device.type == "mps" else grad  # which has no float64
        spectrum = Spectrum.of(gram(grad).reshape(-1, self.side, self.side))
        whole = spectrum.energies.sum()
        alive = spectrum.energies.sum(-1) > 0  # an expert that met no token has no directions
        directions = spectrum.directions.float()
        held = (spectrum.energies.sum(0).cumsum(-1) / whole).cpu()
        self.held += held
        captured, overlap = self._judge_bases(directions, alive, spectrum.energies / whole)
        self._bases.appendleft((directions, alive))
        self.snapshots.append(
            GradientSnapshot(
                step=step,
                stable_rank=float(spectrum.stable_rank[alive].mean()),
                ranks=tuple(rank_that_holds(held, share) for share in SHARES),
                own=float(held[self.rank - 1]),
                captured=captured,
                overlap=overlap,
            )
        )

    def _judge_bases(self, directions: Tensor, alive: Tensor, shares: Tensor) -> tuple[float | None, float | None]:
        """Sum up what the bases of all ages hold of a gradient, if there is one of the least age.

        A gradient has directions, those of its matrices that are alive, and shares of its energy along each. Returned
        are what the youngest basis captures at the rank, and its overlap with the gradient's own.
        """
        if not self._bases or self._bases[0] is None:
            return None, None
        judged: list[tuple[Tensor, float]] = []
        for age, old in enumerate(self._bases):
            if old is not None:
                cos2 = (old[0].mT @ directions).double().square()
                captured = (cos2 @ shares[..., None]).squeeze(-1).sum(0).cumsum(-1).cpu()
                judged.append((captured / captured[-1], self._overlap(cos2[old[1] & alive])))  # the last is 1
                self.pairs[age] += 1
                self.captured[age] += judged[-1][0]
                self.by_youngest[age] += judged[0][0]
                self.overlap[age] += judged[-1][1]
        return float(judged[0][0][self.rank - 1]), judged[0][1]

    def _overlap(self, cos2: Tensor) -> float:
        if self.rank == self.side or not len(cos2):
            return 1.0
        shared = cos2[:, : self.rank, : self.rank].sum((-2, -1)).mean() / self.rank
        return float(corrected_for_chance(shared, self.rank, self.side))
