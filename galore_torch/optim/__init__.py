"""`GaLore` around any torch optimizer, the named recipes, and `ProjectedGradient`. It knows no `nn.Module`."""

from galore_torch.optim.galore import GaLore
from galore_torch.optim.lowered_ranks import lower_ranks
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.recipes import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreMuon,
    GaLoreSGD,
    QGaLoreAdamW8bit,
)
from galore_torch.optim.state_size import state_bytes
from galore_torch.optim.subspaces import Subspace

__all__ = [
    "GaLore",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreMuon",
    "GaLoreSGD",
    "ProjectedGradient",
    "QGaLoreAdamW8bit",
    "Subspace",
    "lower_ranks",
    "state_bytes",
]
