"""How many bytes tensors take, and an optimizer's state, and what of it is not in few bits though the rest is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from galore_torch.lowbit import Codes, QuantizedWeight
from galore_torch.messages import warn
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.rule import Traits
from galore_torch.units import first_of

PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
"""What keeps its data in itself; of a subclass it is not known."""


def stored_in(tensor: Any) -> list[Tensor]:
    """The plain tensors that a tensor keeps its data in; none for anything else.

    Args:
        tensor: of any kind: a weight or a gradient in few bits counts with its codes and scales, a projected gradient
            without its basis.
    """
    if isinstance(tensor, ProjectedGradient):
        return stored_in(tensor._stored)
    if isinstance(tensor, (Codes, QuantizedWeight)):
        return [part for part in (tensor.codes, tensor.scale, getattr(tensor, "low", None)) if part is not None]
    if hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, FakeTensor):
        return [part for name in tensor.__tensor_flatten__()[0] for part in stored_in(getattr(tensor, name))]
    return [tensor] if type(tensor) in PLAIN else []


def stored_bytes(tensors: Iterable[Any]) -> int:
    """The bytes of all distinct storages behind tensors.

    Args:
        tensors: of any kind; what is no tensor counts nothing.
    """
    storages = (part.untyped_storage() for one in tensors for part in stored_in(one))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


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
    return stored_bytes(tree_leaves(list(optimizer.state.values())))


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
    shown = first_of([name for name, _ in left])
    warn(
        f"{len(left)} of {len(quantizing)} tensors are too small for state in few bits, or no multiple of its blocks "
        f"({shown}): {numbers:,} of {total:,} numbers keep theirs in float32, {8 * numbers:,} bytes for two moments"
    )
