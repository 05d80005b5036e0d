"""Wait for what another process does: an event with a deadline, never a time."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

DEADLINE = 300  # seconds; far more than anything here takes, on a machine with other work to do


def wait_for(met: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    """Wait until a condition holds; fail if the process that is to make it hold ends before, or at the deadline."""
    end = time.monotonic() + DEADLINE
    while not met():
        assert process.poll() is None, f"ended with {process.poll()}: {process.communicate()}"
        assert time.monotonic() < end, "the deadline has passed"
        time.sleep(0.005)
