"""Which optimizers can run on parts of tensors: those that move each number by its own gradient alone."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from galore_torch.optim.rule import InnerParam, Rule
from galore_torch.optim.trained_weight import TrainedWeight

STEPS, ROWS, COLUMNS = 12, 8, 6


def require_by_element(trained: TrainedWeight) -> None:
    """Checks that a sharded weight can be moved part by part.

    Args:
        trained: on the weight.

    Raises:
        ValueError: its optimizer moves tensors as wholes, holds its state in blocks, or rounds in a way of ours.
    """
    if trained.rounding != "nearest":
        raise ValueError(
            f"rounding={trained.rounding!r} does not work for a sharded weight ({trained.name}); keep the shards in "
            "float32 (MixedPrecisionPolicy(param_dtype=torch.bfloat16))"
        )
    traits = trained.traits
    if traits.holds_in_few_bits is not None:
        raise ValueError(
            f"{trained.rule.name} holds its state in blocks of numbers, which the parts of a sharded weight "
            f"({trained.name}) would cut; use an optimizer with state in 16 or 32 bits, or DDP"
        )
    if (
        traits.factor
        or traits.learning_rate
        or not _moves_by_element(trained.rule, len(trained.projection.projected_shape))
    ):
        raise ValueError(
            f"{trained.rule.name} moves a tensor as a whole, and a process has a part of a sharded weight "
            f"({trained.name}); use an optimizer that moves each number by itself (AdamW, SGD, Lion), or DDP"
        )


@functools.lru_cache(maxsize=32)
def _moves_by_element(rule: Rule, dimensions: int) -> bool:
    """Whether moving the halves of a tensor is moving it, by trying."""
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, COLUMNS, *(2,) * (dimensions - 2)) if dimensions > 1 else (ROWS,)
    whole = torch.randn(shape, generator=generator)
    grads = [torch.randn(shape, generator=generator) for _ in range(STEPS)]
    halves = [half.clone() for half in whole.chunk(2)]
    try:
        with torch.no_grad():
            _step(rule.again(), [whole], [[grad] for grad in grads])
            _step(rule.again(), halves, [list(grad.chunk(2)) for grad in grads])
    except Exception:  # whatever a foreign optimizer raises on so small a tensor
        return False
    return torch.allclose(torch.cat(halves), whole, rtol=1e-5, atol=1e-6)


def _step(rule: Rule, tensors: list[Tensor], grads: list[list[Tensor]]) -> None:
    group = dict(rule.defaults)
    states: list[dict[str, object]] = [{} for _ in tensors]
    for step in grads:
        params = [
            InnerParam(tensor=tensor, grad=grad.clone(), state=state, group=group)
            for tensor, grad, state in zip(tensors, step, states, strict=True)
        ]
        group.update(rule.step(params)[id(group)])
        states = [one.state for one in params]
