"""What of a model is projected: from an `nn.Module` to the parameter groups of a GaLore optimizer.

| module | |
| --- | --- |
| `model_groups` | `param_groups`: splits a model's parameters, and decides the layout of each weight |
| `rank_choice` | `choose_ranks`: which ranks capture most of a model's gradients within some bytes |
| `adapters` | weights that PEFT has brought or frozen |
| `galore_torch.modules` | the rules by which names of modules match, which `quantize_weights` shares |
"""

from galore_torch.targets.model_groups import param_groups, summarize
from galore_torch.targets.rank_choice import choose_ranks

__all__ = ["choose_ranks", "param_groups", "summarize"]
