"""galore-torch: train every weight of a large model in the memory that low-rank adapters need.

GaLore (Gradient Low-Rank Projection, arXiv 2403.03507) around any torch optimizer:

    from galore_torch import GaLoreAdamW, param_groups

    optimizer = GaLoreAdamW(param_groups(model, rank=128), lr=1e-2)
"""

from galore_torch.gradients import attach
from galore_torch.optim import (
    GaLore,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreSGD,
    ProjectedGradient,
    QGaLoreAdamW8bit,
    dequantize_weights,
    param_groups,
    quantize_weights,
)

__version__ = "2.0.0.dev0"

__all__ = [
    "GaLore",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreSGD",
    "ProjectedGradient",
    "QGaLoreAdamW8bit",
    "attach",
    "dequantize_weights",
    "param_groups",
    "quantize_weights",
]
