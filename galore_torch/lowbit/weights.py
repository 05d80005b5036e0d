"""`QuantizedWeight`: a weight kept in INT8, in the place of the full one.

It has the weight's shape and dtype, and stores symmetric 8-bit codes with a scale for every group of them (Q-GaLore,
arXiv 2407.08296). A linear layer decodes it for its forward and again for its backward, and keeps nothing of it in
between. An optimizer's update is added to the decoded numbers and rounded to codes again, up or down at random, so that
updates of less than a code are right on average.

Whatever else only reads it sees the decoded numbers; so do views, which are of a decoded copy. Whatever else
would change it in place raises an error, but for `copy_`, which rounds to the nearest: numbers that were decoded, and
kept in bfloat16 or more, become the same codes again. So plain checkpoints lose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from galore_torch import devices
from galore_torch.lowbit.codes import Codes, check_bits, has_numbers
from galore_torch.lowbit.updated_codes import fastest
from galore_torch.lowbit.views import of_copy
from galore_torch.lowbit.without_memory import WithoutMemory
from galore_torch.random_bits import key_of

aten = torch.ops.aten

AVERAGES = (
    "To average weights (EMA, SWA), call dequantize_weights(averaged_model) once, when the averaged copy has been made"
)

_ARITHMETIC = {
    *(aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.lerp, aten.addcmul, aten.addcdiv),
    *(aten._foreach_add, aten._foreach_sub, aten._foreach_mul, aten._foreach_lerp, aten._foreach_div),
}
"""What updates and averages are computed with."""

BLOCK_ELEMENTS = 2**20
"""Numbers that are decoded or encoded together on a CPU, about: what is formed of a weight's update at one time."""
OPERATIONS: dict[Any, Callable[..., Any]] = {}
"""What is done in place of an operation of torch's dispatcher; called with it and its arguments."""
FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""What is done in place of a function or a method of torch, before autograd sees it; called with its arguments."""


class QuantizedWeight(WithoutMemory):
    """A tensor of a weight's shape and dtype that stores INT8 codes.

    Attributes:
        codes: uint8, one a number, in the weight's own order; the last group is filled up.
        scale: bfloat16, the largest magnitude of each group.
        seed: of the random numbers of its updates; None rounds to the nearest.

    Example:
        >>> weight = torch.randn(64, 256)
        >>> kept = QuantizedWeight.of(weight, group_size=128)
        >>> kept.shape, kept.stored_bytes / weight.nbytes, bool((kept - weight).abs().max() < 0.03)
        (torch.Size([64, 256]), 0.25390625, True)
    """

    codes: Tensor
    scale: Tensor
    seed: int | None

    not_changed = (
        "would change a weight in place that is kept in INT8. GaLore's optimizers move it, and copy_ sets it; for all "
        f"else call dequantize_weights(model) first. {AVERAGES}"
    )
    not_sent = (
        "cannot send a weight that is kept in INT8, or receive it: it would act on a decoded copy. Pass its .codes and "
        "then its .scale in its place; both are plain tensors"
    )

    @staticmethod
    def __new__(  # noqa: D417
        cls: type[QuantizedWeight],
        codes: Tensor,
        scale: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        seed: int | None = None,
        requires_grad: bool = False,
        is_parameter: bool = False,
    ) -> QuantizedWeight:
        """Wraps codes.

        Args:
            codes: uint8, a whole number of groups.
            scale: one for each group.
            shape: of the weight.
            dtype: of the weight.
            seed: of its updates.
            requires_grad: whether it is trained.
            is_parameter: whether it is an `nn.Parameter` as it stands.
        """
        made: QuantizedWeight = Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=codes.device, requires_grad=requires_grad
        )
        made.codes, made.scale, made.seed = codes, scale, seed
        if is_parameter:
            made._is_param = True
        return made

    @classmethod
    def of(cls, weight: Tensor, group_size: int = 256, seed: int | None = None) -> QuantizedWeight:
        """A weight in INT8, rounded to the nearest.

        Args:
            weight: of two dimensions and of floating dtype, finite.
            group_size: numbers that share a scale, even.
            seed: of the random numbers of its updates; None rounds these to the nearest, too.

        Returns:
            The quantized weight, of the same shape, dtype and device.

        Raises:
            ValueError: a weight or a group size that is not supported.
        """
        check_bits(8, group_size)
        if weight.dim() != 2 or not weight.is_floating_point() or weight.element_size() < 2:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} and {weight.dtype} cannot be kept in INT8; it needs two "
                "dimensions and a floating dtype of 16 bits or more"
            )
        groups = -(-weight.numel() // group_size)
        made = cls(
            weight.new_empty(groups * group_size, dtype=torch.uint8),
            weight.new_empty(groups, dtype=torch.bfloat16),
            weight.shape,
            weight.dtype,
            seed,
        )
        with torch.no_grad():
            made.take(weight.detach())
        return made

    @property
    def group_size(self) -> int:
        """Numbers that share a scale."""
        return self.codes.numel() // max(1, self.scale.numel())

    @property
    def stored_bytes(self) -> int:
        """The bytes of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that the codes stand for, in a plain tensor of its own. No gradient flows through it.

        Args:
            dtype: of the result; the weight's when None.

        Returns:
            Of the weight's shape.
        """
        plain = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        for rows in self._blocks():
            plain[rows] = self._decode(rows)
        return plain

    def to_full(self) -> Tensor:
        """What `decode` returns, in the weight's dtype."""
        return self.decode()

    def share_memory_(self) -> QuantizedWeight:
        """Puts codes and scales where other processes can use them, too."""
        self.codes.share_memory_()  # type: ignore[no-untyped-call]
        self.scale.share_memory_()  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def move(
        self, update: Callable[[slice], Tensor], *, step: int, alpha: float = 1.0, beta: float | Tensor = 1.0
    ) -> None:
        """In place: weight <- beta * weight + alpha * update, rounded to codes at random if there is a seed.

        The random numbers depend on the seed and on the step alone, whatever the device. The update is formed block by
        block; of a large weight nothing else is (`updated_codes`).

        Args:
            update: gives these rows of the update.
            step: the number of the weight's step.
            alpha: factor of the update.
            beta: factor of the weight.
        """
        key = None if self.seed is None else self._number(key_of(self.seed, step), torch.int32)
        factors = self._number(alpha, torch.float32), self._number(beta, torch.float32)
        moved = fastest(self.numel())
        for rows in self._blocks():
            codes, scale = self._stored(rows)
            added, kept = update(rows).reshape(-1), (rows.stop - rows.start) * self.shape[1]
            filling = codes.numel() - kept
            if filling:
                added = torch.cat((added, added[-1:].expand(filling)))
            first = self._number(rows.start * self.shape[1], torch.int32)
            size = (-1, self.group_size)
            new_codes, new_scale = moved(codes.view(size), scale, added.view(size), *factors, key, first)
            codes.copy_(new_codes.view(-1))
            scale.copy_(new_scale)
            codes[kept:] = codes[kept - 1 : kept]  # what fills it up knows no chance
        self.codes.entered_arithmetic = False  # type: ignore[attr-defined]
        torch.autograd.graph.increment_version(self)

    def _number(self, value: float | Tensor, dtype: torch.dtype) -> Tensor:
        """A number where the codes are, by a fill: a copy from the CPU would wait for the device."""
        if isinstance(value, Tensor):
            return value.to(self.device, dtype)
        return torch.full((), value, dtype=dtype, device=self.device)

    def _blocks(self) -> Iterator[slice]:
        """Rows, block by block, such that each block but the last is a whole number of groups.

        Of a weight that has sizes and no numbers, only the first: no other is larger.
        """
        rows, columns = self.shape
        unit = self.group_size // math.gcd(self.group_size, columns)
        step = unit * max(1, devices.at_a_time(BLOCK_ELEMENTS, self.codes) // (unit * columns))
        for start in range(0, rows if has_numbers(self.codes) else 1, step):
            yield slice(start, min(start + step, rows))

    def _stored(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The codes and scales of some rows."""
        columns, size = self.shape[1], self.group_size
        first, last = rows.start * columns // size, -(-rows.stop * columns // size)
        return self.codes[first * size : last * size], self.scale[first:last]

    def _decode(self, rows: slice) -> Tensor:
        codes, scale = self._stored(rows)
        shape = (rows.stop - rows.start, self.shape[1])
        return Codes(codes=codes, scale=scale, low=None, shape=shape, bits=8).decode()

    def _encode(self, rows: slice, numbers: Tensor) -> None:
        codes, scale = self._stored(rows)
        made = Codes.of(numbers, 8, self.group_size, symmetric=True)
        codes.copy_(made.codes)
        scale.copy_(made.scale)

    def take(self, source: Tensor) -> QuantizedWeight:
        """What `copy_` does: rounds other numbers to the nearest codes.

        Args:
            source: of a shape that can be expanded to this one, finite; codes of equal groups are taken as they are.

        Returns:
            Itself.

        Raises:
            ValueError: a number that is not finite, or numbers that codes cannot hold once the weight has been computed
                with: of an average, what is less than half a code would be lost each time. Nothing has changed then.
        """
        if isinstance(source, QuantizedWeight) and (source.shape, source.group_size) == (self.shape, self.group_size):
            self.codes.copy_(source.codes)
            self.scale.copy_(source.scale)
            return self
        source = (source.decode() if isinstance(source, QuantizedWeight) else source).expand(self.shape)
        if source.device.type != "meta" and source.numel() and not torch.stack(source.aminmax()).isfinite().all():
            raise ValueError(
                f"a weight of shape {tuple(source.shape)}, to be kept in INT8, holds numbers that are not finite; "
                "repair it, or leave it out of quantize_weights"
            )
        if getattr(self.codes, "entered_arithmetic", False) and not self._can_hold(source):
            raise ValueError(
                f"a weight of shape {tuple(self.shape)} that is kept in INT8 has been computed with, and would be set "
                "to numbers that its codes cannot hold: of an average, what is less than half a code would be lost "
                f"each time. {AVERAGES}. To load other weights, call dequantize_weights(model), load_state_dict and "
                "quantize_weights(model), and build the optimizer from the model then"
            )
        self.codes.entered_arithmetic = False  # type: ignore[attr-defined]
        for rows in self._blocks():
            self._encode(rows, source[rows].to(self.device))
        return self

    def _can_hold(self, source: Tensor) -> bool:
        """Whether numbers are those of some codes, but for what bfloat16 rounds off."""
        for rows in self._blocks():
            numbers = source[rows].to(self.device, torch.float32)
            held = Codes.of(numbers, 8, self.group_size, symmetric=True).decode()
            if not bool(((held - numbers).abs() <= 2**-8 * numbers.abs()).all()):
                return False
        return True

    def like(self, codes: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> QuantizedWeight:
        """One of the same shape and seed with other codes, and perhaps another dtype."""
        return QuantizedWeight(codes, scale, self.shape, dtype or self.dtype, self.seed)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({self.decode()!r}, group_size={self.group_size})"

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        if id(self) not in memo:
            copied = self._pickled(self.codes.clone(), self.scale.clone())
            memo[id(self)] = QuantizedWeight(*copied)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return QuantizedWeight, self._pickled(self.codes, self.scale)

    def _pickled(self, codes: Tensor, scale: Tensor) -> tuple[Any, ...]:
        is_parameter = getattr(self, "_is_param", False)
        return codes, scale, tuple(self.shape), self.dtype, self.seed, self.requires_grad, is_parameter

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        served = FUNCTIONS.get(func)
        if served is not None:
            return served(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        served = OPERATIONS.get(func)
        if served is not None and isinstance(args[0], cls):
            return served(func, *args, **kwargs)
        cls.refuse_unserved(func, args, kwargs)
        if getattr(func, "overloadpacket", None) in _ARITHMETIC:
            for one in tree_leaves((args, kwargs)):
                if isinstance(one, cls):
                    one.codes.entered_arithmetic = True  # type: ignore[attr-defined]
        made = func(*decoded(args), **decoded(kwargs))
        return of_copy(made) if func.is_view else made

    @property
    def _fsdp_orig_uid(self) -> int:
        """What `fully_shard` asks of each parameter that it takes over; it would keep a plain shard, unquantized."""
        raise ValueError(
            f"fully_shard cannot shard a weight of shape {tuple(self.shape)} that is kept in INT8: it would become a "
            "plain one, of two to four times the memory. Call dequantize_weights(model) first, or train with INT8 "
            "weights in one process or under DDP"
        )


def decoded(tree: Any) -> Any:
    """Arguments of any kind, with each quantized weight decoded."""
    return tree_map(lambda leaf: leaf.decode() if isinstance(leaf, QuantizedWeight) else leaf, tree)


torch.serialization.add_safe_globals([QuantizedWeight])
