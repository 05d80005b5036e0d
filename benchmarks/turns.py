"""Training processes that step in turn: as many together as memory allows, always beside the reference."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import median

from benchmarks.footprint import available_bytes
from benchmarks.measure import in_turn
from benchmarks.methods import METHODS, REFERENCE
from benchmarks.processes import Child
from benchmarks.training import Training

Advance = Callable[[str], None]
WARM_UP = 1  # ordinary steps that nobody counts


@dataclass(kw_only=True)
class Figures:
    """What was measured of one method.

    Attributes:
        first_s: Seconds of the first step, in which all state is made and all bases are found.
        steps_s: Seconds of every ordinary step.
        beside_s: The seconds of the reference's steps in the same rounds.
        first_peak_bytes: The most memory above the weights in the first step.
        peak_bytes: The same in every ordinary step.
        gradient_bytes: What gradients take when the backward pass of an ordinary step has ended.
        state_bytes: The optimizer's state.
        weight_bytes: The weights.
    """

    first_s: float = 0.0
    steps_s: list[float] = field(default_factory=list)
    beside_s: list[float] = field(default_factory=list)
    first_peak_bytes: int = 0
    peak_bytes: list[int] = field(default_factory=list)
    gradient_bytes: int = 0
    state_bytes: int = 0
    weight_bytes: int = 0

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

    def over_a_gap_s(self, gap: int) -> float:
        """The seconds of a step on average over a gap in which every layer renews once."""
        return ((gap - 1) * self.step_s + self.first_s) / gap


class TrainingRun(Child):
    """A training process; its figures gather in `figures`.

    Args:
        training: What it is to be.
        settings: Environment variables of its own.
        advance: Called with a few words before each step.
    """

    def __init__(self, training: Training, advance: Advance, settings: Mapping[str, str] | None = None) -> None:
        self.figures = Figures()
        self._advance = advance
        super().__init__(
            training.method, "training_child.py", asdict(training), METHODS[training.method].peer, settings
        )

    def first_step(self) -> None:
        """Take the first step."""
        self._advance(f"{self.name}, first step")
        told = self.ask("step")
        self.figures.first_s, self.figures.first_peak_bytes = told["seconds"], int(told["peak"])

    def step(self, *, counts: bool = True) -> float:
        """Take an ordinary step; return its seconds."""
        self._advance(self.name)
        told = self.ask("step")
        if counts:
            self.figures.steps_s.append(told["seconds"])
            self.figures.peak_bytes.append(int(told["peak"]))
            self.figures.gradient_bytes = int(told["gradients"])
        return told["seconds"]

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
) -> dict[str, Figures]:
    """Measure methods that step in turn.

    All stay alive together if memory allows. If not, they come in groups, and the reference steps with each of them.

    Args:
        trainings: What to measure; the reference must be among them.
        rounds: Ordinary steps of each method.
        advance: Called with a few words before each step.
        each_round: Called once before every round.

    Returns:
        The figures by method, in the order given.
    """
    waiting = [one for one in trainings if one.method != REFERENCE]
    (basis,) = (one for one in trainings if one.method == REFERENCE)
    figures: dict[str, Figures] = {}
    with ExitStack() as outer:
        reference = outer.enter_context(_warm(basis, advance))
        while waiting or not figures:
            with ExitStack() as inner:
                group: list[TrainingRun] = []
                while waiting and (not group or _fits([reference, *group], waiting[0].device)):
                    group.append(inner.enter_context(_warm(waiting.pop(0), advance)))
                _take_turns(reference, group, rounds, each_round)
                figures |= {run.name: run.figures for run in (reference, *group)}
    return {one.method: figures[one.method] for one in trainings}


def _warm(training: Training, advance: Advance) -> TrainingRun:
    """Start a process and take the steps that do not count as ordinary ones."""
    run = TrainingRun(training, advance)
    try:
        run.first_step()
        for _ in range(WARM_UP):
            run.step(counts=False)
        run.finish()
    except BaseException:
        run.__exit__(None, None, None)
        raise
    return run


def _fits(running: list[TrainingRun], device: str) -> bool:
    """Whether there is room for one more like the largest, while any of those that run is at its peak."""
    return available_bytes(device) > 2 * max(run.largest_bytes for run in running)


def _take_turns(reference: TrainingRun, group: list[TrainingRun], rounds: int, each_round: Callable[[], None]) -> None:
    everybody = [reference, *group]
    beside_s: list[float] = []
    for number, run in enumerate(in_turn(everybody, rounds)):
        if number % len(everybody) == 0:
            each_round()
        seconds = run.step()
        if run is reference:
            beside_s.append(seconds)
    for run in everybody:
        run.figures.beside_s = [*reference.figures.steps_s] if run is reference else beside_s


def one_by_one(
    trainings: list[Training], steps: int, advance: Advance, settings: Mapping[str, str]
) -> dict[str, Figures]:
    """Measure methods one after the other, each alone in memory.

    Args:
        trainings: What to measure.
        steps: Steps after the first of each method.
        advance: Called with a few words before each step.
        settings: Environment variables of the processes.

    Returns:
        The figures by method.
    """
    figures = {}
    for training in trainings:
        with TrainingRun(training, advance, settings) as run:
            run.first_step()
            for _ in range(steps):
                run.step()
            run.finish()
        figures[run.name] = run.figures
    return figures
