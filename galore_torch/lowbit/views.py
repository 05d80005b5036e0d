"""`DecodedView`: a view of a decoded copy, which can be read.

Indexing, transposing or reshaping a weight in INT8 gives a view of numbers that were decoded for it alone: what is
written there would be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_HARMLESS = {"requires_grad_", "detach_", "share_memory_"}


class DecodedView(Tensor):
    """A plain tensor whose numbers are a view of a copy; writing to it raises an error."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if _writes(name):
            _refuse(name, args[0] if args else kwargs)
        _refuse(name, kwargs.get("out"))
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **kwargs)
            return made.as_subclass(cls) if name == "detach" else _still_a_view(made)

    def _plain(self) -> Tensor:
        """The same as a plain tensor, or parameter where somebody has made one of it."""
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.as_subclass(Tensor)
            return nn.Parameter(plain.detach(), self.requires_grad) if _is_parameter(self) else plain

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._plain().__deepcopy__(memo)  # type: ignore[no-any-return, no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def of_copy(made: Any) -> Any:
    """What an operation has made of a decoded copy, such that its views refuse to be written to.

    Args:
        made: a tensor, or several.
    """
    return tree_map(lambda one: one.as_subclass(DecodedView) if isinstance(one, Tensor) else one, made)


def _is_parameter(tensor: Tensor) -> bool:
    return getattr(tensor, "_is_param", False)


def _still_a_view(made: Any) -> Any:
    if type(made) in (tuple, list):
        return type(made)(map(_still_a_view, made))
    return made.as_subclass(DecodedView) if type(made) is Tensor and made._is_view() else made


def _writes(name: str) -> bool:
    """Whether a function or method of torch changes its first argument, by its name."""
    in_place = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    return in_place or name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__invert__"))


def _refuse(name: str, written: Any) -> None:
    for one in tree_leaves(written):
        if isinstance(one, DecodedView) and not _is_parameter(one):
            raise ValueError(
                f"{name} would change a part of a weight that is kept in INT8, of which this is a decoded copy; set "
                "all of it by copy_, or call dequantize_weights(model) first"
            )
