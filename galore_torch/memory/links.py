"""What a step of training sends between processes, and how long that takes: a model of the traffic.

Every process has a card and a link of its own, both ways, and a collective goes around a ring, so that an all-reduce
of b bytes over N of them sends 2 (N - 1) / N b of each and takes 2 (N - 1) hops; a gather or a scatter is half of it. A
link does one collective after the other, in the order in which they are ready; gradients are ready as the backward
goes, by their share of the work, and buckets of 25 MiB when the last of theirs is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BUCKET_BYTES = 25 * 2**20
"""Of gradients that DDP sends together."""


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Cards and the links between them.

    Attributes:
        count: of cards.
        bandwidth: of a link, in bytes a second.
        hop: latency, in seconds.
        width: bytes of a number that is sent.
        work: seconds of a forward and a backward pass without any traffic.
    """

    count: int
    bandwidth: float
    hop: float
    width: int
    work: float

    def half(self, numbers: float) -> tuple[float, float]:
        """What a gather or a scatter sends of each card, in bytes, and its seconds.

        Args:
            numbers: of which so many are gathered or scattered.

        Example:
            >>> Ring(count=2, bandwidth=100.0, hop=0.0, width=4, work=0.0).half(100)
            (200.0, 2.0)
        """
        sent = (self.count - 1) / self.count * numbers * self.width
        return sent, sent / self.bandwidth + (self.count - 1) * self.hop

    def reduced(self, numbers: float) -> tuple[float, float]:
        """The same of an all-reduce.

        Args:
            numbers: that are averaged.
        """
        sent, seconds = self.half(numbers)
        return 2 * sent, 2 * seconds


@dataclass(frozen=True)
class SentWeight:
    """One weight, in numbers.

    Attributes:
        size: of the weight.
        gradient: of its gradient, as it is sent in an ordinary step: r max(m, n) of a projected one.
        basis: of its basis, that a renewal sends; 0 if it has none.
        gap: steps between two renewals.
    """

    size: int
    gradient: int
    basis: int = 0
    gap: int = 1


@dataclass(frozen=True)
class Step:
    """An ordinary step of training.

    Attributes:
        weights: bytes that a card sends for gathering weights.
        gradients: bytes that it sends for averaging gradients.
        seconds: of the passes, with the traffic that they wait for.
    """

    weights: float
    gradients: float
    seconds: float


def renewal_bytes(weights: Iterable[SentWeight], ring: Ring) -> float:
    """Bytes more that a card sends a step for renewals, which are spread over the gap: full gradients, and bases.

    Args:
        weights: of the model.
        ring: the cards.
    """
    return sum(
        (ring.reduced(one.size - one.gradient)[0] + ring.half(one.basis)[0]) / one.gap for one in weights if one.basis
    )


def replicated_step(weights: Sequence[SentWeight], ring: Ring) -> Step:
    """A step of DDP: every card has all weights, and gradients are averaged, in buckets.

    Args:
        weights: in the order of the forward pass.
        ring: the cards.
    """
    total, forward = sum(one.size for one in weights), ring.work / 3
    sent = link = waiting = 0.0  # when the link is free, and what waits for its bucket to be full
    done = forward  # when the work is done
    for place, one in reversed(list(enumerate(weights))):
        done += 2 * forward * one.size / total
        waiting += one.gradient
        if waiting * ring.width >= BUCKET_BYTES or place == 0:
            bytes_sent, seconds = ring.reduced(waiting)
            sent, link, waiting = sent + bytes_sent, max(link, done) + seconds, 0.0
    return Step(0.0, sent, max(link, done))


def sharded_step(weights: Sequence[SentWeight], ring: Ring) -> Step:
    """A step of FSDP2: weights are gathered for the forward and again for the backward, and gradients scattered.

    Args:
        weights: in the order of the forward pass.
        ring: the cards.
    """
    total = sum(one.size for one in weights)
    gathered = scattered = link = done = 0.0
    for backward, order in ((False, weights), (True, weights[::-1])):
        for one in order:
            bytes_sent, seconds = ring.half(one.size)
            gathered, link = gathered + bytes_sent, link + seconds
            done = max(done, link) + ring.work * (2 if backward else 1) / 3 * one.size / total
            if backward:
                bytes_sent, seconds = ring.half(one.gradient)
                scattered, link = scattered + bytes_sent, max(link, done) + seconds
    return Step(gathered, scattered, max(link, done))
