"""What is checked of a gradient before a step acts on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from galore_torch.messages import warn
from galore_torch.optim.processes import is_sharded
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.residual import residual_of
from galore_torch.optim.state_keys import BASIS
from galore_torch.optim.trained_weight import TrainedWeight


class StepsWithoutGradients:
    """Warns of steps that change nothing, one after another: torch's optimizers make them in silence."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def note(self, trained: Sequence[TrainedWeight]) -> None:
        """Notes which weights have a gradient, now or earlier in this step."""
        if trained:
            self._in_a_row = -1

    def close_step(self, held: Sequence[TrainedWeight]) -> None:
        """Ends a step of an optimizer that holds these weights."""
        self._in_a_row += 1
        trainable = sum(one.weight.requires_grad for one in held) if self._in_a_row == 2 else 0
        if trainable:  # one such step alone sets up states and schedules
            warn(
                f"two steps have found no gradient on any of {trainable:,} parameters, and changed nothing. Does the "
                "model hold other ones by now? load_state_dict(assign=True), to_empty and fully_shard put new ones in "
                "their place: build the optimizer after them"
            )


def check_gradients(trained: Sequence[TrainedWeight]) -> None:
    """Checks that the gradients of weights are of a supported kind, before anything acts on one of them.

    Args:
        trained: the weights, with gradients.

    Raises:
        ValueError: one is sparse or complex, or projected where the residual is wanted; the message names the weight.
    """
    kinds = {(type(grad), grad.layout, grad.dtype) for grad in [one.weight.grad for one in trained] if grad is not None}
    if all(kind is Tensor and layout is torch.strided and not dtype.is_complex for kind, layout, dtype in kinds):
        return
    for one in trained:
        _check(one, one.grad)


def _check(trained: TrainedWeight, grad: Tensor) -> None:
    name = trained.name
    if isinstance(grad, ProjectedGradient):
        kind = residual_of(trained)
        if kind is None:
            return
        raise ValueError(
            f"residual is {kind!r} and the gradient of {name} has been projected: what lay outside the subspace is "
            'gone. Use attach(..., gradients="full"), or residual=None'
        )
    if grad.layout is not torch.strided:
        raise ValueError(f"the gradient of {name} is sparse; use dense gradients (sparse=False in embeddings)")
    if grad.is_complex():
        raise ValueError(f"the gradient of {name} is complex; GaLore trains real weights")


def report_waiting(trained: Sequence[TrainedWeight]) -> None:
    """Warns of gradients that wait for `step()` projected by other bases than the weights have now.

    Args:
        trained: the weights, after a checkpoint was loaded.
    """
    lost = [
        one.name
        for one in trained
        if isinstance(grad := one.weight.grad, ProjectedGradient)
        and not is_sharded(one.weight)
        and BASIS in one.state
        and not grad.is_in(one.basis)
    ]
    if lost:
        warn(
            f"gradients of {len(lost)} weights ({lost[0]} first) wait for step(), projected by other bases than those "
            "that were loaded: what these do not share is lost. Call zero_grad() before load_state_dict"
        )
