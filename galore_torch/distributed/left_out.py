"""Which weights DDP leaves out, since their gradients are averaged in low rank."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_LEFT_OUT: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
"""The names of a model's weights that DDP, wrapped around it since, leaves out."""


class _OfThisModel(set[str]):
    """Names that a copy of the model does not take along: it is a plain model, of which DDP averages everything."""

    def __deepcopy__(self, memo: Any) -> set[str]:
        return set()

    def __reduce__(self) -> tuple[Any, ...]:
        return set, ()


def leave_out(model: nn.Module, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Has DDP leave weights out when it is wrapped around a model.

    Args:
        model: the model.
        weights: by name. DDP must have one at least: if these are all that is trained, the smallest stays with it.

    Returns:
        The weights that are left out.
    """
    ours = {id(weight): weight for weight in weights.values()}
    others = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in ours]
    if ours and not others:
        del ours[min(ours, key=lambda key: ours[key].numel())]
    names = {name for name, weight in model.named_parameters(remove_duplicate=False) if id(weight) in ours}
    if names:
        # DDP also looks for f"{module}.{name}", which begins with a dot for what is the root's own.
        told = _OfThisModel({*names, *(f".{name}" for name in names)})
        told |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, told)  # type: ignore[no-untyped-call]
    _LEFT_OUT[model] = _LEFT_OUT.get(model, set()) | names
    return list(ours.values())


def refuse_what_is_averaged_twice(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Checks that DDP can still be told what to leave out.

    Args:
        model: the model.
        weights: what it is to leave out.

    Raises:
        ValueError: the model is, or contains, DDP already.
    """
    if weights and any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel already, which then averages full gradients. Call "
            "attach(model, optimizer) first and DistributedDataParallel(model) after it, or use attach(..., gradients="
            '"full", update="step")'
        )


def require_left_out(model: nn.Module, wrapper: DistributedDataParallel, ours: Sequence[Tensor]) -> None:
    """Checks that DDP averages all weights but those that are averaged here.

    Args:
        model: an attached model, or one that was.
        wrapper: the DDP that runs it.
        ours: what is averaged here.

    Raises:
        ValueError: it averages one of them, or nobody averages another.
    """
    identities = {id(weight) for weight in ours}
    names = _LEFT_OUT.get(model, set())
    if model is wrapper.module:
        ignored = wrapper.parameters_to_ignore
        lost = [
            name
            for name, weight in model.named_parameters()
            if name in names and name in ignored and id(weight) not in identities and weight.requires_grad
        ]
        if lost:
            raise ValueError(
                f"DistributedDataParallel leaves {lost[0]} out, since attach(...) was to average its projected "
                "gradient and has been removed: the processes would drift apart. Wrap the model anew"
            )
    named = wrapper.module.named_parameters(remove_duplicate=False)
    twice = [name for name, weight in named if id(weight) in identities and name not in wrapper.parameters_to_ignore]
    if twice:
        raise ValueError(
            f"DistributedDataParallel averages the full gradient of {twice[0]}, and attach(...) its projected one. "
            "Attach the very model that is wrapped, before it is wrapped"
        )
