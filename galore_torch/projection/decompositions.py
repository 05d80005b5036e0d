"""Which subspace: the ways to find orthonormal bases of a matrix's columns (left) and rows (right).

* `svd`: the exact leading singular vectors, with the signs that the device's library gives them: LAPACK's on a CPU, so
  that trajectories of the paper's code are reproduced there. The paper's choice.
* `randomized`: subspace iteration on A A^T started from a Gaussian matrix, with oversampling (Halko, Martinsson and
  Tropp 2011, algorithm 4.4; GaLore 2, arXiv 2504.20437).
* `warm`: the same started from the old basis, which is close already, since a gradient's subspace moves slowly; one
  iteration is then enough. The first basis is `randomized`'s.
* `tracked`: a single iteration from the old basis and no other directions, for bases that are renewed in each step or
  every few (a gap of 1 to 10; power iterations as in LDAdam, arXiv 2410.16103).
* `random`: an orthonormal basis drawn at random, blind to the gradient (GoLore, arXiv 2410.11289).
* `switched`: some of `warm`'s leading directions, and random ones of their complement, so that no direction is left out
  for good (Alice, arXiv 2502.07752).
* `sketched`: `randomized` of r and a few random combinations of the columns, in the place of all of them (algorithm 4.1
  of Halko, Martinsson and Tropp). These are linear in the matrix: over slow links they travel for it.
* `sampled`: singular vectors drawn without replacement, with probabilities as their singular values (SARA,
  arXiv 2502.05790).

All take stacks of matrices. Shape suffixes: d x k the matrix seen from the side in question, r the rank, l = r plus
the oversampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from galore_torch import devices
from galore_torch.projection.numerical_rank import Directions, are_determined, is_lacking, keep_determined
from galore_torch.projection.orthonormal import (
    above_zero,
    eigen,
    exact_products,
    exact_svd,
    leading_directions,
    orthonormal,
)
from galore_torch.projection.sketches import (
    exact,
    multiplied,
    random_columns,
    seen_from,
    sketch_columns,
    sketches,
)

Side = Literal["left", "right"]

POWER_ITERATIONS = 2
"""How often a subspace iteration applies A A^T. docs/decisions.md has the measured energies: with fewer, some layers
lose more than 1 % of what the exact basis captures."""

LEADING = 0.5
"""Share of a `switched` basis that leads; the rest is random."""

MORE_ITERATIONS = 1
"""On a GPU, where products with A cost less than an exact rotation to the singular directions."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a decomposition is asked for.

    Attributes:
        ranks: columns wanted for each side.
        old: the bases in use until now, by side; empty at first.
        seed: of the random numbers.
        old_is_whole: whether the old bases are known to have no columns of zeros.
    """

    ranks: Mapping[str, int]
    old: Mapping[str, Tensor]
    seed: int
    old_is_whole: bool = False


class Axes(NamedTuple):
    """What a decomposition finds of one side.

    Attributes:
        columns_dr: (..., d, r), orthonormal.
        lengths_r: (..., r), the norms of A^T times each, or nearly, up to a common factor: singular values, of singular
            vectors. None where they are not at hand.
    """

    columns_dr: Tensor
    lengths_r: Tensor | None = None


def _svd(matrix: Tensor, wanted: Wanted) -> dict[str, Axes]:
    left, values, right = exact_svd(exact(matrix))
    vectors = {"left": left, "right": right.mT}
    return {side: Axes(vectors[side][..., :rank], values[..., :rank]) for side, rank in wanted.ranks.items()}


def _random(matrix: Tensor, wanted: Wanted) -> dict[str, Axes]:
    """Any matrix is as long on one column as on another; one of zeros keeps its old basis, if it has one."""
    found = {}
    for number, (side, rank) in enumerate(wanted.ranks.items()):
        drawn_dr = orthonormal(random_columns(seen_from(matrix, side), rank, wanted.seed, number))
        largest = devices.largest_entry(exact(matrix), (-2, -1)).unsqueeze(-1)
        size = largest if side in wanted.old else torch.ones_like(largest)
        found[side] = Axes(drawn_dr, size.expand(drawn_dr[..., 0, :].shape))
    return found


def _randomized(matrix: Tensor, wanted: Wanted) -> dict[str, Axes]:
    return _warm(matrix, replace(wanted, old={}))


def find_bases(
    matrix: Tensor,
    ranks: Mapping[str, int],
    decomposition: str,
    *,
    seed: int,
    old: Mapping[str, Tensor] | None = None,
    old_is_whole: bool = False,
) -> dict[str, Tensor]:
    """Orthonormal bases of the wanted sides of a matrix, or of each matrix of a stack. Synchronizes.

    Args:
        matrix: (..., m, n), finite and not all zero, of any floating dtype.
        ranks: the number of columns wanted for `left`, for `right`, or for both; at most min(m, n).
        decomposition: one of `DECOMPOSITIONS`.
        seed: of the random numbers, which are the same on every device.
        old: the bases in use until now. `warm` starts from them, and all but `svd` turn the new basis' signs to agree
            with theirs, so that moments kept in the old coordinates stay meaningful. They stay in the place of
            directions that the matrix does not determine, and a matrix of zeros keeps its old basis.
        old_is_whole: whether these are known to have no columns of zeros, whose place would be taken by random ones.

    Returns:
        Contiguous (..., m, r) and (..., n, r) by side, in float64 for a float64 matrix and else in float32. They hold
        no memory but their own elements. Orthonormal, but for columns of zeros where neither the matrix nor an old
        basis determines a direction (`random` draws all of them).

    Raises:
        ValueError: an unknown decomposition.
        torch.linalg.LinAlgError: the decomposition did not converge.
    """
    old = {side: exact(basis) for side, basis in (old or {}).items()}
    found = find_directions(matrix, ranks, decomposition, seed=seed, old=old, old_is_whole=old_is_whole)
    bases = {side: keep_determined(directions, old.get(side)) for side, directions in found.items()}
    # A slice of the whole factor would keep all of it alive.
    return {side: basis.clone(memory_format=torch.contiguous_format) for side, basis in bases.items()}


def find_directions(
    matrix: Tensor,
    ranks: Mapping[str, int],
    decomposition: str,
    *,
    seed: int,
    old: Mapping[str, Tensor] | None = None,
    old_is_whole: bool = False,
) -> dict[str, Directions]:
    """What `find_bases` makes its bases of. Reads nothing back, but for `svd` and `sampled`.

    Args:
        matrix: as there. Of one that is not finite nothing is meant.
        ranks: as there.
        decomposition: as there.
        seed: as there.
        old: as there.
        old_is_whole: as there.

    Returns:
        By side (..., m, r) and (..., n, r) orthonormal columns, and which of them the matrix determines.

    Raises:
        ValueError: an unknown decomposition.
    """
    if decomposition not in DECOMPOSITIONS:
        raise ValueError(f"decomposition is {decomposition!r}; use one of {', '.join(DECOMPOSITIONS)}")
    old = {side: exact(basis) for side, basis in (old or {}).items()}
    wanted = Wanted(ranks=ranks, old=old, seed=seed, old_is_whole=old_is_whole)
    with exact_products():
        if decomposition == "sketched":
            found, faced = {}, sketches(matrix, ranks, seed)
            for side, sketch_dl in faced.items():
                of_side = replace(wanted, ranks={"left": ranks[side]}, old={"left": old[side]} if side in old else {})
                found[side] = _randomized(sketch_dl, of_side)["left"]
        else:
            seen = multiplied(matrix)
            found = DECOMPOSITIONS[decomposition](seen, wanted)
            faced = {side: seen_from(seen, side) for side in found}
        return {
            side: _directions(axes, faced[side], old.get(side) if decomposition != "svd" else None, matrix.dtype)
            for side, axes in found.items()
        }


def _directions(axes: Axes, facing_dk: Tensor, old_dr: Tensor | None, rounded_to: torch.dtype) -> Directions:
    columns_dr, lengths_r = axes
    if lengths_r is None:
        lengths_r = torch.linalg.vector_norm(_unit(_product(facing_dk.mT, columns_dr)), dim=-2)
    told_r = are_determined(lengths_r, facing_dk.shape[-2:], rounded_to)
    return Directions(align_signs(columns_dr, old_dr), told_r)


def align_signs(basis_dr: Tensor, old_dr: Tensor | None) -> Tensor:
    """The basis with each column's sign turned so that it points along the old column, as far as it does.

    Args:
        basis_dr: (..., d, r).
        old_dr: (..., d, r), or None for no change.

    Returns:
        (..., d, r), spanning the same subspace.
    """
    if old_dr is None or old_dr.shape != basis_dr.shape:
        return basis_dr
    agreement = (basis_dr * old_dr).sum(dim=-2, keepdim=True)
    return torch.where(agreement < 0, -basis_dr, basis_dr)


def _warm(matrix: Tensor, wanted: Wanted) -> dict[str, Axes]:
    """Subspace iteration for one side; the other side, if wanted, follows from it."""
    first = next(iter(wanted.ranks))
    facing_dk = seen_from(matrix, first)
    start_dl = _start(facing_dk, wanted.ranks[first], wanted.old.get(first), wanted.seed, wanted.old_is_whole)
    iterations = POWER_ITERATIONS + (MORE_ITERATIONS if devices.runs_ahead(facing_dk) else 0)
    return _iterated(matrix, wanted, start_dl, iterations)


def _tracked(matrix: Tensor, wanted: Wanted) -> dict[str, Axes]:
    first, rank = next(iter(wanted.ranks.items()))
    old_dr = wanted.old.get(first)
    if old_dr is None or old_dr.shape[-1] != rank or not wanted.old_is_whole:
        return _warm(matrix, wanted)
    return _iterated(matrix, wanted, old_dr, 1)


def _iterated(matrix: Tensor, wanted: Wanted, start_dl: Tensor, iterations: int) -> dict[str, Axes]:
    first, *others = wanted.ranks
    found = {first: _subspace_iteration(seen_from(matrix, first), start_dl, wanted.ranks[first], iterations)}
    for side in others:
        # Right singular vectors span A^T U; the columns come in the order of the singular values.
        across_kr = _unit(_product(seen_from(matrix, side), found[first].columns_dr))[..., : wanted.ranks[side]]
        found[side] = Axes(orthonormal(across_kr), torch.linalg.vector_norm(across_kr, dim=-2))
    return found


def _start(facing_dk: Tensor, rank: int, old_dr: Tensor | None, seed: int, is_whole: bool) -> Tensor:
    """Where an iteration starts: the old basis, if there is one, filled up with random columns.

    They are in the place of columns of zeros too, which no iteration would leave.
    """
    size = sketch_columns(facing_dk.shape[-2:], rank)
    if old_dr is None or old_dr.shape[-1] > size:
        return random_columns(facing_dk, size, seed, 0)
    more = random_columns(facing_dk, size - old_dr.shape[-1], seed, 0)
    if not is_whole:
        others = random_columns(facing_dk, old_dr.shape[-1], seed, 1)
        old_dr = torch.where(is_lacking(old_dr).unsqueeze(-2), others, old_dr)
    return torch.cat((old_dr, more), dim=-1)


def _subspace_iteration(facing_dk: Tensor, basis_dl: Tensor, rank: int, iterations: int) -> Axes:
    """The leading `rank` left singular vectors, nearly: (A A^T)^q applied to a start, with a Rayleigh-Ritz rotation.

    The rotation turns the axes within the subspace to the singular directions, so that the leading ones can be kept:
    an elementwise rule such as Adam's depends on the axes. It is made in the last iteration, of products that are at
    hand; a rotation of the result would cost one more product with A and gain less than 0.001 of the energy. So are
    the lengths, of the directions before that iteration; the last makes none of the subspace shorter.
    """
    for left in range(iterations - 1, 0, -1):
        basis_dl = orthonormal(_apply_gram(facing_dk, basis_dl)[0], nearly=left > 1)
    power_dl, across_kl = _apply_gram(facing_dk, basis_dl)
    axes_lr = leading_directions(basis_dl, across_kl, power_dl, rank)
    power_dr = power_dl @ axes_lr
    lengths_r = torch.linalg.vector_norm(across_kl @ axes_lr, dim=-2) if _tells_axes_apart(power_dr) else None
    return Axes(orthonormal(power_dr), lengths_r)


def _tells_axes_apart(power_dr: Tensor) -> bool:
    """Whether none of these columns is what rounding makes of A A^T along a direction that A does not have.

    Weak directions are then mixed with such ones, and all of them are as long as these. A GPU does not wait for this.
    """
    if devices.runs_ahead(power_dr):
        return True
    lengths_r = torch.linalg.vector_norm(power_dr, dim=-2)
    least = 64 * torch.finfo(power_dr.dtype).eps * lengths_r.amax(-1, keepdim=True)
    return bool((lengths_r > least).all())


def _apply_gram(facing_dk: Tensor, columns_dl: Tensor) -> tuple[Tensor, Tensor]:
    """A A^T applied to columns, and A^T alone, up to a factor each."""
    across_kl = _unit(_product(facing_dk.mT, columns_dl))
    power_dl = _unit(_product(facing_dk, across_kl))
    if devices.runs_ahead(power_dl):  # A A^T + c I, of the same directions: Cholesky QR needs independent columns
        power_dl.add_(_unit(columns_dl), alpha=2 * torch.finfo(power_dl.dtype).eps)
    return power_dl, across_kl


def _unit(matrix: Tensor) -> Tensor:
    """The matrix scaled so that its largest entry is 1: keeps the squares of tiny and huge gradients within range."""
    largest = devices.largest_entry(matrix, (-2, -1), keepdim=True)
    return matrix / above_zero(largest)


def _product(matrix: Tensor, columns: Tensor) -> Tensor:
    """A product in the matrix' own precision, the result in the columns'."""
    return (matrix @ columns.to(matrix.dtype)).to(columns.dtype)


def _switched(matrix: Tensor, wanted: Wanted) -> dict[str, Axes]:
    leading = {side: math.ceil(LEADING * rank) for side, rank in wanted.ranks.items()}
    old = {side: basis_dr[..., : leading[side]] for side, basis_dr in wanted.old.items()}
    found = _warm(matrix, replace(wanted, ranks=leading, old=old))
    for number, (side, (basis_dl, _)) in enumerate(list(found.items()), start=2):
        if more := wanted.ranks[side] - leading[side]:
            drawn_dr = random_columns(seen_from(matrix, side), more, wanted.seed, number).to(basis_dl.dtype)
            for _ in range(2):  # once more for what rounding left
                drawn_dr = orthonormal(drawn_dr - basis_dl @ (basis_dl.mT @ drawn_dr))
            found[side] = Axes(torch.cat((basis_dl, drawn_dr), dim=-1))
    return found


def _sampled(matrix: Tensor, wanted: Wanted) -> dict[str, Axes]:
    found = {}
    for number, (side, rank) in enumerate(wanted.ranks.items()):
        facing_dk = _unit(exact(seen_from(matrix, side)))
        squares, vectors_dd = eigen(facing_dk @ facing_dk.mT)
        # The largest of logarithms with Gumbel noise are a draw without replacement.
        uniform = torch.special.ndtr(random_columns(squares.unsqueeze(-1), 1, wanted.seed, number)).squeeze(-1)
        keys = squares.clamp_min(0).log() / 2 - (-uniform.clamp(1e-6, 1 - 1e-6).log()).log()
        places = keys.topk(rank).indices.sort(descending=True).values
        drawn_dr = vectors_dd.gather(-1, places.unsqueeze(-2).expand(*vectors_dd.shape[:-1], rank))
        found[side] = Axes(orthonormal(drawn_dr))  # a GPU leaves their lengths 1e-5 from 1
    return found


DECOMPOSITIONS: dict[str, Callable[[Tensor, Wanted], dict[str, Axes]]] = {
    "svd": _svd,
    "randomized": _randomized,
    "warm": _warm,
    "tracked": _tracked,
    "random": _random,
    "switched": _switched,
    "sampled": _sampled,
    "sketched": _randomized,  # of a sketch: see find_directions
}
"""The decompositions by name. `galore_torch.group_keys.Decomposition` names them too, for it imports no torch."""
