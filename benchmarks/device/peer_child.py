"""Measures a published optimizer in a process of its own, a script whose argument is the request in JSON.

galore-torch 1.0 finds its bases by the SVD of every weight, which takes minutes for a large model. So its first step is
made on one layer, and counted as often as there are layers; its ordinary steps are those of all layers, with random
bases.
"""

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.device.sizes import sizes
from benchmarks.device.steps import figures_of

SVD_UP_TO = 2048
"""The hidden size up to which the SVDs are waited for."""


def _random_basis(_: Any, gradient: Tensor, rank: int, type: str) -> Tensor:
    """What galore-torch 1.0 keeps, orthonormal but not searched for."""
    side = gradient.shape[1] if type == "right" else gradient.shape[0]
    columns: Tensor = torch.linalg.qr(torch.randn(side, rank, device=gradient.device)).Q.to(gradient.dtype)
    return columns.mT.contiguous() if type == "right" else columns


def main() -> None:
    """Print the figures in JSON."""
    request = json.loads(sys.argv[1])
    size, which, device = sizes(request["small"])[request["size"]], request["which"], request["device"]
    figures: dict[str, Any] = {}
    if which.startswith("galore"):
        from galore_torch.galore_projector import GaLoreProjector

        layers = size.shapes.layers
        if size.shapes.hidden <= SVD_UP_TO:
            one_layer = replace(size, shapes=replace(size.shapes, layers=1))
            figures["renewal_s"] = figures_of(which, one_layer, device)["first_s"] * layers
        GaLoreProjector.get_orthogonal_matrix = _random_basis  # type: ignore[attr-defined]
    print(json.dumps(figures_of(which, size, device) | figures))


if __name__ == "__main__":
    main()
