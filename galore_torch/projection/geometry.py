"""What a projection does to a tensor: `project` and `project_back`.

One form covers all cases. A projection multiplies some *modes* (axes) of a weight by the transpose of a matrix with
orthonormal columns, the mode's factor; the basis is the dictionary of these factors. A matrix projected on the left
has the one mode -2, on the right the one mode -1, `full` has both, a convolution in Tucker form has one mode for each
long axis, and a weight that is not projected has none. GaLore (arXiv 2403.03507), equation 2 and definition 3.6.

Shape suffixes: m, n rows and columns of the weight; r the rank; d the length of a mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor

from galore_torch.group_keys import Layout, ProjType

PROJ_TYPES = get_args(ProjType)
LAYOUTS = get_args(Layout)

Basis = Mapping[str, Tensor]
"""Factors by the name of their mode: `left` and `right` of a matrix, `mode0`, `mode1`, ... of a Tucker projection.
Each is (..., d, r), orthonormal in its columns."""


@dataclass(frozen=True)
class Mode:
    """One axis that is projected.

    Attributes:
        name: key of the factor in the basis.
        axis: the axis of the viewed weight, counted from the end (negative).
        size: its length d.
        rank: the length r of the projected tensor along it.
    """

    name: str
    axis: int
    size: int
    rank: int


def _sides(proj_type: str, rows: int, columns: int) -> tuple[str, ...]:
    """The projected sides of a rows x columns matrix, as the paper's code means the names."""
    tall = rows >= columns
    match proj_type:
        case "left" | "right":
            return (proj_type,)
        case "std":
            return ("right",) if tall else ("left",)
        case "reverse_std":
            return ("left",) if tall else ("right",)
        case "full":
            return ("left", "right")
    raise ValueError(f"proj_type is {proj_type!r}; use one of {', '.join(PROJ_TYPES)}")


