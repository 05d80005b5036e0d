"""The score by which methods are compared: perplexity, of which less is better, or a task's, of which more is."""

from __future__ import annotations

import math
from dataclasses import dataclass

LOSS = "eval_loss"
"""The field of a final record that decides where no score of a task does."""


@dataclass(frozen=True)
class Score:
    """What the runs are judged by.

    Attributes:
        name: as the final records have it.
    """

    name: str

    @property
    def more_is_better(self) -> bool:
        """Whether it is a task's score."""
        return self.name != "perplexity"

    @property
    def loss_label(self) -> str:
        """What the loss is, for an axis."""
        return "loss" if self.more_is_better else "loss (nats per token)"

    @property
    def beside_full(self) -> str:
        """How a method is put beside full rank, for a column."""
        return "points to full" if self.more_is_better else "ratio to full"

    def compared(self, own: float, full: float) -> str:
        """A method's score beside that of full rank.

        >>> Score("perplexity").compared(15.0, 10.0), Score("accuracy").compared(0.875, 0.9)
        ('1.500', '-2.5')
        """
        if not (math.isfinite(own) and math.isfinite(full)):
            return ""
        return f"{100 * (own - full):+.1f}" if self.more_is_better else f"{own / full:.3f}"


def shown(name: str, value: float | None, spread: float | None = None) -> str:
    """A score for people, with its spread over seeds if there is one.

    >>> shown("perplexity", 1234.567, 1.5), shown("accuracy", 0.91)
    ('1,234.57 ±1.50', '0.9100')
    """
    if value is None or not math.isfinite(value):
        return "not finite"
    digits = ",.2f" if name == "perplexity" else ".4f"
    return f"{value:{digits}}" + ("" if spread is None else f" ±{spread:{digits}}")
