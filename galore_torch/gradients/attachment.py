"""`attach`: chooses how a model's gradients are formed, and when they are applied.

Two independent choices, made by hooks on the parameters and by replaced forwards of linear layers. The model's state
dict, its parameters and the optimizer's state are the same under all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from galore_torch.gradients.applied_gradient import AppliedGradient
from galore_torch.gradients.backward_updates import BackwardUpdates
from galore_torch.gradients.data_parallel import ATTACHMENT, Traffic, attachments, refuse_data_parallel
from galore_torch.gradients.hooks import discard_stale, project_when_complete
from galore_torch.gradients.linear import FusedLinear, fuse, is_linear
from galore_torch.gradients.other_optimizers import refuse_other_optimizers
from galore_torch.gradients.replaced_weights import refuse_replaced_weights
from galore_torch.gradients.shared_inputs import InputTracker
from galore_torch.messages import warn
from galore_torch.modes import (
    DEFAULT_GRADIENTS,
    DEFAULT_SAVE_INPUTS,
    DEFAULT_UPDATE,
    Gradients,
    SaveInputs,
    Update,
    check_modes,
)
from galore_torch.optim.galore import GaLore
from galore_torch.optim.groups import is_projected
from galore_torch.optim.kinds import require_galore
from galore_torch.optim.processes import JOIN, is_sharded
from galore_torch.units import first_of


class Attachment:
    """What `attach` returns: a context manager, and `remove()`.

    Attributes:
        gradients: how gradients are formed.
        update: when they are applied.
        formed_in_full: names of projected weights whose layer is not an `nn.Linear`, so that "fused" forms their full
            gradient and projects it at once.
    """

    def __init__(self, gradients: Gradients, update: Update) -> None:
        self.gradients = gradients
        self.update = update
        self.formed_in_full: list[str] = []
        self._undo: list[Callable[[], Any]] = []

    def remove(self) -> None:
        """Takes everything off the model again. Gradients that wait for `step()` stay, projected or full."""
        while self._undo:
            self._undo.pop()()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model is not attached."""
        return type(None), ()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def attach(
    model: nn.Module,
    optimizer: GaLore,
    gradients: Gradients | None = None,
    update: Update = DEFAULT_UPDATE,
    *,
    grad_dtype: torch.dtype | None = None,
    grad_bits: int = 16,
    save_inputs: SaveInputs = DEFAULT_SAVE_INPUTS,
    average_every: int = 1,
) -> Attachment:
    """Chooses how the gradients of a model are formed and when they are applied.

    Call it after the model is where it will be trained (moved, sharded, prepared). Weights that are used outside their
    layer too (tied ones, say) train as exactly as the others: what autograd forms in full is projected and added. A
    copied or pickled model is a plain one.

    Args:
        model: the model.
        optimizer: a GaLore optimizer that holds its parameters.
        gradients: `full`: as autograd makes them. `projected`: each is projected the moment it is complete, and freed;
            projected gradients accumulate over micro-batches. `fused`: linear layers compute the projected gradient in
            their own backward, also for torch.autograd.grad; the full one is formed only where a basis is renewed. The
            first basis of a weight is found from the first micro-batch, layer by layer. None: "full" where the
            optimizer keeps a residual, which needs it, else "fused".
        update: `step`: `optimizer.step()` applies them. `backward`: each weight is updated the moment its gradient is
            complete, and the gradient is gone; `step()` then only closes the step. No accumulation, clipping or loss
            scaling then.
        grad_dtype: in which projected gradients accumulate over micro-batches, for example torch.float32; the
            gradient's own when None.
        grad_bits: 8 or 4 to keep the projected gradients that wait for `step()` in codes, with a range for each 256
            numbers; each micro-batch is then added to what the codes stand for, and rounded again.
        save_inputs: what fused layers keep of an input X (tokens x n) for the weight's gradient, between renewals.
            `projected`: X Q (tokens x r) where a basis Q is on the input side, which loses nothing, unless all layers
            that share the input would then keep more than X. `sampled`: the others too keep less, every fourth token
            from a random one on; their gradient is an unbiased estimate, of more variance. (With `proj_type="right"`
            every layer has its basis on the input side.) `full`: X, so that gradients can be differentiated again.
        average_every: under DDP over a slow link, steps that each process moves projected weights by its own gradients
            before they and their moments are averaged, in the subspace; 1 averages gradients, exactly as one process.

    Returns:
        A handle with `remove()`, which is also a context manager.

    Raises:
        ValueError: an unknown choice or one that excludes the other, a model that is attached already, or an optimizer
            that does not hold the model's parameters.

    Example:
        >>> from galore_torch import GaLoreAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        >>> optimizer = GaLoreAdamW(param_groups(model, rank=4, target_modules="all-linear"))
        >>> with attach(model, optimizer, gradients="fused"):
        ...     for _ in range(2):
        ...         model(torch.randn(8, 32)).sum().backward()
        ...     type(model[0].weight.grad).__name__
        'ProjectedGradient'
    """
    _check(model, optimizer)
    gradients = gradients or ("full" if any(map(_keeps_residual, optimizer.param_groups)) else DEFAULT_GRADIENTS)
    check_modes(
        gradients,
        update,
        grad_dtype=grad_dtype,
        grad_bits=grad_bits,
        save_inputs=save_inputs,
        average_every=average_every,
    )
    projected = _projected_weights(model, optimizer)
    if gradients != "full":
        _refuse_residuals(optimizer, f"gradients={gradients!r}")
    if grad_bits != 16 and any(map(is_sharded, projected.values())):
        raise ValueError(f"grad_bits is {grad_bits}, and the model is sharded (fully_shard); use 16, or grad_dtype")
    if update == "backward" and not all(
        optimizer._trained_weight(weight).traits.many_calls for weight in projected.values()
    ):
        raise ValueError(
            "update='backward' moves one weight at a time, and the optimizer inside must move all in one call; use "
            "update='step'"
        )
    attachment = Attachment(gradients, update)
    early = {} if gradients == "full" and update == "step" else projected
    joined = (join(model, optimizer, early, grad_dtype, update == "backward", average_every) for join in JOIN)
    traffic: Traffic | None = next(filter(None, joined), None)
    if traffic is not None:
        attachment._undo.append(traffic.remove)
        _refuse_residuals(optimizer, "update='backward' under DistributedDataParallel")
        projected = {name: weight for name, weight in projected.items() if traffic.takes(weight)}
    elif early:
        attachment._undo.append(refuse_data_parallel(model).remove)
    formed = f"gradients={gradients!r}, update={update!r}"
    attachment._undo.append(refuse_other_optimizers(optimizer, early.values(), formed))
    attachment._undo.append(refuse_replaced_weights(model, optimizer).remove)
    if gradients == "fused":
        _fuse_linears(model, optimizer, projected, attachment, save_inputs)
    if update == "backward":
        _apply_in_backward(model, optimizer, attachment, projected, traffic)
    elif gradients != "full":
        form = project_when_complete(optimizer, grad_dtype, grad_bits)
        hook = form if traffic is None else traffic.completes(form, None)
        for weight in projected.values():
            _hook(attachment, weight, hook)
            room = discard_stale(optimizer, weight)
            arrival = weight.register_hook(room if traffic is None else traffic.arrives(room))  # type: ignore[no-untyped-call]
            attachment._undo.append(arrival.remove)
    _mark(model, attachment)
    return attachment


