"""Floor 2: `GaLore` around any optimizer, the named recipes, parameter groups and `ProjectedGradient`."""

from galore_torch.optim.galore import GaLore
from galore_torch.optim.param_groups import param_groups, summarize
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.quantize import dequantize_weights, quantize_weights
from galore_torch.optim.recipes import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD, QGaLoreAdamW8bit
from galore_torch.optim.state_size import state_bytes
from galore_torch.optim.subspaces import Subspace

__all__ = [
    "GaLore",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreSGD",
    "ProjectedGradient",
    "QGaLoreAdamW8bit",
    "Subspace",
    "dequantize_weights",
    "param_groups",
    "quantize_weights",
    "state_bytes",
    "summarize",
]
