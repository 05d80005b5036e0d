"""Training processes that step in turn, as many together as memory allows beside the reference; or one by one."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import median

from benchmarks.common import peers
from benchmarks.common.memory import available_bytes
from benchmarks.common.methods import REFERENCE
from benchmarks.common.timing import in_turn
from benchmarks.common.training import Training
from benchmarks.common.worker import Worker

Advance = Callable[[str], None]
"""Called with a few words before each step."""

WARM_UP = 1  # ordinary steps that nobody counts
KINDS = ("gradients", "state", "the rest")


@dataclass(kw_only=True)
class RunFigures:
    """What was measured of one method."""

    first_s: float = 0.0  # seconds of the first step, in which all state is made and all bases are found
    steps_s: list[float] = field(default_factory=list)  # seconds of every ordinary step
    beside_s: list[float] = field(default_factory=list)  # the seconds of the reference's steps in the same rounds
    first_peak_bytes: int = 0  # the most memory above the weights in the first step
    peak_bytes: list[int] = field(default_factory=list)  # the same in every ordinary step
    gradient_bytes: int = 0  # what gradients take when the backward pass of an ordinary step has ended
    state_bytes: int = 0  # the optimizer's state
    weight_bytes: int = 0  # the weights

    @property
    def step_s(self) -> float:
        """The median of ordinary steps."""
        return median(self.steps_s)

    @property
    def gain(self) -> float:
        """Tokens per second over the reference's in the same rounds."""
        return median(self.beside_s) / self.step_s

    @property
    def highest_bytes(self) -> int:
        """The most memory above the weights in any step, the first included."""
        return max([self.first_peak_bytes, *self.peak_bytes])

    def kinds_bytes(self) -> dict[str, int]:
        """What the peak of an ordinary step consists of, above the weights.

        Gradients count as they are when the backward pass has ended; one that comes and goes within it is in the rest.
        """
        rest = max(self.peak_bytes) - self.gradient_bytes - self.state_bytes
        return dict(zip(KINDS, (self.gradient_bytes, self.state_bytes, rest), strict=True))

    def over_a_gap_s(self, gap: int) -> float:
        """The seconds of a step on average over a gap in which every layer renews once."""
        return ((gap - 1) * self.step_s + self.first_s) / gap


class TrainingRun(Worker):
    """A training process; its figures gather in `figures`."""

    def __init__(self, training: Training, advance: Advance) -> None:
        environment = peers.environment(training.method.peer)
        super().__init__(training.name, Training.__module__, asdict(training), environment)
        self.figures, self._advance = RunFigures(), advance

    def first_step(self) -> None:
        """Take the first step."""
        self._advance(f"{self.name}, first step")
        answer = self.ask("step")
        self.figures.first_s, self.figures.first_peak_bytes = answer["seconds"], int(answer["peak"])

    def step(self, *, counts: bool = True) -> float:
        """Take an ordinary step; return its seconds."""
        self._advance(self.name)
        answer = self.ask("step")
        if counts:
            self.figures.steps_s.append(answer["seconds"])
            self.figures.peak_bytes.append(int(answer["peak"]))
            self.figures.gradient_bytes = int(answer["gradients"])
        return float(answer["seconds"])

    def finish(self) -> None:
        """Ask for what is kept between steps."""
        kept = self.ask("state")
        self.figures.state_bytes, self.figures.weight_bytes = int(kept["state"]), int(kept["weights"])

    @property
    def largest_bytes(self) -> int:
        """The most that it took so far, weights included."""
        return self.figures.highest_bytes + self.figures.weight_bytes


def interleaved(
    trainings: list[Training], rounds: int, advance: Advance, each_round: Callable[[], None]
) -> dict[str, RunFigures]:
    """Measure methods that step in turn, the reference among them; `each_round` is called before every round.

    All stay alive together while there is room for one more like the largest, whichever of them is at its peak. If not,
    they come in groups, and the reference steps with each of them.
    """
    waiting = [one for one in trainings if one.name != REFERENCE]
    figures: dict[str, RunFigures] = {}

    def started(stack: ExitStack, training: Training) -> TrainingRun:
        run = stack.enter_context(TrainingRun(training, advance))
        run.first_step()
        for _ in range(WARM_UP):
            run.step(counts=False)
        run.finish()
        return run

    with ExitStack() as outer:
        reference = started(outer, next(one for one in trainings if one.name == REFERENCE))
        while waiting or not figures:
            with ExitStack() as inner:
                group, beside_s = [reference], list[float]()
                while waiting and (
                    len(group) == 1 or available_bytes(waiting[0].device) > 2 * max(run.largest_bytes for run in group)
                ):
                    group.append(started(inner, waiting.pop(0)))
                for number, run in enumerate(in_turn(group, rounds)):
                    if number % len(group) == 0:
                        each_round()
                    seconds = run.step()
                    if run is reference:
                        beside_s.append(seconds)
                for run in group:
                    run.figures.beside_s = [*reference.figures.steps_s] if run is reference else beside_s
                    figures[run.name] = run.figures
    return {one.name: figures[one.name] for one in trainings}


def one_by_one(trainings: list[Training], steps: int, advance: Advance) -> dict[str, RunFigures]:
    """Measure methods one after the other, each alone in memory; steps are those after the first of each."""
    figures = {}
    for training in trainings:
        with TrainingRun(training, advance) as run:
            run.first_step()
            for _ in range(steps):
                run.step()
            run.finish()
        figures[run.name] = run.figures
    return figures
