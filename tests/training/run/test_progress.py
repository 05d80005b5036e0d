"""The steps of a Trainer as they are shown: the time that is left."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from galore_torch.training.run.callbacks import StepProgress


def told_left(seconds: list[float], every: int) -> list[float | None]:
    """What is told after each step to be left, in seconds, of steps that take so long."""
    screen = io.StringIO()
    progress, now = StepProgress(Console(file=screen, width=80), every=every), 100.0
    progress._bar.get_time = lambda: now
    for step, taken in enumerate(seconds, start=1):
        now += taken
        state = SimpleNamespace(global_step=step, max_steps=len(seconds))
        progress.on_log(None, state, None, logs={"loss": 1.0})
    lines = screen.getvalue().splitlines()
    assert len(lines) == len(seconds)
    found = (re.search(r"0:(\d\d):(\d\d) left$", line) for line in lines)
    return [None if one is None else 60 * int(one[1]) + int(one[2]) for one in found]


@pytest.mark.parametrize("pace", [0.5, 40.0])
def test_the_time_left_is_that_of_the_steps_to_come(pace):
    told = told_left([3 * pace, *[pace] * 19], every=1)
    assert told == [None, *(pytest.approx(pace * left, abs=0.5) for left in range(18, -1, -1))]


def test_where_one_of_five_steps_takes_longer_it_is_told_by_all_five():
    seconds = [1.0, 1.0, 1.0, 1.0, 10.0] * 4
    told = told_left(seconds, every=5)
    assert told[:4] == [None] * 4
    for step, left in enumerate(told[4:], start=5):
        assert left == pytest.approx(sum(seconds[step:]), rel=0.2), step
    assert told[-1] == 0
