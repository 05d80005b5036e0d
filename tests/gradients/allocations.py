"""What tensors a piece of code allocates, and which of them are alive later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from galore_torch import ProjectedGradient
from galore_torch.gradients.applied_gradient import AppliedGradient


class Allocations(TorchDispatchMode):
    """Notes each newly allocated tensor: how many numbers it holds, and whether its memory is still in use.

    Also what projected gradients allocate: they are looked into.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, StorageWeakRef]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(one, (ProjectedGradient, AppliedGradient)) for one in types):
            return NotImplemented  # they compute with plain tensors, which come by here
        leaves = tree_leaves((args, kwargs))
        given = {one.untyped_storage().data_ptr() for one in leaves if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given:
                self.made.append((one.numel(), StorageWeakRef(one.untyped_storage())))
        return result

    def alive(self) -> list[int]:
        """The sizes of those whose memory is in use."""
        return [numel for numel, storage in self.made if not storage.expired()]
