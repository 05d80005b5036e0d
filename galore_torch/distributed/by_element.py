"""Which optimizers can run on parts of tensors: those that move each number, or each block, by its own gradient."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from galore_torch.distributed.cut import Cut
from galore_torch.optim.rule import InnerParam, Rule
from galore_torch.optim.trained_weight import TrainedWeight

STEPS, ROWS, COLUMNS = 12, 8, 6


def moves_parts(trained: TrainedWeight, cut: Cut) -> bool:
    """Whether the rule of a weight moves parts of it as it would move the whole.

    Args:
        trained: on the weight.
        cut: into which parts.
    """
    traits = trained.traits
    if traits.factor or traits.learning_rate:
        return False
    if traits.holds_in_few_bits is not None:
        return traits.block is not None and _cuts_between_blocks(trained, cut, traits.block)
    return _moves_by_element(trained.rule, len(trained.projection.projected_shape))


def _cuts_between_blocks(trained: TrainedWeight, cut: Cut, block: int) -> bool:
    """Whether all parts are of one size and are whole blocks of numbers, in few bits if the whole is."""
    numbers = trained.coordinate_count if trained.through_coordinates else trained.weight.numel()
    parts, rest = divmod(cut.size, cut.part)
    holds = trained.traits.holds_in_few_bits
    assert holds is not None
    return not cut.axis and not rest and numbers // parts % block == 0 and holds(numbers) == holds(numbers // parts)


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
            _step(rule.on_cpu(), [whole], [[grad] for grad in grads])
            _step(rule.on_cpu(), halves, [list(grad.chunk(2)) for grad in grads])
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
