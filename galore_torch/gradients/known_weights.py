"""`KnownWeights`: what hooks know of the weights whose gradients they get, asked for at little cost.

Whatever a user may have changed since the last step is looked for when the first gradient of a backward pass comes, in
all weights together. For the others of that pass it is a look into a table.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from galore_torch.optim.chunks import most_together
from galore_torch.optim.galore import GaLore
from galore_torch.optim.trained_weight import TrainedWeight

current_backward = torch._C._current_graph_task_id
"""The number of the backward pass that is running, -1 outside one: the engine's own answer, which torch.autograd.graph
asks for as well."""


class KnownWeights:
    """What is known of an optimizer's weights in the backward pass that is running.

    The garbage collector does not see into hooks, so the optimizer is held weakly.

    Args:
        optimizer: holds the weights.
    """

    def __init__(self, optimizer: GaLore) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._checked_in = -1

    @property
    def optimizer(self) -> GaLore | None:
        """The optimizer; None if it is gone."""
        return self._optimizer()

    def most_together(self, weight: Tensor) -> int:
        """How many coordinates may exist at a time, on the device of a weight."""
        optimizer = self._optimizer()
        return 0 if optimizer is None else most_together(optimizer._cache.coordinates, weight)

    def in_backward(self, weight: Tensor) -> TrainedWeight | None:
        """One weight as the next step will see it.

        Args:
            weight: one of the optimizer's.

        Returns:
            None if the optimizer is gone.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            return None
        backward = current_backward()
        if backward != self._checked_in or backward < 0:
            optimizer._checked_weights()
            self._checked_in = backward
        return optimizer._known_weight(weight)
