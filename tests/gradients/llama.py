"""A tiny LLaMA, its data, and steps of it under every mode: what these tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from galore_torch import GaLore, GaLoreAdamW, ProjectedGradient, param_groups
from galore_torch.gradients import Attachment, attach
from tests.modes import MODES

ACCUMULATING = {name: mode for name, mode in MODES.items() if mode[1] == "step"}
every_accumulating_mode = pytest.mark.parametrize("mode", ACCUMULATING.values(), ids=ACCUMULATING)

Mode = tuple[str, str]
GAP = 6
STEPS = 2 * GAP + 2  # so that each weight has three bases
RANK = 8
VOCABULARY, TOKENS = 101, 16
BAR = 1e-5


def llama(dtype: torch.dtype = torch.float32, **keys: Any) -> LlamaForCausalLM:
    """The same untrained model at every call: 14 projected weights, taking turns to renew."""
    torch.manual_seed(0)
    given = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **keys,
    }
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=TOKENS, use_cache=False, **given)
    return LlamaForCausalLM(config).to(dtype)


def groups(model: nn.Module, **keys: Any) -> list[dict[str, Any]]:
    """The groups of a model, at a small rank and gap."""
    return param_groups(model, **{"rank": RANK, "update_proj_gap": GAP, **keys})


def adamw(model: nn.Module, **keys: Any) -> GaLore:
    """A GaLoreAdamW of a model."""
    return GaLoreAdamW(groups(model, **keys), lr=1e-2, weight_decay=0.1)


def batch(step: int, rows: int = 4) -> Tensor:
    """The token sequences of a step, the same at every call."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, VOCABULARY, (rows, TOKENS), generator=generator)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean loss of sequences."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def walk(model: nn.Module, optimizer: GaLore, steps: Iterable[int] = range(STEPS), micro_batches: int = 1) -> None:
    """Makes the steps of these numbers, each of one batch or of as many equal parts of it; the first of one."""
    for step in steps:
        parts = batch(step).chunk(micro_batches if step else 1)
        for ids in parts:
            (loss_of(model, ids) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(
    mode: Mode | None,
    build: Callable[[nn.Module], GaLore] = adamw,
    make: Callable[[], nn.Module] = llama,
    **keys: Any,
) -> nn.Module:
    """A model after some steps in a mode; None is plain `step()` with nothing attached."""
    model = make()
    optimizer = build(model)
    if mode is not None:
        attach(model, optimizer, *mode)
    walk(model, optimizer, **keys)
    return model


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of the parameters."""
    return [weight.detach().clone() for weight in model.parameters()]


def distance(ours: nn.Module, theirs: nn.Module) -> float:
    """The relative L2 distance of all weights of two models."""
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    apart = torch.stack([(a - b).detach().double().norm() for a, b in pairs]).norm()
    return float(apart / torch.stack([b.detach().double().norm() for _, b in pairs]).norm())


def projected_weights(optimizer: GaLore) -> list[Tensor]:
    """The weights with a rank, in the optimizer's order."""
    return [weight for group in optimizer.param_groups if "rank" in group for weight in group["params"]]


def projected_grads(optimizer: GaLore) -> Sequence[Tensor]:
    """The tensors that projected gradients store."""
    grads = [weight.grad for weight in projected_weights(optimizer)]
    return [grad.projected for grad in grads if isinstance(grad, ProjectedGradient)]


def attached(mode: Mode, make: Callable[[], nn.Module] = llama, **keys: Any) -> tuple[nn.Module, GaLore, Attachment]:
    """A model, its AdamW, and the handle of its attachment."""
    model = make()
    optimizer = adamw(model)
    return model, optimizer, attach(model, optimizer, *mode, **keys)
