"""What is checked of a gradient before a step acts on it."""

from __future__ import annotations

import torch

from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.residual import residual_of
from galore_torch.optim.trained_weight import TrainedWeight


def check_gradient(trained: TrainedWeight) -> None:
    """Checks that a weight's gradient is of a supported kind.

    Args:
        trained: the weight, with a gradient.

    Raises:
        ValueError: it is sparse or complex, or projected where the residual is wanted; the message names the weight.
    """
    grad, name = trained.grad, trained.name
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
