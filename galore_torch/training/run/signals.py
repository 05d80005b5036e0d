"""Who hears Ctrl-C and a cluster's SIGTERM for a while, and what is to end before it does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What asks a command to stop."""

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def handled_by(handler: Handler | signal.Handlers) -> Iterator[None]:
    """Let the signals go to a handler for a while. Only the main thread can; in others nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


@contextmanager
def held_back() -> Iterator[None]:
    """Let the body end, however it does, before a signal is heard by whoever hears signals now."""
    seen: list[int] = []
    try:
        with handled_by(lambda number, _frame: seen.append(number)):
            yield
    finally:
        for number in seen[:1]:
            signal.raise_signal(number)
