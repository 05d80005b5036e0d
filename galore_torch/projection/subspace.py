"""From a gradient to a basis: one door for matrices, stacks and Tucker projections.

Tucker: the factors of a tensor with several projected axes are found by higher-order orthogonal iteration (De
Lathauwer, De Moor and Vandewalle 2000): each factor is the leading left basis of the tensor's unfolding along its axis,
after the other axes have been projected with theirs. tensorly's `tucker` is the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from galore_torch import devices
from galore_torch.projection.decompositions import find_bases, find_directions
from galore_torch.projection.geometry import Basis, Mode, Projection, multiply_mode
from galore_torch.projection.numerical_rank import is_lacking, keep_unread
from galore_torch.projection.sketches import sketch_columns, sketches

TUCKER_SWEEPS = 4
"""Sweeps over the axes after the first pass, which already finds each axis' own best subspace. Enough to miss no more
than 1.001 times what a converged Tucker decomposition misses, unless the tensor is noise alone."""


def find_basis(
    projection: Projection,
    grad: Tensor,
    decomposition: str,
    *,
    seed: int,
    old: Basis | None = None,
    old_is_whole: bool = False,
    fills: bool = False,
) -> dict[str, Tensor]:
    """A basis for a weight from its gradient.

    Args:
        projection: how the weight is projected.
        grad: its full gradient, finite and not all zero, of the weight's shape; or the `sketch` of that.
        decomposition: one of `DECOMPOSITIONS`.
        seed: of the random numbers, which are the same on every device.
        old: the basis in use until now, if any.
        old_is_whole: whether it is known to have no columns of zeros.
        fills: of a full gradient, whether only matrices of a stack whose old basis lacks directions get another.

    Returns:
        The factors by mode, contiguous, in `grad`'s dtype; none for a projection without modes. Columns that neither
        the gradient nor an old basis determines are zeros.

    Raises:
        ValueError: an unknown decomposition.
        torch.linalg.LinAlgError: the decomposition did not converge.

    Example:
        >>> projection = Projection.of((6, 4), rank=2)
        >>> basis = find_basis(projection, torch.randn(6, 4), "svd", seed=0)
        >>> basis["right"].shape
        torch.Size([4, 2])
    """
    if not projection.modes:
        return {}
    if grad.dim() == 1:
        return _of_sketch(projection, grad, seed, old or {})
    view = grad.reshape(projection.view_shape)
    if fills and old and view.dim() > 2 and not projection.is_tucker:
        found = _filled(projection, view, decomposition, seed, old)
    elif projection.is_tucker:
        found = _tucker(projection, view, decomposition, seed, old or {})
    else:
        found = find_bases(view, _ranks(projection), decomposition, seed=seed, old=old, old_is_whole=old_is_whole)
    return {name: factor.to(grad.dtype) for name, factor in found.items()}


def sketch(projection: Projection, grad: Tensor, *, seed: int) -> Tensor:
    """All that the decomposition `sketched` reads of a gradient, which is linear in it.

    Args:
        projection: how the weight is projected, with modes; no Tucker projection.
        grad: its full gradient.
        seed: of the random numbers, which are the same on every device.

    Returns:
        Of one dimension, in `grad`'s dtype: l numbers for each row of each factor, l the rank and a few more.

    Example:
        >>> projection = Projection.of((60, 40), rank=2)
        >>> one, other = torch.randn(2, 60, 40)
        >>> summed = sketch(projection, one, seed=0) + sketch(projection, other, seed=0)
        >>> torch.allclose(summed, sketch(projection, one + other, seed=0), atol=1e-5)
        True
    """
    found = sketches(grad.reshape(projection.view_shape), _ranks(projection), seed)
    return torch.cat([part.flatten() for part in found.values()]).to(grad.dtype)


def _parts(projection: Projection, flat: Tensor) -> dict[str, Tensor]:
    """The sketches by mode, (..., d, l)."""
    shapes = projection.factor_shapes
    of_matrix = projection.view_shape[-2:]
    wide = {name: (*shape[:-1], sketch_columns(of_matrix, shape[-1])) for name, shape in shapes.items()}
    parts = torch.split(flat, [torch.Size(shape).numel() for shape in wide.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(parts, wide.items(), strict=True)}


def _of_sketch(projection: Projection, flat: Tensor, seed: int, old: Basis) -> dict[str, Tensor]:
    ranks, found = _ranks(projection), {}
    for name, part in _parts(projection, flat).items():
        known = {"left": old[name]} if name in old else {}
        basis = find_bases(part, {"left": ranks[name]}, "randomized", seed=seed, old=known)["left"]
        found[name] = basis.to(flat.dtype)
    return found


def find_unread(
    projection: Projection,
    grad: Tensor,
    decomposition: str,
    *,
    seed: int,
    old: Basis | None = None,
    old_is_whole: bool = False,
    completes: bool = False,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What `find_basis` gives, nearly, without reading anything back from the device.

    Args:
        projection: as there, with modes; no Tucker projection.
        grad: as there, or one of which nothing is meant.
        decomposition: as there, but `svd`.
        seed: as there.
        old: as there.
        old_is_whole: as there.
        completes: whether what the gradient does not tell is taken from the old basis, see `keep_unread`.

    Returns:
        The factors by mode, in `grad`'s dtype, and two booleans of no dimensions: whether they are finite, and whether
        the gradient tells some directions and not all, beside an old basis.
    """
    view = grad.reshape(projection.view_shape)
    ranks = _ranks(projection)
    found = find_directions(view, ranks, decomposition, seed=seed, old=old, old_is_whole=old_is_whole)
    factors, finite, partly = {}, [], []
    for name, directions in found.items():
        before = None if old is None else old[name].to(directions.columns_dr.dtype)
        basis, is_partly = keep_unread(directions, before, completes=completes)
        finite.append(basis.isfinite().all())
        partly.append(is_partly)
        factors[name] = basis.to(grad.dtype, memory_format=torch.contiguous_format, copy=True)
    return factors, torch.stack(finite).all(), torch.stack(partly).any()


