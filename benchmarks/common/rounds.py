"""Processes of a benchmark's own, which step in turn, so that what else the machine does falls on all alike; or alone.

Each builds what it is asked for, and answers commands until it is ended. All that are wanted are alive at once, and
each may import a published package in place of ours.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.measuring import available_bytes, in_turn

Commands = Mapping[str, Callable[[], Mapping[str, Any]]]
"""What each command of a process calls."""

Advance = Callable[[str], None]
"""Called with a few words before each step."""

WARM_UP = 1  # ordinary steps that nobody counts


class Worker:
    """One process, which serves commands; a context manager that ends it.

    Args:
        name: What messages call it.
        make: What makes the commands in the process, where it is unpickled.
        folder: The process looks there first for modules, if it is told.
    """

    def __init__(self, name: str, make: Callable[[], Commands], folder: Path | None = None) -> None:
        self.name = name
        self._log = tempfile.NamedTemporaryFile("r")  # noqa: SIM115 - closed with the process
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, folder, self._log.name), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, command: str, within_s: float | None = None) -> dict[str, Any]:
        """Return the answer to a command.

        Raises:
            RuntimeError: the process has died, or was killed as its time was up; the message ends with its last words.
        """
        try:
            self._pipe.send(command)
            if not self._pipe.poll(within_s):
                self._process.kill()
            answer: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"{self.name} died while asked for {command!r}:\n{self._log.read()[-2000:]}") from None
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._log.close()


def _serve(pipe: Connection, make: Callable[[], Commands], folder: Path | None, log: str) -> None:
    with Path(log).open("w") as words:
        for standard in (1, 2):  # whatever a library prints is no part of the benchmark's report
            os.dup2(words.fileno(), standard)
    if folder is not None:
        sys.path.insert(0, str(folder))
    commands = make()
    while True:
        pipe.send(commands[pipe.recv()]())


Starts = Mapping[str, Callable[[], Worker]]
"""What starts each process, by its name; it answers "step" and "kept"."""


@dataclass(kw_only=True)
class RunFigures:
    """What a process answered. Figures that end in _s are the seconds of a step's parts, those in _bytes are bytes."""

    first: dict[str, float]  # of the first step, in which all state is made and all bases are found
    steps: dict[str, list[float]] = field(default_factory=dict)  # of every ordinary step
    beside_s: list[float] = field(default_factory=list)  # seconds of the first process's steps in the same rounds
    kept: dict[str, float] = field(default_factory=dict)  # what is kept between steps

    @property
    def first_s(self) -> float:
        """The seconds of the first step."""
        return _seconds(self.first)

    @property
    def parts_s(self) -> dict[str, float]:
        """The median seconds of each part of an ordinary step."""
        return {name: median(values) for name, values in self.steps.items() if name.endswith("_s")}

    @property
    def step_s(self) -> float:
        """The median seconds of an ordinary step: the sum of its parts."""
        return sum(self.parts_s.values())

    @property
    def gain(self) -> float:
        """How often it steps while the first process steps once, in the same rounds."""
        return median(self.beside_s) / self.step_s

    @property
    def highest_bytes(self) -> float:
        """The most memory above the weights in any step, the first included, where that is told."""
        return max([self.first.get("peak_bytes", 0), *self.steps.get("peak_bytes", [])])

    @property
    def largest_bytes(self) -> float:
        """The most that the process took so far, weights included."""
        return self.highest_bytes + self.kept.get("weight_bytes", 0)


def _seconds(answer: Mapping[str, float]) -> float:
    return sum(value for name, value in answer.items() if name.endswith("_s"))


def interleaved(
    starts: Starts, rounds: int, advance: Advance, device: str = "cpu", each_round: Callable[[], None] = lambda: None
) -> dict[str, RunFigures]:
    """Measure processes that step in turn; `each_round` is called before every round.

    All stay alive together while their device (cpu or cuda) has room for one more like the largest, whichever of them
    is at its peak. If not, they come in groups, and the first steps with each of them.

    Returns:
        Their figures, by name.
    """
    reference, *waiting = starts
    figures: dict[str, RunFigures] = {}
    workers: dict[str, Worker] = {}

    def start(name: str, stack: ExitStack) -> None:
        worker = workers[name] = stack.enter_context(starts[name]())
        figures[name] = replace(_begin(worker, WARM_UP, advance), steps={})

    with ExitStack() as outer:
        start(reference, outer)
        while waiting or not figures[reference].steps:
            with ExitStack() as inner:
                group, beside_s = [reference], list[float]()
                while waiting and (
                    len(group) == 1 or available_bytes(device) > 2 * max(figures[name].largest_bytes for name in group)
                ):
                    group.append(waiting.pop(0))
                    start(group[-1], inner)
                for number, name in enumerate(in_turn(group, rounds)):
                    if number % len(group) == 0:
                        each_round()
                    seconds = _step(workers[name], figures[name], advance)
                    if name == reference:
                        beside_s.append(seconds)
                for name in group:
                    figures[name].beside_s += beside_s
    return figures


def one_by_one(starts: Starts, steps: int, advance: Advance) -> dict[str, RunFigures]:
    """Measure processes one after the other, each alone in memory; steps are those after the first of each."""
    figures = {}
    for name, start in starts.items():
        with start() as worker:
            figures[name] = _begin(worker, steps, advance)
    return figures


def _begin(worker: Worker, steps: int, advance: Advance) -> RunFigures:
    """Take the first step and so many ordinary ones, and ask what is kept."""
    advance(f"{worker.name}, first step")
    figures = RunFigures(first=worker.ask("step"))
    for _ in range(steps):
        _step(worker, figures, advance)
    figures.kept = worker.ask("kept")
    return figures


def _step(worker: Worker, figures: RunFigures, advance: Advance) -> float:
    """Take an ordinary step that counts; return its seconds."""
    advance(worker.name)
    answer = worker.ask("step")
    for name, value in answer.items():
        figures.steps.setdefault(name, []).append(value)
    return _seconds(answer)