@dataclass(frozen=True)
class Projection:
    """How a weight of one shape is projected: everything but the basis itself.

    Attributes:
        shape: the weight's shape.
        view_shape: the shape under which it is projected (differs from `shape` for the layout `reshape`).
        modes: the projected axes. None at all is the identity.
    """

    shape: tuple[int, ...]
    view_shape: tuple[int, ...]
    modes: tuple[Mode, ...]

    @classmethod
    def of(cls, shape: Sequence[int], rank: int, proj_type: str = "std", layout: str = "tucker") -> Projection:
        """The projection of a weight of this shape.

        Args:
            shape: the weight's shape, two dimensions or more.
            rank: the wanted rank, at least 1. It is cut to what the shape allows (min(m, n) of a matrix).
            proj_type: which sides of a matrix are projected: `std` the shorter, `reverse_std` the longer, `left` the
                rows, `right` the columns, `full` both.
            layout: what a weight of more than two dimensions is. `tucker`: every axis longer than `rank` has a factor
                of its own (convolutions). `stack`: leading axes count matrices, each with its own basis (experts).
                `reshape`: all axes but the first are flattened into columns.

        Returns:
            The projection.

        Raises:
            ValueError: fewer than two dimensions, a rank below 1, an unknown `proj_type` or `layout`, an empty shape.

        Example:
            >>> Projection.of((768, 3072), rank=128).projected_shape
            (128, 3072)
            >>> Projection.of((64, 32, 3, 3), rank=16).projected_shape
            (16, 16, 3, 3)
            >>> Projection.of((8, 96, 64), rank=16, layout="stack").projected_shape
            (8, 96, 16)
        """
        shape = tuple(int(size) for size in shape)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank is {rank!r}; use a whole number of at least 1")
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}; use one of {', '.join(LAYOUTS)}")
        if len(shape) < 2:
            raise ValueError(
                f"a parameter of shape {shape} cannot be projected: it needs two dimensions or more. Put it in a group "
                "without `rank`; if your framework has flattened them (FSDP1, DeepSpeed ZeRO 1 to 3), use FSDP2 or DDP"
            )
        if 0 in shape:
            raise ValueError(f"a parameter of shape {shape} has no elements; leave it out of the optimizer")
        if len(shape) > 2 and layout == "tucker":
            if proj_type != "std":
                raise ValueError(
                    f"proj_type is {proj_type!r} for a parameter of shape {shape}: the layout 'tucker' projects every "
                    "axis; use 'std', or the layout 'reshape' or 'stack' to choose sides"
                )
            elements = math.prod(shape)
            cuts = [min(rank, elements // size) for size in shape]  # an unfolding has elements / size columns
            cut_axes = enumerate(zip(shape, cuts, strict=True))
            modes = (Mode(f"mode{k}", k - len(shape), d, r) for k, (d, r) in cut_axes if d > r)
            return cls(shape, shape, tuple(modes))
        view_shape = (shape[0], math.prod(shape[1:])) if layout == "reshape" else shape
        rows, columns = view_shape[-2:]
        cut = min(rank, rows, columns)
        axis = {"left": (-2, rows), "right": (-1, columns)}
        modes = (Mode(side, *axis[side], cut) for side in _sides(proj_type, rows, columns))
        return cls(shape, view_shape, tuple(modes))

    @classmethod
    def identity(cls, shape: Sequence[int]) -> Projection:
        """The projection of a weight that is not projected: projecting changes nothing."""
        return cls(tuple(shape), tuple(shape), ())

    @cached_property
    def projected_shape(self) -> tuple[int, ...]:
        """The shape of a projected tensor, and of the coordinates."""
        projected = list(self.view_shape)
        for mode in self.modes:
            projected[mode.axis] = mode.rank
        return tuple(projected)

    @cached_property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the basis' factors, by mode."""
        stack = () if self.is_tucker else self.view_shape[:-2]
        return {mode.name: (*stack, mode.size, mode.rank) for mode in self.modes}

    @property
    def basis_columns(self) -> int:
        """How many directions the basis has, over all modes and stacked matrices."""
        return sum(math.prod((*shape[:-2], shape[-1])) for shape in self.factor_shapes.values())

    @property
    def state_elements(self) -> int:
        """How many numbers the basis and two projected tensors hold together: two, for the moments of Adam."""
        basis = sum(math.prod(shape) for shape in self.factor_shapes.values())
        return basis + 2 * math.prod(self.projected_shape)

    @property
    def saves_nothing(self) -> bool:
        """Whether basis and two projected tensors are as large as two weights: the rank is too high to save memory."""
        return self.state_elements >= 2 * math.prod(self.shape)

    @cached_property
    def is_tucker(self) -> bool:
        """Whether axes are projected one by one, not as sides of matrices."""
        return any(mode.name.startswith("mode") for mode in self.modes)

    @cached_property
    def one_side(self) -> str | None:
        """The projected side of a plain matrix that has one, as nearly all weights have; None for all else."""
        is_plain = len(self.modes) == 1 and len(self.shape) == 2 and self.view_shape == self.shape
        return self.modes[0].name if is_plain and not self.is_tucker else None

    def modes_in(self, moment: Tensor) -> list[Mode]:
        """The modes along which a moment of coordinates is as long as these: a factored one has one number along some.

        Args:
            moment: of an optimizer's state.
        """
        return [mode for mode in self.modes if moment.dim() >= -mode.axis and moment.shape[mode.axis] == mode.rank]

    def project(self, full: Tensor, basis: Basis) -> Tensor:
        """Projects a full-size tensor: R = P^T G, R = G Q, or P^T G Q.

        Args:
            full: a tensor of the weight's shape.
            basis: the factors, of `full`'s dtype and device.

        Returns:
            The projected tensor, of `projected_shape`, contiguous.
        """
        side = self.one_side
        if side == "left":
            return basis[side].mT @ full
        if side == "right":
            return full @ basis[side]
        projected = full.reshape(self.view_shape)
        for mode in self.modes:
            projected = multiply_mode(projected, basis[mode.name], mode.axis)
        return projected

    def project_back(self, projected: Tensor, basis: Basis) -> Tensor:
        """The full-size tensor of a projected one: G = P R, G = R Q^T, or P R Q^T.

        Args:
            projected: a tensor of `projected_shape`.
            basis: the factors, of `projected`'s dtype and device.

        Returns:
            A tensor of the weight's shape.
        """
        for mode in self.modes:
            projected = multiply_mode(projected, basis[mode.name].mT, mode.axis)
        return projected.reshape(self.shape)

    def project_back_rows(self, projected: Tensor, basis: Basis, rows: slice) -> Tensor:
        """Some rows of what `project_back` gives for a matrix, formed alone.

        Args:
            projected: a tensor of `projected_shape`, two-dimensional.
            basis: the factors, of `projected`'s dtype and device.
            rows: which.

        Returns:
            (number of rows, n).
        """
        left, right = basis.get("left"), basis.get("right")
        projected = projected[rows] if left is None else left[rows] @ projected
        return projected if right is None else projected @ right.mT

    def fold(self, weight: Tensor, coordinates: Tensor, basis: Basis, *, alpha: float, beta: float = 1.0) -> None:
        """In place: weight <- beta * weight + alpha * project_back(coordinates).

        The last product of a matrix is accumulated into the weight as it is formed, so that nothing of the weight's
        size is allocated.

        Args:
            weight: the weight, changed in place.
            coordinates: a tensor of `projected_shape`, of any floating dtype.
            basis: the factors, of the weight's dtype.
            alpha: factor of what is added.
            beta: factor of the weight, where decay goes.
        """
        if coordinates.dtype is not weight.dtype:
            coordinates = coordinates.to(weight.dtype)
        side = self.one_side
        if side == "left":
            weight.addmm_(basis[side], coordinates, beta=beta, alpha=alpha)
            return
        if side == "right":
            weight.addmm_(coordinates, basis[side].mT, beta=beta, alpha=alpha)
            return
        scattered = weight.dim() > 3 and not weight.is_contiguous()  # its leading axes may not be one
        if not self.modes or self.is_tucker or self.view_shape != self.shape or scattered:
            if beta != 1.0:
                weight.mul_(beta)
            weight.add_(self.project_back(coordinates, basis), alpha=alpha)
            return
        *first, last = self.modes
        for mode in first:
            coordinates = multiply_mode(coordinates, basis[mode.name].mT, mode.axis)
        factor = basis[last.name]
        pair = (factor, coordinates) if last.axis == -2 else (coordinates, factor.mT)
        if weight.dim() == 2:
            weight.addmm_(*pair, beta=beta, alpha=alpha)
        else:
            rows_columns = weight.shape[-2:]
            stacked = (part.reshape(-1, *part.shape[-2:]) for part in pair)
            weight.view(-1, *rows_columns).baddbmm_(*stacked, beta=beta, alpha=alpha)


def multiply_mode(tensor: Tensor, factor_dr: Tensor, axis: int) -> Tensor:
    """The product of a tensor with factor^T along one axis, counted from the end, of length d, which becomes r."""
    if axis == -1:
        return tensor @ factor_dr
    if axis == -2:
        return factor_dr.mT @ tensor
    return torch.movedim(torch.movedim(tensor, axis, -1) @ factor_dr, -1, axis).contiguous()
