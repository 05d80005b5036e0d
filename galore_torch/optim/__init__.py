"""Floor 2: `GaLore` around any optimizer, the named recipes, parameter groups and `ProjectedGradient`."""

from galore_torch.optim.galore import GaLore
from galore_torch.optim.param_groups import param_groups, summarize
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.recipes import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD
from galore_torch.optim.state_size import state_bytes

__all__ = [
    "GaLore",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreSGD",
    "ProjectedGradient",
    "param_groups",
    "state_bytes",
    "summarize",
]
