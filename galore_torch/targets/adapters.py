"""Which weights belong to adapters, such as PEFT's LoRA, and why GaLore leaves them alone.

An adapter freezes the weights that GaLore would train and brings small matrices, whose rank is low already: projecting
them saves nothing. PEFT marks the layers it wraps; they are recognized by that mark, without its import.
"""

from __future__ import annotations

from torch import Tensor, nn

from galore_torch.messages import list_names, warn
from galore_torch.modules import Targets, what_holds


def brought_by_adapters(model: nn.Module) -> set[int]:
    """The weights that adapters have brought into a model.

    Args:
        model: the model; a plain one has none. Modules that PEFT trains whole (`modules_to_save`) are no adapters.

    Returns:
        The identity of each weight.
    """
    brought: set[int] = set()
    for module in model.modules():
        if hasattr(module, "adapter_layer_names") and isinstance(
            wrapped := getattr(module, "base_layer", None), nn.Module
        ):
            own = {id(weight) for weight in wrapped.parameters()}
            brought |= {id(weight) for weight in module.parameters()} - own
    return brought


def leave_out_adapters(model: nn.Module, targets: dict[str, Tensor], target_modules: Targets) -> dict[str, Tensor]:
    """The targets that no adapter has brought. One warning names those that are trained and left out.

    Args:
        model: the model.
        targets: weights by their names.
        target_modules: what they were found by, for messages.

    Returns:
        Weights by their names.

    Raises:
        ValueError: adapters have frozen all of them.
    """
    brought = brought_by_adapters(model)
    kept = {name: weight for name, weight in targets.items() if id(weight) not in brought}
    if brought and not any(weight.requires_grad for weight in kept.values()):
        raise ValueError(
            f"{what_holds(target_modules)} weights that an adapter has frozen, and the adapter's own "
            "matrices have a low rank already. GaLore trains the weights themselves: give it the model "
            "without adapters (PEFT: model.unload(), or model.merge_and_unload() to keep what they have "
            "learnt), set requires_grad on the weights to train them beside the adapters, or train the "
            "adapters with torch's own optimizer"
        )
    left = [name for name, weight in targets.items() if name not in kept and weight.requires_grad]
    if left:
        warn(f"trained, but not projected: {len(left)} matrices of adapters ({list_names(left, 3)})")
    return kept
