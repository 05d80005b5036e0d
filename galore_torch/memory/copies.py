"""Copies of models that take no memory: of all of a model, or of a few of its repeated blocks."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from galore_torch.lowbit import QuantizedWeight
from galore_torch.modules import block_names


def copy_without_numbers(
    model: nn.Module, device: torch.device, blocks: int | None = None, mode: FakeTensorMode | None = None
) -> nn.Module:
    """A copy of a model whose tensors have shapes and dtypes, but no numbers.

    Args:
        model: on any device, "meta" too. It is not changed.
        device: "meta", or where the tensors of `mode` seem to be.
        blocks: how many of the model's `alike_blocks` the copy has, from the first on; all if None.
        mode: that the tensors belong to.

    Returns:
        The copy. Weights that are tied are tied in it.
    """
    kept = alike_blocks(model)[:blocks] if blocks is not None else []
    memo: dict[int, Any] = {}
    if kept:
        holder = _holder(model)
        memo[id(holder)] = short = nn.ModuleList()
    with mode or nullcontext():
        for tensor in [*model.parameters(), *model.buffers()]:
            memo[id(tensor)] = _fake(tensor, device)
        if kept:
            short.extend(copy.deepcopy(block, memo) for block in kept)
        return copy.deepcopy(model, memo)


def _fake(tensor: Tensor, device: torch.device) -> Tensor:
    if isinstance(tensor, QuantizedWeight):
        made: Tensor = tensor.like(_fake(tensor.codes, device), _fake(tensor.scale, device))
    else:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def alike_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, if they stand in one list and are all alike; else none.

    Args:
        model: a model.
    """
    names = block_names(model)
    holders = {name.rpartition(".")[0] for name in names}
    if len(holders) != 1 or not isinstance(_holder(model), nn.ModuleList):
        return []
    blocks = [model.get_submodule(name) for name in names]
    return blocks if len({_signature(block) for block in blocks}) == 1 else []


def _holder(model: nn.Module) -> nn.Module:
    return model.get_submodule(block_names(model)[0].rpartition(".")[0])


def _signature(block: nn.Module) -> tuple[Any, ...]:
    tensors = [*block.named_parameters(), *block.named_buffers()]
    kinds = tuple((name, type(module)) for name, module in block.named_modules())
    return kinds, tuple((name, one.shape, one.dtype, one.requires_grad) for name, one in tensors)
