"""How many bytes an optimizer's state takes."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves


def state_bytes(optimizer: Optimizer) -> int:
    """The bytes of all distinct tensors in an optimizer's state, whatever the optimizer.

    A quantized tensor counts with what it stores: codes and scales. What several parameters share counts once.

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


def _stored(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor stores its data in."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in _stored(getattr(tensor, name))]
