"""What torch's operations do with a `QuantizedWeight` where decoding it would be wasteful or wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galore_torch.lowbit.weights import FUNCTIONS, OPERATIONS, QuantizedWeight, decoded

aten = torch.ops.aten

# Operations that need no decoded copy, or must not return a plain tensor ---------------------------------------------


def _share(_: Any, weight: QuantizedWeight) -> QuantizedWeight:
    return weight.like(weight.codes, weight.scale)


def _clone(_: Any, weight: QuantizedWeight, **__: Any) -> QuantizedWeight:
    return weight.like(weight.codes.clone(), weight.scale.clone())


def _copy_in(_: Any, weight: QuantizedWeight, source: Tensor, *__: Any) -> QuantizedWeight:
    return weight.take(source)


def _to_copy(func: Any, weight: QuantizedWeight, **kwargs: Any) -> Tensor:
    """To another device or dtype; codes stay codes, unless it is an integer dtype."""
    dtype = kwargs.pop("dtype", None) or weight.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        made: Tensor = func(weight.decode(), dtype=dtype, **kwargs)
        return made
    placed = {name: value for name, value in kwargs.items() if name in ("device", "non_blocking")}
    return weight.like(func(weight.codes, **placed), func(weight.scale, **placed), dtype)


def _made_like(func: Any, weight: QuantizedWeight, *args: Any, **kwargs: Any) -> Any:
    """A new tensor that takes shape, dtype and device from the weight, and none of its numbers."""
    stand_in = weight.codes.new_empty((), dtype=weight.dtype).expand(weight.shape)
    if kwargs.get("memory_format") in (None, torch.preserve_format) and "_like" in func._schema.name:
        kwargs["memory_format"] = torch.contiguous_format
    return func(stand_in, *args, **kwargs)


OPERATIONS |= {
    aten.detach.default: _share,
    aten.alias.default: _share,
    aten.clone.default: _clone,
    aten.copy_.default: _copy_in,
    aten._to_copy.default: _to_copy,
    **dict.fromkeys(
        (
            aten.empty_like.default,
            aten.zeros_like.default,
            aten.ones_like.default,
            aten.full_like.default,
            aten.rand_like.default,
            aten.randn_like.default,
            aten.new_empty.default,
            aten.new_zeros.default,
            aten.new_ones.default,
            aten.new_full.default,
        ),
        _made_like,
    ),
}


# Functions and methods that act on memory ---------------------------------------------------------------------------


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, weight: QuantizedWeight) -> Tensor:
        return weight.decode()

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return grad


def _contiguous(weight: QuantizedWeight, **_: Any) -> Tensor:
    """What asks for contiguous memory is about to read it, as those do who write a weight to a file."""
    plain: Tensor = _Decode.apply(weight)  # type: ignore[no-untyped-call]
    return plain


def _set_data(weight: Tensor, source: Tensor) -> None:
    """`weight.data = source`: what moving a module to another device or dtype does to its parameters."""
    if not (isinstance(source, QuantizedWeight) and isinstance(weight, QuantizedWeight)):
        raise ValueError("a plain tensor cannot be the data of a weight in INT8, nor the reverse; use copy_ to set it")
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.data.__set__(weight, source)  # type: ignore[attr-defined]
    weight.codes, weight.scale = source.codes, source.scale


def _refuse_memory(weight: QuantizedWeight) -> int:
    raise ValueError(
        f"a weight of shape {tuple(weight.shape)} is kept in INT8 and has no memory of {weight.dtype}; take its "
        ".contiguous(), or call dequantize_weights(model) first"
    )


def _set_item(target: Tensor, place: Any, value: Tensor) -> None:
    if isinstance(target, QuantizedWeight):
        raise ValueError("a weight in INT8 cannot be set in parts; use copy_, or call dequantize_weights(model) first")
    target[decoded(place)] = decoded(value)


FUNCTIONS |= {
    Tensor.contiguous: _contiguous,
    Tensor.is_shared: lambda weight: weight.codes.is_shared(),
    Tensor.untyped_storage: lambda weight: weight.codes.untyped_storage(),  # recognizes tied weights, and counts bytes
    Tensor.data_ptr: _refuse_memory,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.__setitem__: _set_item,
}