def is_usable(grad: Tensor) -> Tensor:
    """Whether a gradient is finite and not zero, found out on its device.

    Args:
        grad: full or projected, of any floating dtype.

    Returns:
        A boolean of no dimensions.
    """
    peak = devices.largest_entry(grad)
    usable: Tensor = (peak > 0) & (peak < float("inf"))
    return usable


def _ranks(projection: Projection) -> dict[str, int]:
    return {mode.name: mode.rank for mode in projection.modes}


def _filled(projection: Projection, stack: Tensor, decomposition: str, seed: int, old: Basis) -> dict[str, Tensor]:
    """The old bases of a stack, but for those that lack directions and whose matrix is not zero."""
    filled = {name: old[name].clone() for name in old}
    wanted = devices.largest_entry(stack, (-2, -1)) > 0
    wanted &= torch.stack([is_lacking(factor).any(-1) for factor in filled.values()]).any(0)
    if wanted.any():
        known = {name: factor[wanted] for name, factor in filled.items()}
        found = find_bases(stack[wanted], _ranks(projection), decomposition, seed=seed, old=known)
        for name, factor in found.items():
            filled[name][wanted] = factor.to(filled[name].dtype)
    return filled


def _tucker(projection: Projection, tensor: Tensor, decomposition: str, seed: int, old: Basis) -> dict[str, Tensor]:
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def factor(mode: Mode, others: Basis) -> Tensor:
        projected = tensor
        for other in projection.modes:
            if other.name in others and other.name != mode.name:
                projected = multiply_mode(projected, others[other.name], other.axis)
        unfolded_dk = torch.movedim(projected, mode.axis, 0).flatten(1)
        known = {"left": old[mode.name]} if mode.name in old else None
        return find_bases(unfolded_dk, {"left": mode.rank}, decomposition, seed=seed, old=known)["left"]

    basis = {mode.name: factor(mode, {}) for mode in projection.modes}
    for _ in range(TUCKER_SWEEPS if decomposition != "random" and len(basis) > 1 else 0):
        for mode in projection.modes:
            basis[mode.name] = factor(mode, basis)
    return basis
