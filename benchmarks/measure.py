"""Times one case: every contender's ordinary steps in turn, its renewal of all layers, and our staggered steps."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

from benchmarks.contender import CONTENDERS, Request
from benchmarks.processes import Contender

OURS, GALORE, ADAMW, FLOOR = "galore-torch 2", "galore-torch 1.0", "AdamW, fused", "floor"
RENEWING = (OURS, GALORE, "apollo-torch 1.0.3")
WARM_UP = 2  # steps that nobody counts: the one that makes the state, and one more for the caches


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed.

    Attributes:
        shapes: Key of `LLAMA`.
        dtype: Name of the torch dtype of weights and gradients.
        rounds: Rounds in which every contender takes one ordinary step.
        stagger_steps: Steps of ours with staggered renewal after the first one; 0 leaves them out.
        threads: Threads of torch in each process.
    """

    shapes: str
    dtype: str
    rounds: int
    stagger_steps: int
    threads: int

    @property
    def units(self) -> int:
        """How many times a contender is told to step: what a progress bar counts to."""
        return len(CONTENDERS) * (WARM_UP + self.rounds) + 1 + (1 + self.stagger_steps if self.stagger_steps else 0)


@dataclass(kw_only=True)
class Timing:
    """What was measured of one contender.

    Attributes:
        rounds_s: Seconds of each part of a step, round by round; "step" alone for an optimizer.
        renewals_s: Seconds of each step in which all layers renewed, the first step of all included.
        state_bytes: Bytes kept beside weights and gradients, step counters apart.
        counter_bytes: Bytes of step counters and other single numbers.
    """

    rounds_s: dict[str, list[float]] = field(default_factory=dict)
    renewals_s: list[float] = field(default_factory=list)
    state_bytes: int = 0
    counter_bytes: int = 0

    @property
    def parts_s(self) -> dict[str, float]:
        """The median seconds of each part."""
        return {part: median(seconds) for part, seconds in self.rounds_s.items()}

    @property
    def step_s(self) -> float:
        """The median seconds of an ordinary step: the sum of its parts."""
        return sum(self.parts_s.values())

    def add(self, seconds: dict[str, float]) -> None:
        """Count one more round."""
        for part, value in seconds.items():
            self.rounds_s.setdefault(part, []).append(value)


@dataclass(kw_only=True)
class Outcome:
    """What was measured in one case: a timing for each contender, and our staggered steps in order."""

    case: Case
    timings: dict[str, Timing]
    staggered_s: list[float]


Running = TypeVar("Running")


def in_turn(contenders: list[Running], rounds: int) -> Iterator[Running]:
    """Yield every contender once a round, each round started by another."""
    for number in range(rounds):
        start = number % len(contenders)
        yield from contenders[start:] + contenders[:start]


def measure(case: Case, advance: Callable[[str], None]) -> Outcome:
    """Measure one case.

    Args:
        case: What to time.
        advance: Called with a few words before each step, `case.units` times in all.
    """
    timings = {name: Timing() for name in CONTENDERS}
    # All layers renew in the first step and, ours alone, once more after the last round.
    gap = WARM_UP + case.rounds
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(request(case, name, gap=gap))) for name in CONTENDERS]
        for contender in contenders:
            if contender.name != FLOOR:
                contender.memory()  # answers once it has started, so that no other's start falls into a first step
        for contender in contenders:
            advance(f"{contender.name}, first step")
            first_s = sum(contender.step().values())
            if contender.name in RENEWING:
                timings[contender.name].renewals_s.append(first_s)
        for number, contender in enumerate(in_turn(contenders, WARM_UP - 1 + case.rounds)):
            advance(f"ordinary step, {contender.name}")
            seconds = contender.step()
            if number >= len(contenders) * (WARM_UP - 1):
                timings[contender.name].add(seconds)
        for contender in contenders:
            if contender.name != FLOOR:
                memory = contender.memory()
                timings[contender.name].state_bytes = int(memory["state"])
                timings[contender.name].counter_bytes = int(memory["counters"])
            if contender.name == OURS:
                advance("renewing all layers")
                timings[OURS].renewals_s.append(contender.step()["step"])
    return Outcome(case=case, timings=timings, staggered_s=staggered(case, advance))


def staggered(case: Case, advance: Callable[[str], None]) -> list[float]:
    """Return the seconds of our steps after the first when the layers take turns to renew, as they do by default."""
    if not case.stagger_steps:
        return []
    with Contender(request(case, OURS, stagger=True)) as contender:
        advance("staggered, first step")
        contender.step()
        seconds = []
        for _ in range(case.stagger_steps):
            advance("staggered steps")
            seconds.append(contender.step()["step"])
        return seconds


def request(case: Case, contender: str, *, gap: int = 200, stagger: bool = False) -> Request:
    """Return what a contender is asked to be in this case."""
    return Request(
        contender=contender, shapes=case.shapes, dtype=case.dtype, gap=gap, stagger=stagger, threads=case.threads
    )