def detach(model: nn.Module) -> None:
    """Takes off a model what `attach` has put on it, or on what it is a part of: `remove()` of all their handles.

    For those who have no handle: it was not kept, or a trainer has it. Gradients that wait for `step()` stay.

    Args:
        model: the model; one that is not attached stays as it is.

    Example:
        >>> from galore_torch import GaLoreAdamW, attach, param_groups
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        >>> for _ in range(2):  # as a cell of a notebook is run again
        ...     optimizer = GaLoreAdamW(param_groups(model, rank=4, target_modules="all-linear"))
        ...     detach(model)
        ...     handle = attach(model, optimizer)
    """
    for attachment in attachments(model):
        attachment.remove()


def _mark(model: nn.Module, attachment: Attachment) -> None:
    for module in model.modules():
        module.__dict__[ATTACHMENT] = attachment
        attachment._undo.append(functools.partial(module.__dict__.pop, ATTACHMENT, None))


def _keeps_residual(group: dict[str, Any]) -> bool:
    return is_projected(group) and group["residual"] is not None


def _refuse_residuals(optimizer: GaLore, because: str) -> None:
    for group in optimizer.param_groups:
        if _keeps_residual(group):
            raise ValueError(
                f"residual is {group['residual']!r}, which needs the full gradient, and {because} keeps projected ones "
                'alone; use gradients="full" with update="step" or, in one process, "backward", or residual=None'
            )


