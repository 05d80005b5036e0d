"""Which signals ask a command to stop, and what is written to where nobody reads any more.

The standard library alone is imported: the command line hears signals before anything else is there.
"""

from __future__ import annotations

import os
import signal

HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)
"""What a closed terminal sends; Windows does not have it."""

SIGNALS = tuple(dict.fromkeys((signal.SIGINT, signal.SIGTERM, HANGUP)))
"""What asks a command to stop."""


def heeded() -> list[signal.Signals]:
    """Those of `SIGNALS` that are heard: all, but for a closed terminal's where ``nohup`` has it ignored."""
    return [one for one in SIGNALS if one != HANGUP or signal.getsignal(one) != signal.SIG_IGN]


def write_nowhere(stream: int) -> None:
    """Let what is written to a stream go nowhere from now on.

    Args:
        stream: its number; 1 is stdout.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream)
    os.close(nowhere)
