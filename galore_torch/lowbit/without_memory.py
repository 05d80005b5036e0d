"""`WithoutMemory`: a tensor that stores other tensors, and what asks for its own memory.

Torch looks for numbers where such a tensor has none: some of its methods, and libraries that take its memory, would end
the process. Those that read get a plain tensor, those that write are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from torch.utils._pytree import tree_leaves

_COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional")
"""Namespaces of operations between processes. Their schemas do not say what they write to."""


class WithoutMemory(Tensor):
    """A tensor of a shape and dtype whose numbers are in other tensors.

    Attributes:
        not_changed: what `refuse_unserved` says, after its name, of an operation that would change such a tensor.
        not_sent: what it says of one between processes.
    """

    not_changed: ClassVar[str]
    not_sent: ClassVar[str]

    @classmethod
    def refuse_unserved(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Lets an operation that only reads such a tensor pass.

        Args:
            func: what torch dispatches, for which the class has no answer of its own.
            args: its arguments.
            kwargs: its named ones.

        Raises:
            ValueError: it would write into one, or send it to other processes.
        """
        specs = func._schema.arguments
        given = [*zip(args, specs, strict=False), *((kwargs.get(spec.name), spec) for spec in specs[len(args) :])]
        written_to = [value for value, spec in given if spec.alias_info and spec.alias_info.is_write]
        if any(isinstance(tensor, cls) for tensor in tree_leaves(written_to)):
            raise ValueError(f"{func} {cls.not_changed}")
        if func.namespace in _COLLECTIVES:
            raise ValueError(f"{func} {cls.not_sent}")

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
