"""`StoredBasis`: a basis as an optimizer's state holds it, in its own dtype or in few bits, read as plain factors.

The state of a factor is the factor itself, or in few bits a dictionary of plain tensors (`codes`, `scale`, `low`), so
that whatever saves tensors saves it. A factor in few bits is decoded each time it is read, and kept by no one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galore_torch.lowbit.codes import Codes

Basis = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What the factors of a basis are kept in.

    Attributes:
        bits: 16 for a dtype, as they are; 8 or 4 for codes.
        group_size: numbers that share a scale, in few bits.
    """

    bits: int = 16
    group_size: int = 256

    def store(self, basis: Basis) -> dict[str, Any]:
        """What an optimizer keeps of a basis.

        Args:
            basis: the factors by mode.

        Returns:
            By mode, the factor itself or its codes and scales.
        """
        if isinstance(basis, StoredBasis) and basis.bits == self.bits:
            return dict(basis.stored)
        if self.bits == 16:
            return dict(basis)
        return {name: self._packed(factor) for name, factor in basis.items()}

    def _packed(self, factor: Tensor) -> dict[str, Tensor]:
        packed = Codes.of(factor, self.bits, self.group_size)
        assert packed.low is not None
        return {"codes": packed.codes, "scale": packed.scale, "low": packed.low}

    def read(self, stored: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Basis:
        """A basis from what is kept of it.

        Args:
            stored: as `store` made it.
            shapes: of the factors, by mode.
            dtype: of the factors; those that are not in few bits have their own.

        Returns:
            The factors by mode.
        """
        return stored if self.bits == 16 else StoredBasis(stored, shapes, self.bits, dtype)


class StoredBasis(Mapping[str, Tensor]):
    """Factors that are kept in few bits.

    Args:
        stored: their codes and scales by mode.
        shapes: their shapes by mode.
        bits: 8 or 4.
        dtype: in which they are read.
    """

    def __init__(
        self,
        stored: Mapping[str, Mapping[str, Tensor]],
        shapes: Mapping[str, tuple[int, ...]],
        bits: int,
        dtype: torch.dtype,
    ) -> None:
        self.stored = stored
        self._shapes = shapes
        self.bits = bits
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        """The factor of a mode, decoded anew."""
        return Codes(**self.stored[name], shape=self._shapes[name], bits=self.bits).decode(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def is_same_basis(one: Basis, other: Basis, *, reads: bool = True) -> bool:
    """Whether two bases are the same as they are stored. Nothing is decoded.

    Args:
        one: a basis, stored or plain.
        other: another, with the same modes.
        reads: whether tensors are compared that are not one and the same. Synchronizes.

    Returns:
        True if the tensors behind them are one and the same, or equal (which is only asked if they are not).
    """
    pairs = [pair for name in one for pair in zip(_tensors(one, name), _tensors(other, name), strict=False)]
    if all(ours is theirs for ours, theirs in pairs):
        return True
    return reads and all(torch.equal(ours, theirs) for ours, theirs in pairs)


def _tensors(basis: Basis, name: str) -> list[Tensor]:
    return list(basis.stored[name].values()) if isinstance(basis, StoredBasis) else [basis[name]]


def orthonormality_loss(factor_dr: Tensor) -> Tensor:
    """How far the columns of a factor are from orthonormal: the largest singular value of P^T P - I.

    Projecting with P and back with P loses or gains no direction of the subspace by more than this share.

    Args:
        factor_dr: (..., d, r).

    Returns:
        (...), in float32 or wider.
    """
    wide = factor_dr.to(torch.promote_types(factor_dr.dtype, torch.float32))
    identity = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    loss: Tensor = torch.linalg.matrix_norm(wide.mT @ wide - identity, ord=2)
    return loss


torch.serialization.add_safe_globals([StoredBasis])
