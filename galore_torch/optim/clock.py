"""`Clock`: what an optimizer's renewals have taken; not part of its state, for no two runs agree on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Clock:
    """The time of all renewals.

    Attributes:
        seconds: on the host, since the optimizer was made.
    """

    seconds: float = 0.0
