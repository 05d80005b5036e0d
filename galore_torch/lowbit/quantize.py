"""`quantize_weights`: a model's linear weights in INT8, to be trained so, and back.

The codes are trained themselves: there is no copy of the weights in more bits (Q-GaLore, arXiv 2407.08296).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from galore_torch.lowbit.codes import check_bits
from galore_torch.lowbit.weights import QuantizedWeight
from galore_torch.modules import Targets, find_targets, owned
from galore_torch.values import is_whole, plain


def quantize_weights(
    model: nn.Module,
    target_modules: Targets = None,
    *,
    group_size: int = 256,
    stochastic_rounding: bool = True,
    seed: int = 0,
) -> list[str]:
    """Keeps the weights of a model's linear layers in INT8 from now on: one byte a number, and a scale for each group.

    Call it before the optimizer is made: every such weight is a new parameter. GaLore's optimizers train it, projected
    or not; layers decode it when they run, and keep nothing decoded. Gradients, biases and all other parameters stay as
    they are. Checkpoints of plain weights can be loaded into such a model, and what `save_pretrained` writes is a plain
    model that loses nothing by it.

    Args:
        model: the model; changed in place, one weight at a time.
        target_modules: which modules, as in `param_groups`; frozen weights too. `nn.Linear` alone is supported.
        group_size: numbers that share a scale, in the weight's own order; even. No weight's size must be a multiple.
        stochastic_rounding: round updates up or down at random, so that they are right on average. Without it what
            is less than half a code is lost.
        seed: of the random numbers, which depend on it, on the weight's place among those that are quantized and on the
            number of its step alone: nothing of it needs to be saved.

    Returns:
        The names of the weights.

    Raises:
        ValueError: no layer matches, or one that is not supported. The model is unchanged then.

    Example:
        >>> model = nn.ModuleDict({"mlp": nn.Linear(32, 64), "head": nn.Linear(64, 8)})
        >>> quantize_weights(model)
        ['mlp.weight']
        >>> model["mlp"].weight.codes.dtype, model["mlp"].weight.dtype
        (torch.uint8, torch.float32)
    """
    group_size, seed = plain(group_size), plain(seed)
    check_bits(8, group_size)
    if not is_whole(seed, -(2**63)):
        raise ValueError(f"seed is {seed!r}; use a whole number")
    if not isinstance(stochastic_rounding, bool):
        raise ValueError(f"stochastic_rounding is {stochastic_rounding!r}; use True or False")
    targets = find_targets(model, target_modules, _is_quantizable, "quantized")
    for name, weight in targets.items():
        _check(name, weight)
    seeds = {name: seed * 1_000_003 + place if stochastic_rounding else None for place, name in enumerate(targets)}

    def quantized(name: str, weight: Tensor) -> Tensor:
        return QuantizedWeight.of(weight, group_size, seeds[name])

    return _replace(model, targets, quantized, "quantize_weights")


def dequantize_weights(model: nn.Module) -> list[str]:
    """Turns all INT8 weights of a model into plain ones of their dtype again, one at a time.

    Like `quantize_weights` it makes new parameters. A model without INT8 weights stays as it is.

    Args:
        model: the model; changed in place.

    Returns:
        The names of the weights.
    """
    named = model.named_parameters()
    targets: dict[str, Tensor] = {name: one for name, one in named if isinstance(one, QuantizedWeight)}
    return _replace(model, targets, lambda _, weight: weight.contiguous().detach(), "dequantize_weights")


def _is_quantizable(module: nn.Module, attribute: str, weight: Tensor) -> bool:
    return isinstance(module, nn.Linear) and attribute == "weight" and weight.is_floating_point()


def _check(name: str, weight: Tensor) -> None:
    if isinstance(weight, QuantizedWeight):
        raise ValueError(f"{name} is kept in INT8 already; leave it out of target_modules, or dequantize_weights first")
    if weight.grad is not None:
        raise ValueError(f"{name} has a gradient, which would be lost; make the step and call zero_grad() first")
    if weight.element_size() < 2:
        raise ValueError(f"{name} is {weight.dtype}; only weights of 16 bits or more can be quantized")
    if weight.device.type != "meta" and weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite; repair it, or leave it out of target_modules")


def _replace(
    model: nn.Module, targets: dict[str, Tensor], made_of: Callable[[str, Tensor], Tensor], by: str
) -> list[str]:
    """Puts new parameters in the place of others, in all modules that share them; never two copies of all of them."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, module, attribute, weight in owned(model):
        owners.setdefault(id(weight), []).append((module, attribute))
    del weight
    names = list(targets)
    for name in names:
        old = targets.pop(name)
        new = nn.Parameter(made_of(name, old), requires_grad=old.requires_grad)
        for module, attribute in owners[id(old)]:
            setattr(module, attribute, new)
        old._replaced_by = f"{by}, as {name}"  # type: ignore[attr-defined]
    return names
