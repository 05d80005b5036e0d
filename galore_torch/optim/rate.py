"""Whether a rule's displacement is its learning rate times something that does not depend on it."""

from __future__ import annotations

import functools

import torch

from galore_torch.optim.rule import DECLARED, InnerParam, Rule, Traits

STEPS = 4
RATES = (1e-2, 1.0)
TOLERANCE = 1e-3


def require_rate(rule: Rule, traits: Traits) -> None:
    """Checks that a rule can move coordinates at a learning rate of 1, for the group's to be applied afterwards.

    Args:
        rule: the optimizer.
        traits: what is known of it.

    Raises:
        ValueError: it has no learning rate, or depends on it in another way.
    """
    if rule.name in DECLARED or (traits.given is not None):
        return
    if "lr" not in rule.defaults or not _is_proportional(rule):
        raise ValueError(
            "residual and normalize need an optimizer whose update is its lr times a direction, and that of "
            f"{rule.name} is not. Use another one, such as torch.optim.AdamW, or residual=None and normalize=None"
        )


@functools.lru_cache(maxsize=32)
def _is_proportional(rule: Rule) -> bool:
    first, second = (_moved(rule, rate) for rate in RATES)
    return bool((second * RATES[0] - first * RATES[1]).norm() <= TOLERANCE * first.norm() * RATES[1])


def _moved(rule: Rule, rate: float) -> torch.Tensor:
    """How far some gradients move coordinates at a rate."""
    generator = torch.Generator().manual_seed(0)
    tried, state = rule.on_cpu(), dict[str, object]()
    group = {**tried.defaults, "lr": rate}
    moved = torch.zeros(8, 4)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for _ in range(STEPS):
            param = InnerParam(
                tensor=torch.zeros(8, 4), grad=torch.randn(8, 4, generator=generator), state=state, group=group
            )
            group.update(tried.step([param])[id(group)])
            state = param.state
            moved += param.tensor
    return moved
