"""Measures a published optimizer in a process of its own.

galore-torch 1.0 finds its bases by the SVD of every weight, which takes minutes for a large model. So its first step is
made on one layer, and counted as often as there are layers; its ordinary steps are those of all layers, with random
bases.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.sizes import Llama
from benchmarks.common.worker import Commands
from benchmarks.device.steps import figures_of

SVD_UP_TO = 2048
"""The hidden size up to which the SVDs are waited for."""


def _random_basis(_: Any, gradient: Tensor, rank: int, type: str) -> Tensor:
    """What galore-torch 1.0 keeps, orthonormal but not searched for."""
    side = gradient.shape[1] if type == "right" else gradient.shape[0]
    columns: Tensor = torch.linalg.qr(torch.randn(side, rank, device=gradient.device)).Q.to(gradient.dtype)
    return columns.mT.contiguous() if type == "right" else columns


def commands(request: dict[str, Any]) -> Commands:
    """Tell the "figures" of what is asked for: `which`, `size` and `device`."""
    size, which, device = Llama(**request["size"]), request["which"], request["device"]

    def figures() -> dict[str, Any]:
        told: dict[str, Any] = {}
        if which.startswith("galore"):
            from galore_torch.galore_projector import GaLoreProjector

            if size.hidden <= SVD_UP_TO:
                told["renewal_s"] = figures_of(which, replace(size, layers=1), device)["first_s"] * size.layers
            GaLoreProjector.get_orthogonal_matrix = _random_basis  # type: ignore[attr-defined]
        return figures_of(which, size, device) | told

    return {"figures": figures}
