"""Runs without what no test looks at but those that ask for it, by the fixtures `drawn` and `planned`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from galore_torch.training.run import machine, run

PLANNED_PEAK = machine.planned_peak


@contextmanager
def quickly() -> Iterator[None]:
    """Leave out the picture of a run's losses and the plan of its memory: each takes as long as to train a small model.

    Nor is a disk waited for: a run does at every record and checkpoint, and no test takes the power away.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "plot_losses", lambda label, metrics, picture, unit: picture.touch())
        patched.setattr(machine, "planned_peak", lambda *_: None)
        patched.setattr(os, "fsync", lambda _: None)
        yield
