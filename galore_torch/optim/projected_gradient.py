"""`ProjectedGradient`: a gradient that has been projected already, in the place of the full one.

It has the weight's shape and dtype, and stores the projected tensor alone. As the basis is orthonormal, its norm is
the norm of what it stands for; and projection is linear, so scaling, zeroing and adding act on it, and a full
gradient added to it is projected first. So gradient clipping, loss scaling, accumulation and logging are right
without knowing of it.

Anything else that only reads it sees the full-size gradient it stands for, formed on the spot. Anything else that
would change it in place raises an error: it could silently leave the subspace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from galore_torch.lowbit import Codes, WithoutMemory, is_same_basis
from galore_torch.projection import Mode, Projection

aten = torch.ops.aten

_NORMS = {aten.linalg_vector_norm.default, aten._foreach_norm.Scalar, aten.norm.Scalar, aten.norm.ScalarOpt_dim}
"""Norms of the whole tensor. Only the Euclidean one is the same for both."""

_ON_PROJECTED = {
    # out of place: the result is a projected gradient of the same basis
    aten.detach.default,
    aten.clone.default,
    aten.alias.default,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.neg.default,
    aten._foreach_mul.Scalar,
    aten._foreach_mul.Tensor,
    aten._foreach_div.Scalar,
    aten._foreach_neg.default,
    # in place
    aten.mul_.Tensor,
    aten.mul_.Scalar,
    aten.div_.Tensor,
    aten.div_.Scalar,
    aten.neg_.default,
    aten.zero_.default,
    aten.detach_.default,
    aten._foreach_mul_.Scalar,
    aten._foreach_mul_.ScalarList,
    aten._foreach_mul_.Tensor,
    aten._foreach_div_.Scalar,
    aten._foreach_div_.ScalarList,
    aten._foreach_div_.Tensor,
    aten._foreach_neg_.default,
    aten._foreach_zero_.default,
    aten._amp_foreach_non_finite_check_and_unscale_.default,
}
"""Linear in the gradient when the other arguments are numbers or hold one element."""

_EMPTYING = {aten.zero_.default, aten._foreach_zero_.default}

_SUMS = {aten.add.Tensor: +1, aten.add_.Tensor: +1, aten.sub.Tensor: -1, aten.sub_.Tensor: -1}


class ProjectedGradient(WithoutMemory):
    """A tensor of a weight's shape that stores its gradient in projected form.

    Attributes:
        projected: the gradient in the basis, of `projection.projected_shape`. Its dtype may differ from the weight's.
            If it is stored in few bits it is decoded anew when read, and what is assigned is encoded.
        in_few_bits: whether it is so stored.
        projection: how the weight is projected.
        basis: the factors that were used, of the weight's dtype.
        is_emptied: whether it has been set to zero since something was added to it, as `zero_grad` does it in place.

    Example:
        >>> projection = Projection.of((8, 4), rank=2)
        >>> basis = {"right": torch.linalg.qr(torch.randn(4, 2)).Q}
        >>> weight = torch.nn.Parameter(torch.zeros(8, 4))
        >>> weight.grad = ProjectedGradient.of(torch.randn(8, 4), projection, basis)
        >>> norm = torch.nn.utils.clip_grad_norm_([weight], max_norm=1e-3)
        >>> weight.grad.projected.shape, bool(weight.grad.norm() <= 1e-3)
        (torch.Size([8, 2]), True)
    """

    projection: Projection
    basis: Mapping[str, Tensor]
    is_emptied: bool = False
    _stored: Tensor | Codes

    not_changed = (
        "would change a projected gradient in place, which it cannot do within the subspace; read the full gradient "
        'with .to_full(), or use attach(..., gradients="full")'
    )
    not_sent = (
        "cannot act on a projected gradient: the processes' bases may differ, and it would change a copy. To average "
        "gradients over processes call attach(...) before DistributedDataParallel(model); to do so by hand use "
        'attach(..., gradients="full"), or no attach at all'
    )

    @staticmethod
    def __new__(  # noqa: D417
        cls: type[ProjectedGradient],
        projected: Tensor | Codes,
        projection: Projection,
        basis: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
    ) -> ProjectedGradient:
        """Wraps a projected tensor.

        Args:
            projected: of `projection.projected_shape`, as it is to be stored. In codes, `dtype` must be given.
            projection: how the weight is projected.
            basis: the factors.
            dtype: the weight's dtype; the tensor's when left out.
        """
        plain = projected.codes if isinstance(projected, Codes) else projected
        made: ProjectedGradient = Tensor._make_wrapper_subclass(
            cls, projection.shape, dtype=dtype or plain.dtype, device=plain.device, requires_grad=False
        )
        made._stored, made.projection, made.basis = projected, projection, basis
        return made

    @property
    def projected(self) -> Tensor:
        """The projected gradient."""
        return self._stored.decode(self.dtype) if isinstance(self._stored, Codes) else self._stored

    @projected.setter
    def projected(self, projected: Tensor) -> None:
        self._stored = Codes.of(projected, self._stored.bits) if isinstance(self._stored, Codes) else projected

    @property
    def in_few_bits(self) -> bool:
        """Whether it is stored as codes."""
        return isinstance(self._stored, Codes)

    @property
    def data(self) -> Tensor:
        """The gradient without its history. `Module.to` assigns it, cast or moved; torch would swap the shell alone."""
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, ProjectedGradient):
            raise ValueError(
                "assigning to .data of a projected gradient would leave what it stores; change it by operations that "
                'scale or add, set weight.grad itself, or use attach(..., gradients="full")'
            )
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self._stored, self.projection, self.basis = other._stored, other.projection, other.basis

    @classmethod
    def of(cls, full: Tensor, projection: Projection, basis: Mapping[str, Tensor]) -> ProjectedGradient:
        """The projection of a full gradient.

        Args:
            full: of the weight's shape.
            projection: how the weight is projected.
            basis: the factors, of `full`'s dtype.

        Returns:
            The projected gradient.
        """
        return cls(projection.project(full, basis), projection, basis, full.dtype)

    def to_full(self) -> Tensor:
        """The full-size gradient that this stands for: P R, R Q^T or P R Q^T."""
        return self.projection.project_back(self.projected.to(self.dtype), self.basis)

    def projected_by(self, projection: Projection, basis: Mapping[str, Tensor]) -> Tensor:
        """The gradient projected by a basis: the stored tensor when it was made with that basis, else projected anew.

        Args:
            projection: how the weight is projected now.
            basis: the factors in use now.

        Returns:
            A tensor of `projection.projected_shape`.
        """
        same = self.is_in(basis) and (projection is self.projection or projection == self.projection)
        return self.projected if same else projection.project(self.to_full(), basis)

    def is_in(self, basis: Mapping[str, Tensor]) -> bool:
        """Whether it was projected by these factors."""
        return basis is self.basis or is_same_basis(basis, self.basis)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ProjectedGradient(shape={tuple(self.shape)}, projected={self.projected!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ProjectedGradient:
        return self._like(self.projected.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (self._stored, self.projection, self.basis, self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Projection, Mapping[str, Tensor], torch.dtype]]:
        return ["projected"], (self.projection, self.basis, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> ProjectedGradient:
        return ProjectedGradient(inner["projected"], *context)

    def _like(self, projected: Tensor) -> ProjectedGradient:
        stored = Codes.of(projected, self._stored.bits) if isinstance(self._stored, Codes) else projected
        return ProjectedGradient(stored, self.projection, self.basis, self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is aten.detach.default:  # what the engine does with each gradient that it accumulates
            one = args[0]
            return ProjectedGradient(one._stored, one.projection, one.basis, one.dtype)
        kwargs = kwargs or {}
        if func in _NORMS and _is_euclidean(args, kwargs):
            return func(*_unwrap(args), **kwargs)
        if func in _SUMS and isinstance(args[0], cls) and _is_gradient_like(args[1], args[0]):
            return _sum(func, args[0], args[1], _SUMS[func] * kwargs.get("alpha", 1))
        if func in _ON_PROJECTED and _others_are_numbers(args):
            return _on_projected(func, args, kwargs)
        if func is aten._to_copy.default:
            return _to_copy(args[0], **kwargs)
        cls.refuse_unserved(func, args, kwargs)
        return func(*_full(args), **_full(kwargs))


def _unwrap(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.projected if isinstance(leaf, ProjectedGradient) else leaf, tree)


def _full(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.to_full() if isinstance(leaf, ProjectedGradient) else leaf, tree)


def _is_euclidean(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    over_all_axes = len(args) < 3 or args[2] is None
    return order == 2 and over_all_axes


def _others_are_numbers(args: tuple[Any, ...]) -> bool:
    leaves = tree_leaves(args[1:])
    return all(not isinstance(leaf, Tensor) or leaf.numel() == 1 for leaf in leaves)


def _is_gradient_like(other: Any, gradient: ProjectedGradient) -> bool:
    """Whether it can be projected before it is added. A number, say, added to every entry leaves the subspace."""
    return isinstance(other, Tensor) and other.shape == gradient.shape


def _on_projected(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the projected tensors. What it returns, if anything, takes their place one by one."""
    given = args[0]
    projected_grads = _unwrap(args)
    result = func(*projected_grads, **kwargs)
    if func in _EMPTYING:
        for gradient in tree_leaves(given):
            gradient.is_emptied = True
    if result is None or func._schema.name.endswith("_"):
        for gradient, projected in zip(tree_leaves(given), tree_leaves(projected_grads[0]), strict=True):
            if isinstance(gradient, ProjectedGradient) and gradient.in_few_bits:
                gradient.projected = projected
    if result is None:
        return None
    if func._schema.name.endswith("_"):  # in place
        return given
    if isinstance(given, ProjectedGradient):
        return given._like(result)
    pairs = zip(given, result, strict=True)
    return [before._like(after) if isinstance(before, ProjectedGradient) else after for before, after in pairs]


def _sum(func: Any, left: ProjectedGradient, right: Tensor, alpha: float) -> ProjectedGradient:
    if isinstance(right, ProjectedGradient):
        projected = right.projected_by(left.projection, left.basis)
    else:
        projected = left.projection.project(right.to(left.dtype), left.basis)
    kept = left.projected
    projected = projected.to(kept.dtype)
    if func in (aten.add_.Tensor, aten.sub_.Tensor):
        left.projected, left.is_emptied = kept.add_(projected, alpha=alpha), False
        return left
    return left._like(kept.add(projected, alpha=alpha))


def _to_copy(gradient: ProjectedGradient, **kwargs: Any) -> ProjectedGradient:
    placed = {name: value for name, value in kwargs.items() if name in ("dtype", "device", "non_blocking")}
    basis = {name: factor.to(**placed) for name, factor in gradient.basis.items()}
    projected = aten._to_copy.default(gradient.projected, **placed)
    return ProjectedGradient(projected, gradient.projection, basis, kwargs.get("dtype") or gradient.dtype)


torch.serialization.add_safe_globals([ProjectedGradient, Projection, Mode, Codes])
