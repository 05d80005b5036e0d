"""`WithoutMemory`: a tensor that stores other tensors, and what asks for its own memory.

Torch looks for numbers where such a tensor has none: some of its methods, and libraries that take its memory, would end
the process. Those that read get a plain tensor, those that write are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class WithoutMemory(Tensor):
    """A tensor of a shape and dtype whose numbers are in other tensors."""

    def to_full(self) -> Tensor:
        """The numbers that this stands for, in a tensor of their own. No gradient flows through it."""
        raise NotImplementedError

    def numpy(self, *, force: bool = False) -> Any:
        """A copy of the numbers.

        Args:
            force: from another device, too.
        """
        return self.to_full().numpy(force=force)

    def tolist(self) -> Any:
        """The numbers as Python's."""
        return self.to_full().tolist()

    def __array__(self, dtype: Any = None) -> Any:
        """What numpy.asarray takes."""
        return self.to_full().__array__(dtype)  # type: ignore[no-untyped-call]

    def __dlpack__(self, **arguments: Any) -> Any:
        """A copy of the numbers, for other libraries."""
        return self.to_full().__dlpack__(**arguments)

    def apply_(self, function: Callable[[Any], Any]) -> Tensor:
        """Raises an error: it would write where there is nothing."""
        raise ValueError(
            f"apply_({function!r}) cannot change a {type(self).__name__} of shape {tuple(self.shape)} in place; act on "
            "a plain copy of it, .to_full()"
        )

    def share_memory_(self) -> Tensor:
        """Raises an error where there is nothing to be shared for longer than a step."""
        raise ValueError(
            f"a {type(self).__name__} of shape {tuple(self.shape)} cannot be put into shared memory; call zero_grad() "
            "before share_memory()"
        )
