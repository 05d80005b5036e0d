"""Times one case: every optimizer's ordinary steps in turn, its renewal of all layers, and our staggered steps."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch

from benchmarks.common.bars import Bar, judged
from benchmarks.common.methods import OPTIMIZERS
from benchmarks.common.optimizer_step import OptimizerStep
from benchmarks.common.sizes import LLAMA, Llama
from benchmarks.common.timing import in_turn
from benchmarks.common.worker import Worker

OURS, GALORE, APOLLO, ADAMW, FLOOR = "galore", "galore-1.0", "apollo-1.0.3", "full", "physical floor"
STEPPED = (OURS, GALORE, APOLLO, ADAMW, FLOOR)
RENEWING = (OURS, GALORE, APOLLO)
WARM_UP = 2  # steps that nobody counts: the one that makes the state, and one more for the caches


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """What is timed."""

    shapes: str  # key of `LLAMA`
    dtype: str  # name of the torch dtype of weights and gradients
    rounds: int  # rounds in which every optimizer takes one ordinary step
    stagger_steps: int  # steps of ours with staggered renewal after the first one; 0 leaves them out
    threads: int  # threads of torch in each process

    @property
    def size(self) -> Llama:
        """The model whose weights are stepped."""
        return LLAMA[self.shapes]

    @property
    def units(self) -> int:
        """How many steps are taken: what a progress bar counts to."""
        return len(STEPPED) * (WARM_UP + self.rounds) + 1 + (1 + self.stagger_steps if self.stagger_steps else 0)

    @property
    def expected_state_bytes(self) -> int:
        """The bytes of the bases and of AdamW's two moments of the coordinates, and of nothing else."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.size.state_elements() * dtype.itemsize


@dataclass(kw_only=True)
class Timing:
    """What was measured of one optimizer, or of the floor."""

    # seconds of each part of a step, round by round; "step" alone for an optimizer
    rounds_s: dict[str, list[float]] = field(default_factory=dict)
    # seconds of each step in which all layers renewed, the first step of all included
    renewals_s: list[float] = field(default_factory=list)
    state_bytes: int = 0  # bytes kept beside weights and gradients, step counters apart
    counter_bytes: int = 0  # bytes of step counters and other single numbers

    @property
    def parts_s(self) -> dict[str, float]:
        """The median seconds of each part."""
        return {part: median(seconds) for part, seconds in self.rounds_s.items()}

    @property
    def step_s(self) -> float:
        """The median seconds of an ordinary step: the sum of its parts."""
        return sum(self.parts_s.values())


@dataclass(kw_only=True)
class StepTimings:
    """What was measured in one case: a timing for each of `STEPPED`, and our staggered steps in order."""

    case: StepCase
    timings: dict[str, Timing]
    staggered_s: list[float]

    def bars(self) -> list[Bar]:
        """Return our figures against their bars."""
        ours, galore, floor = (self.timings[name] for name in (OURS, GALORE, FLOOR))
        figures = {
            "ordinary step / galore-1.0's": ours.step_s / galore.step_s,
            "ordinary step / the floor": ours.step_s / floor.step_s,
            "renewing all layers / galore-1.0's": max(ours.renewals_s) / max(galore.renewals_s),
            "state bytes away from bases and moments": abs(ours.state_bytes - self.case.expected_state_bytes),
        }
        if self.staggered_s:
            figures["worst of the staggered steps / the median"] = max(self.staggered_s) / median(self.staggered_s)
        return judged("step", asdict(self.case), figures)

    def record(self) -> dict[str, Any]:
        """Return the case as JSON: every raw time in seconds, the medians, and the bars."""
        timings = self.timings.items()
        return {
            **asdict(self),
            "expected_state_bytes": self.case.expected_state_bytes,
            "timings": {name: {**asdict(one), "step_s": one.step_s, "parts_s": one.parts_s} for name, one in timings},
            "bars": [bar.record() for bar in self.bars()],
        }


def measure(case: StepCase, advance: Callable[[str], None]) -> StepTimings:
    """Measure one case; `advance` gets a few words before each step, `case.units` times in all."""
    timings = {name: Timing() for name in STEPPED}
    # All layers renew in the first step and, ours alone, once more after the last round.
    gap = WARM_UP + case.rounds
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(case, name, gap)) for name in STEPPED]
        for worker in workers:
            worker.ask("memory")  # answers once it has started, so that no other's start falls into a first step
        for worker in workers:
            advance(f"{worker.name}, first step")
            first_s = sum(worker.ask("step").values())
            if worker.name in RENEWING:
                timings[worker.name].renewals_s.append(first_s)
        for number, worker in enumerate(in_turn(workers, WARM_UP - 1 + case.rounds)):
            advance(f"ordinary step, {worker.name}")
            seconds = worker.ask("step")
            if number >= len(workers) * (WARM_UP - 1):
                for part, value in seconds.items():
                    timings[worker.name].rounds_s.setdefault(part, []).append(value)
        for worker in workers[: STEPPED.index(FLOOR)]:
            memory, timing = worker.ask("memory"), timings[worker.name]
            timing.state_bytes, timing.counter_bytes = int(memory["state"]), int(memory["counters"])
        advance("renewing all layers")
        timings[OURS].renewals_s.append(workers[STEPPED.index(OURS)].ask("step")["step"])
    return StepTimings(case=case, timings=timings, staggered_s=_staggered(case, advance))


def _staggered(case: StepCase, advance: Callable[[str], None]) -> list[float]:
    """The seconds of our steps after the first when the layers take turns to renew, as they do by default."""
    if not case.stagger_steps:
        return []
    seconds = []
    with _worker(case, OURS, case.size.gap, stagger=True) as worker:
        for _ in range(1 + case.stagger_steps):
            advance("staggered steps")
            seconds.append(worker.ask("step")["step"])
    return seconds[1:]


def _worker(case: StepCase, name: str, gap: int, *, stagger: bool = False) -> Worker:
    size, method = replace(case.size, gap=gap), OPTIMIZERS.get(name)  # none is the floor
    return OptimizerStep(method=method, size=size, dtype=case.dtype, stagger=stagger, threads=case.threads).start(name)
