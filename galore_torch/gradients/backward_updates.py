"""`BackwardUpdates`: applies gradients inside the backward pass, as many weights at a time as are stepped together.

A gradient is projected the moment it is complete, and waits in that small form until there are so many coordinates as
`step()` moves at a time, or until the backward pass ends. So a weight costs the host what it costs in `step()`. One
that is due to renew its basis is updated at once: it needs its full gradient, of which there is one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from galore_torch.gradients.applied_gradient import AppliedGradient
from galore_torch.gradients.hooks import project_early
from galore_torch.gradients.known_weights import KnownWeights
from galore_torch.gradients.updated_weights import UpdatedWeights
from galore_torch.optim.galore import GaLore
from galore_torch.optim.processes import is_sharded
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.trained_weight import TrainedWeight


class BackwardUpdates:
    """The gradients of a backward pass that wait to be applied, and the weights that have moved since `step()`.

    Args:
        optimizer: holds the weights.
    """

    def __init__(self, optimizer: GaLore) -> None:
        self._known = KnownWeights(optimizer)
        self._moved = UpdatedWeights(self._apply_waiting)
        self._waiting: dict[int, tuple[TrainedWeight, Tensor | None]] = {}
        self._coordinates = 0

    def take(self, weight: Tensor) -> None:
        """A hook on a complete gradient: makes the weight's step at once, or with those of the next gradients.

        Args:
            weight: with its gradient.

        Raises:
            ValueError: the gradient is to be differentiated, or its weight has moved already.
            RuntimeError: a step failed; the error names the weight.
        """
        grad = weight.grad
        if grad is not None and grad.requires_grad:
            raise ValueError(
                "update='backward' moves weights inside the backward pass, so that it cannot be differentiated twice "
                "(create_graph=True); use attach(..., update='step')"
            )
        self._moved.expect()
        trained = self._known.in_backward(weight)
        if trained is None or grad is None:
            return
        norm = None
        if trained.projection.modes and not isinstance(grad, ProjectedGradient):
            norm = torch.linalg.vector_norm(trained.grad)
            needs_full = trained.needs_renewal or trained.group["residual"] is not None
            if needs_full or is_sharded(weight):  # what of a shard comes in full is to be renewed from
                self._apply_waiting()
                self._apply([(trained, norm)])
                return
            with _naming([trained]), torch.no_grad():
                weight.grad = project_early(trained, trained.grad)
        self._waiting[id(weight)] = trained, norm
        self._coordinates += trained.coordinate_count
        if self._coordinates >= self._known.most_together(weight):
            self._apply_waiting()

    def _apply_waiting(self) -> None:
        waiting = sorted(self._waiting.values(), key=lambda one: one[0].place)  # neighbours' counters are, too
        self._waiting, self._coordinates = {}, 0
        self._apply([(one, norm) for one, norm in waiting if not isinstance(one.weight.grad, AppliedGradient | None)])

    def _apply(self, waiting: Sequence[tuple[TrainedWeight, Tensor | None]]) -> None:
        optimizer = self._known.optimizer
        if optimizer is None or not waiting:
            return
        trained = [one for one, _ in waiting]
        with _naming(trained), torch.no_grad():
            norms = iter(_norms([one.grad for one, norm in waiting if norm is None]))
            optimizer._apply(trained)
        for one, norm in waiting:
            one.weight.grad = AppliedGradient(one.weight, one.name, next(norms) if norm is None else norm)
            self._moved.add(one.weight, one.name)

    def close(self) -> None:
        """Ends the step: all may move again. What still waits, of a backward that ended in an error, is left alone."""
        self._waiting, self._coordinates = {}, 0
        self._moved.close()


def _norms(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """The Euclidean norm of each gradient."""
    plain = [grad.projected if isinstance(grad, ProjectedGradient) else grad for grad in grads]
    return torch._foreach_norm(plain) if plain else ()


@contextmanager
def _naming(trained: Sequence[TrainedWeight]) -> Iterator[None]:
    """Lets an error name the weights in whose updates it came."""
    try:
        yield
    except Exception as error:
        names = trained[0].name + (f" or {len(trained) - 1} others" if len(trained) > 1 else "")
        raise RuntimeError(
            f"updating {names} inside the backward pass failed: {error}. Weights whose backward came before have been "
            "updated, of these perhaps some, and none after them"
        ) from error
