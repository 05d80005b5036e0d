"""How many bytes an optimizer's state takes, and what of it is not in few bits though the rest is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from galore_torch.messages import warn
from galore_torch.optim.rule import Traits


def state_bytes(optimizer: Optimizer) -> int:
    """The bytes of all distinct tensors in an optimizer's state, whatever the optimizer.

    A quantized tensor counts with what it stores: codes and scales; a sharded one with what is in this process. What
    several parameters share counts once.

    Args:
        optimizer: any torch optimizer.

    Returns:
        Bytes, in memory as held by the storages: a view that keeps a larger tensor alive counts with all of it.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(8, 4))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> state_bytes(optimizer)
        128
    """
    storages: dict[int, int] = {}
    for leaf in tree_leaves(list(optimizer.state.values())):
        for tensor in _stored(leaf) if isinstance(leaf, Tensor) else ():
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def report_unquantized(tensors: Sequence[tuple[str, int, Traits]]) -> None:
    """Warns once of tensors that are too small for the few bits in which an optimizer keeps its state.

    Args:
        tensors: the name of each weight, how many numbers the rule moves for it, and the rule's traits.
    """
    quantizing = [
        (name, size, traits.holds_in_few_bits(size)) for name, size, traits in tensors if traits.holds_in_few_bits
    ]
    left = [(name, size) for name, size, is_held in quantizing if not is_held]
    if not left:
        return
    numbers, total = sum(size for _, size in left), sum(size for _, size, _ in quantizing)
    shown = ", ".join(name for name, _ in left[:3]) + (", ..." if len(left) > 3 else "")
    warn(
        f"{len(left)} of {len(quantizing)} tensors are too small for state in few bits, or no multiple of its blocks "
        f"({shown}): {numbers:,} of {total:,} numbers keep theirs in float32, {8 * numbers:,} bytes for two moments"
    )


def _stored(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor stores its data in."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    parts = [getattr(tensor, name) for name in names]  # a DTensor names its mesh, too
    return [plain for part in parts if isinstance(part, Tensor) for plain in _stored(part)]
