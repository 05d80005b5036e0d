"""Several cards: what each process sends in a step, and how long a training takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from galore_torch.memory.links import Ring, renewal_bytes, replicated_step, sharded_step
from galore_torch.memory.ranks import Sizes
from galore_torch.training.planning.config import Cards
from galore_torch.training.pretrain.config import PretrainConfig

HOP = 1e-4
"""Seconds that a message takes from one card to the next, whatever its size."""

_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step takes, on average over renewals; its fields are those of the JSON file."""

    sent_bytes: Mapping[str, float]  # by a card in a step, by what is sent: weights, gradients, renewals
    link_seconds: Mapping[str, float] = field(default_factory=dict)  # that each takes; none without a known bandwidth
    step_seconds: float | None = None  # passes and traffic overlap; None if neither bandwidth nor rate is known
    days: float | None = None  # of the training; None if its tokens are not known


def refusal(cards: Cards, config: PretrainConfig) -> str | None:
    """Why a run with such settings is refused in so many processes; None if it is not."""
    adapter, own = config.adapter.adapter, config.optimizer
    if cards.world_size > 1 and adapter != "none":
        return f"adapter = {adapter!r} is planned in one process alone"
    for name in ("weight_bits", "grad_bits") if cards.parallel == "fsdp" else ():
        if getattr(own, name) != 16:
            return f"{name} = {getattr(own, name)} is not served by parallel = 'fsdp'"
    if cards.shard_bases and own.basis_bits != 16:
        return f"basis_bits = {own.basis_bits} is not served by shard_bases"
    return None


def cost(cards: Cards, sizes: Sizes, *, tokens_at_once: int, micro_batches: int) -> Cost:
    """What a step of a training costs.

    Under DDP gradients are averaged once a step; FSDP2 gathers weights and scatters gradients in each micro-batch.

    Args:
        cards: where it runs.
        sizes: of what is sent.
        tokens_at_once: of a micro-batch of one process.
        micro_batches: of a step, of one process.
    """
    rate = cards.tokens_per_second
    work = 0.0 if rate is None else tokens_at_once / rate
    bandwidth = cards.link or math.inf
    hop = 0.0 if cards.link is None else HOP
    ring = Ring(count=cards.world_size, bandwidth=bandwidth, hop=hop, width=sizes.width, work=work)
    renewals = renewal_bytes(sizes.weights, ring)
    if cards.parallel == "fsdp":
        step = sharded_step(sizes.weights, ring)
        seconds, times = step.seconds * micro_batches, micro_batches
    else:
        step = replicated_step(sizes.weights, ring)
        seconds, times = step.seconds + work * (micro_batches - 1), 1
    # by the step, and by layers that project gradients in each micro-batch
    read = sum(one.basis * (1 + micro_batches * (one.gradient != one.size)) for one in sizes.weights)
    bases = ring.half(read)[0] if cards.shard_bases else 0.0
    sent = {"weights": step.weights * times + bases, "gradients": step.gradients * times, "renewals": renewals}
    if cards.link is None and rate is None:
        return Cost(sent_bytes=sent)
    seconds += (renewals + bases) / bandwidth
    a_step = tokens_at_once * micro_batches * cards.world_size
    return Cost(
        sent_bytes=sent,
        link_seconds={} if cards.link is None else {kind: one / bandwidth for kind, one in sent.items()},
        step_seconds=seconds,
        days=None if cards.whole is None else cards.whole / a_step * seconds / _DAY,
    )
