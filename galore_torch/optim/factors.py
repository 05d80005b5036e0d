"""`Factors`: the basis of a weight as its state holds it, and the two products with it that an ordinary step makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_torch.lowbit import Storage
from galore_torch.optim.state_keys import BASIS
from galore_torch.projection import Basis, Projection


class Factors:
    """What a weight is projected with."""

    __slots__ = ("_factors", "_pair", "_read")

    if TYPE_CHECKING:
        weight: Tensor
        state: dict[str, Any]
        projection: Projection
        storage: Storage
        side: str | None
        _read: tuple[Any, Basis]
        _factors: Basis | None
        _pair: Sequence[Any] | None

    @property
    def basis(self) -> Basis:
        """The factors by mode, of the weight's dtype; none without a projection, zeros before the first renewal.

        The same object as long as the basis is the same. In few bits it is decoded each time it is asked for a factor.
        """
        stored = self.state.get(BASIS)
        if stored is not self._read[0]:
            self._read = stored, {} if stored is None else self.read_basis(stored)
        return self._read[1]

    def read_basis(self, stored: Mapping[str, Any]) -> Basis:
        """The factors by mode, from what the state holds of them.

        Args:
            stored: as the storage made it.
        """
        return self.storage.read(stored, self.projection.factor_shapes, self.weight.dtype)

    @property
    def factors(self) -> Basis:
        """The basis as plain tensors: decoded ones are kept from a gradient's projection until its update is folded."""
        basis = self.basis
        if isinstance(basis, dict):
            return basis
        if self._factors is None:
            self._factors = dict(basis.items())
        return self._factors

    def drop_factors(self) -> None:
        """Forgets decoded factors: they take more memory than what is stored."""
        self._factors = self._pair = None

    def _factor_pair(self, side: str) -> Sequence[Any]:
        """What is stored of a matrix' one factor, that, and its transpose: a view takes the host half a product."""
        stored, pair = self.state[BASIS][side], self._pair
        if pair is None or pair[0] is not stored:
            factor = self.factors[side]
            pair = self._pair = stored, factor, factor.mT
        return pair

    def project_plain(self, grad: Tensor) -> Tensor:
        """The projection of a full gradient, for plain weights.

        Args:
            grad: of `projection.shape`.
        """
        side = self.side
        if side is None:
            return self.projection.project(grad, self.factors)
        _, factor, turned = self._factor_pair(side)
        return torch.mm(turned, grad) if side == "left" else torch.mm(grad, factor)

    def fold(self, coordinates: Tensor, alpha: float, beta: float) -> None:
        """In place: weight <- beta * weight + alpha * project_back(coordinates), for plain weights.

        Args:
            coordinates: of `projection.projected_shape`.
            alpha: factor of what is added.
            beta: factor of the weight.
        """
        side, weight = self.side, self.weight
        if side is None or coordinates.dtype is not weight.dtype:
            self.projection.fold(weight, coordinates, self.factors, alpha=alpha, beta=beta)
            return
        _, factor, turned = self._factor_pair(side)
        if side == "left":
            weight.addmm_(factor, coordinates, beta=beta, alpha=alpha)
        else:
            weight.addmm_(coordinates, turned, beta=beta, alpha=alpha)