def _check(model: nn.Module, optimizer: GaLore) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; pass the nn.Module whose parameters the optimizer holds")
    require_galore(optimizer)
    if attachments(model):
        raise ValueError(
            "the model is attached already; call galore_torch.detach(model), or remove() on the handle that attach() "
            "returned"
        )


def _projected_weights(model: nn.Module, optimizer: GaLore) -> dict[str, Tensor]:
    held = {id(weight): is_projected(group) for group in optimizer.param_groups for weight in group["params"]}
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    strangers = [name for name, weight in trainable.items() if id(weight) not in held]
    if strangers:
        raise ValueError(
            f"the optimizer does not hold {len(strangers)} of the model's {len(trainable)} trainable parameters "
            f"({first_of(strangers)}). Build it from this model, after quantize_weights if that is called, and attach "
            "after the model has been moved, sharded or prepared"
        )
    return {name: weight for name, weight in trainable.items() if held[id(weight)]}


def _fuse_linears(
    model: nn.Module,
    optimizer: GaLore,
    projected: dict[str, Tensor],
    attachment: Attachment,
    save_inputs: SaveInputs,
) -> None:
    names = {id(weight): name for name, weight in projected.items()}
    tracker, fused = InputTracker(optimizer), set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if id(weight) not in names or not is_linear(module):
            continue
        attachment._undo.append(fuse(module, FusedLinear(module, optimizer, tracker, save_inputs)))
        fused.add(id(weight))
    attachment.formed_in_full = left = [name for key, name in names.items() if key not in fused]
    if left:
        warn(
            f"{len(left)} projected weights are not of an nn.Linear with its own forward ({first_of(left)}): their "
            "full gradient is formed and projected at once"
        )


def _hook(attachment: Attachment, weight: Tensor, hook: Callable[[Tensor], None]) -> None:
    handle = weight.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    attachment._undo.append(handle.remove)


def _apply_in_backward(
    model: nn.Module,
    optimizer: GaLore,
    attachment: Attachment,
    projected: dict[str, Tensor],
    traffic: Traffic | None,
) -> None:
    updates = BackwardUpdates(optimizer)
    apply: Callable[[Tensor], None] = updates.take
    of_projected = of_others = apply
    if traffic is not None:
        of_projected = traffic.completes(project_when_complete(optimizer, None), apply)
        of_others = traffic.leaves(apply)
    identities = {id(weight) for weight in projected.values()}
    for weight in model.parameters():
        if weight.requires_grad:
            _hook(attachment, weight, of_projected if id(weight) in identities else of_others)

    def free() -> None:
        """The gradients that were applied are gone; `step()` finds nothing left to do."""
        updates.close()
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if isinstance(weight.grad, AppliedGradient):
                    weight.grad = None

    def close(_: GaLore, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        free()
        # A closure runs the backward, and with it the whole step, inside step().
        freed = [_then(free, one) if callable(one) else one for one in args[1:]]
        return (*args[:1], *freed), {key: _then(free, one) if callable(one) else one for key, one in kwargs.items()}

    attachment._undo += [optimizer.register_step_pre_hook(close).remove, free]


def _then(after: Callable[[], None], closure: Callable[[], Any]) -> Callable[[], Any]:
    def both() -> Any:
        result = closure()
        after()
        return result

    return both
