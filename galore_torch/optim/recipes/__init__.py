"""The named recipes, and the traits of optimizers that a probe cannot find out.

This is the one place that knows optimizers by name. A recipe is a `GaLore` around one optimizer, with its arguments
spelled out, so that trainers which filter arguments by signature can call it.
"""

from galore_torch.optim.recipes import declared as declared
from galore_torch.optim.recipes.adafactor import GaLoreAdafactor
from galore_torch.optim.recipes.adamw import GaLoreAdamW
from galore_torch.optim.recipes.eight_bit import GaLoreAdamW8bit, QGaLoreAdamW8bit
from galore_torch.optim.recipes.muon import GaLoreMuon
from galore_torch.optim.recipes.sgd import GaLoreSGD

__all__ = ["GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreMuon", "GaLoreSGD", "QGaLoreAdamW8bit"]
