"""`Update`: what a weight is moved by, in parts that are added to it one after the other.

An update is scales * full + project_back(coordinates). Both parts are optional, and nothing of the weight's size is
made to put them together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from galore_torch.projection import Basis, Projection


@dataclass(slots=True)
class Update:
    """The update of one weight.

    Attributes:
        projection: how the weight is projected.
        coordinates: the part in the subspace, of `projection.projected_shape`; None for none.
        factors: the basis, of the weight's dtype.
        full: the other part, of `projection.view_shape`; None for none.
        scales: its factor; a tensor has one number for each slice across the projected axes, or for each column.
    """

    projection: Projection
    coordinates: Tensor | None = None
    factors: Basis = field(default_factory=dict)
    full: Tensor | None = None
    scales: Tensor | float = 1.0

    def times(self, factor: Tensor) -> Update:
        """The update times a number that is in a tensor.

        Args:
            factor: of one element.
        """
        coordinates = None if self.coordinates is None else self.coordinates.mul_(factor)
        scales = self.scales if self.full is None else self.scales * factor
        return Update(self.projection, coordinates, self.factors, self.full, scales)

    def formed(self) -> Tensor:
        """The whole update, of the weight's shape, in the place of its full part if it has one."""
        full = self.full
        if full is None:
            coordinates = self.coordinates
            assert coordinates is not None
            if self.factors:
                coordinates = coordinates.to(next(iter(self.factors.values())).dtype)
            return self.projection.project_back(coordinates, self.factors)
        beta = self.scales
        if isinstance(beta, Tensor):
            full.mul_(beta.to(full.dtype))
            beta = 1.0
        elif self.coordinates is None and beta != 1.0:
            full.mul_(beta)
        if self.coordinates is not None:
            whole = full.view(self.projection.shape)
            self.projection.fold(whole, self.coordinates, self.factors, alpha=1.0, beta=beta)
        return full.view(self.projection.shape)

    def add_to(self, weight: Tensor, alpha: float, beta: float) -> None:
        """In place: weight <- beta * weight + alpha * update.

        Args:
            weight: of `projection.shape`.
            alpha: factor of the update.
            beta: factor of the weight.
        """
        if self.coordinates is not None:
            self.projection.fold(weight, self.coordinates, self.factors, alpha=alpha, beta=beta)
        elif beta != 1.0:
            weight.mul_(beta)
        if self.full is None:
            return
        if self.projection.view_shape != self.projection.shape:
            weight.add_((self.full * self.scales).view(self.projection.shape), alpha=alpha)
        elif isinstance(self.scales, Tensor):
            weight.addcmul_(self.full, self.scales.to(self.full.dtype), value=alpha)
        else:
            weight.add_(self.full, alpha=alpha * self.scales)

    def by_rows(self, dtype: torch.dtype | None) -> Callable[[slice], Tensor]:
        """What gives some rows of the update, formed alone where the weight is a plain matrix.

        Args:
            dtype: of the coordinates that it is formed from; their own when None.
        """
        projection, coordinates = self.projection, self.coordinates
        if coordinates is not None and dtype is not None:
            coordinates = coordinates.to(dtype)
        if len(projection.shape) != 2 or projection.view_shape != projection.shape:
            return Update(projection, coordinates, self.factors, self.full, self.scales).formed().__getitem__
        return functools.partial(self._rows, coordinates)

    def _rows(self, coordinates: Tensor | None, rows: slice) -> Tensor:
        inside = None
        if coordinates is not None:
            inside = self.projection.project_back_rows(coordinates, self.factors, rows)
        if self.full is None:
            assert inside is not None
            return inside
        scales = self.scales
        if isinstance(scales, Tensor):
            scales = (scales[rows] if scales.dim() and scales.shape[-2] > 1 else scales).to(self.full.dtype)
        outside = self.full[rows] * scales
        return outside if inside is None else outside.add_(inside)
