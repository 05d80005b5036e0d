"""Matrices of low rank in the place of whole ones: `adapt` puts them into a model, `merged` takes them out again.

`lora` and `relora` are PEFT's LoRA layers, injected: the model keeps its class, so that the Trainer saves all of it and
not only the adapters. `low-rank` is a module of two linear layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from galore_torch.modules import find_targets
from galore_torch.training.settings.adapter import AdapterConfig

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

NAME = "default"
"""What PEFT calls the one adapter of a layer."""

_HEADS = {"SEQ_CLS": {"classifier", "score"}, "TOKEN_CLS": {"classifier", "score"}, "QUESTION_ANS": {"qa_outputs"}}
"""What Transformers calls the part of a model that is new when it is trained for a task, by PEFT's name of the task."""

Model = TypeVar("Model", bound=nn.Module)


class LowRankLinear(nn.Sequential):
    """A linear layer whose matrix (m x n) is a product of B (m x r) and A (r x n); another layer's bias is taken over.

    A and B are drawn from the normal distribution, so that their product spreads as that layer's matrix did.
    """

    A: nn.Linear
    B: nn.Linear

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        weight = linear.weight
        place = {"device": weight.device, "dtype": weight.dtype}
        A = nn.Linear(linear.in_features, rank, bias=False, **place)
        B = nn.Linear(rank, linear.out_features, bias=linear.bias is not None, **place)
        # A number of B A is the sum of r products: its variance is r times that of A's times that of B's.
        spread = (weight.detach().float().std().item() / rank**0.5) ** 0.5
        for factor in (A, B):
            nn.init.normal_(factor.weight, std=spread)
        if linear.bias is not None:
            B.bias = linear.bias
        super().__init__(OrderedDict(A=A, B=B))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer that computes the same, with the bias itself."""
        product = self.B.weight.float() @ self.A.weight.float()
        plain = nn.Linear(self.A.in_features, self.B.out_features, bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(product.to(self.B.weight.dtype)), self.B.bias
        return plain


def adapt(
    model: Model, config: AdapterConfig, target_modules: str | Sequence[str], *, task_type: str | None = None
) -> Model:
    """Put adapters into a model.

    Args:
        model: changed in place.
        config: which adapters, with their rank; see `galore_torch.training.settings.adapter.resolved`.
        target_modules: into which linear layers, by the rules of `galore_torch.param_groups`.
        task_type: for a model that has been trained: PEFT's name of what it is trained for now ("CAUSAL_LM",
            "SEQ_CLS", ...). All but adapters and the task's head is frozen then. None for fresh weights: only the
            adapted matrices are frozen, or replaced.

    Returns:
        The model.

    Raises:
        ValueError: no layer matches, the rank is unknown or more than a matrix has, or `low-rank` is asked of a trained
            model; the model is unchanged then.
        ImportError: PEFT is missing.
    """
    if config.adapter == "none":
        return model
    kinds = (nn.Linear, Conv1D) if "lora" in config.adapter else nn.Linear

    def suits(module: nn.Module, attribute: str, weight: Tensor) -> bool:
        return isinstance(module, kinds) and attribute == "weight" and weight.is_floating_point()

    targets = find_targets(model, target_modules, suits, "adapted")
    rank = _checked_rank(config, targets)
    if config.adapter != "low-rank":
        _inject_lora(model, config, rank, targets, task_type)
        return model
    if task_type is not None:
        raise ValueError("adapter = 'low-rank' discards the pretrained weights; give lora, or train one from scratch.")
    for place in [name.removesuffix(".weight") for name in targets]:
        model.set_submodule(place, LowRankLinear(model.get_submodule(place), rank))  # type: ignore[arg-type]
    return model


def merged(model: Model) -> Model:
    """Take the adapters out of a model, in place: the plain model that computes the same is returned, to be saved."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankLinear):
            model.set_submodule(name, module.merged())
    for name, layer in list(lora_layers(model)):
        merge(layer)
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The LoRA layers of a model, with their names."""
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


@torch.no_grad()
def merge(layer: Any) -> None:
    """Add what the adapter of one of `lora_layers` has learnt to the frozen matrix; the adapter stays as it is."""
    weight = layer.get_base_layer().weight
    weight.copy_(weight.float() + layer.get_delta_weight(NAME).float())


def _checked_rank(config: AdapterConfig, targets: dict[str, Tensor]) -> int:
    rank = config.adapter_rank
    if rank is None:
        raise ValueError("adapter_rank = None: adapters need a rank; give one, such as 8.")
    for name, weight in targets.items():
        if rank > min(weight.shape):
            raise ValueError(
                f"adapter_rank = {rank} is more than {name} of {' x '.join(map(str, weight.shape))} has; "
                f"give at most {min(min(each.shape) for each in targets.values())}."
            )
    return rank


def _inject_lora(
    model: nn.Module, config: AdapterConfig, rank: int, targets: dict[str, Tensor], task_type: str | None
) -> None:
    if find_spec("peft") is None:
        raise ImportError(f"adapter = {config.adapter!r} needs PEFT. Install it with:  pip install peft")
    from peft import LoraConfig, inject_adapter_in_model

    trained = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and name not in targets
        and (task_type is None or _HEADS.get(task_type, set()) & {*name.split(".")})
    ]
    places = [name.removesuffix(".weight") for name in targets]
    inject_adapter_in_model(
        LoraConfig(
            task_type=task_type,
            r=rank,
            lora_alpha=config.adapter_alpha,  # type: ignore[arg-type]
            lora_dropout=config.adapter_dropout,
            target_modules=places,
            fan_in_fan_out=any(isinstance(model.get_submodule(place), Conv1D) for place in places),
        ),
        model,
        adapter_name=NAME,
    )
    for parameter in trained:  # PEFT freezes all but the adapters
        parameter.requires_grad_(True)
