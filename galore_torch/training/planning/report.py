"""What ``galore plan`` shows: its table, its notes, its page with a chart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from galore_torch.memory import KINDS, MemoryPlan
from galore_torch.training.page.page import Page
from galore_torch.training.planning.plans import GB, HEADINGS, LEGEND, MB, cells, notes
from galore_torch.training.planning.subject import Subject
from galore_torch.training.run.plots import COLORS, GRAY, new_axes
from galore_torch.units import readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The plans of a model.

    Attributes:
        subject: what is planned.
        found: the plan by method.
        memory: what there is, in bytes; None if nobody said.
        best: the method that fits and gives up least.
        instead: where none fits, a method, the settings under which it was tried and its plan then.
    """

    subject: Subject
    found: Mapping[str, MemoryPlan]
    memory: int | None
    best: str | None
    instead: tuple[str, dict[str, Any], MemoryPlan] | None

    @property
    def title(self) -> str:
        """The model and its batch."""
        first = next(iter(self.found))
        config, one = self.subject.settings(first), self.found[first]
        rows = f"{config.micro_batch} sequences of {config.data.seq} tokens at once"
        return f"{self.subject.name}: {one.parameters:,} parameters in {self.subject.model.dtype}, {rows}"

    @property
    def unit(self) -> float:
        """Of the table's figures, in bytes."""
        return GB if max(one.peak_bytes for one in self.found.values()) >= GB else MB

    @property
    def columns(self) -> list[str]:
        """The headings of the table."""
        return ["GB" if self.unit == GB else "MB", *(HEADINGS if self.memory is not None else HEADINGS[:-1])]

    @property
    def rows(self) -> list[list[str]]:
        """Its rows."""
        return [[name, *cells(one, self.memory, self.unit)] for name, one in self.found.items()]

    @property
    def texts(self) -> list[str]:
        """What is said below it."""
        lines = [LEGEND, *notes(self.found, self.memory, self.best)]
        if self.instead is not None and self.memory is not None:
            method, given, one = self.instead
            flags = " ".join(
                f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}" for name, value in given.items()
            )
            lacks = one.peak_bytes - self.memory
            end = "fits" if lacks <= 0 else f"lacks {readable(lacks)}: the smallest plan there is"
            lines.append(
                f"None fits {readable(self.memory)}. {method} with {flags}: {readable(one.peak_bytes)}, {end}."
            )
        return lines

    def as_json(self) -> dict[str, Any]:
        """All of it for a script."""
        instead = None
        if self.instead is not None:
            instead = {"method": self.instead[0], "settings": self.instead[1], **self.instead[2].as_json()}
        return {
            "model": self.subject.name,
            "memory_bytes": self.memory,
            "best": self.best,
            "instead": instead,
            "methods": {name: one.as_json() for name, one in self.found.items()},
        }


def page(planned: Planned, command: str) -> Page:
    """A page with the table and a stacked bar for each method; it says the command by which it was made."""
    made = Page("Memory, planned", planned.title)
    made.table(planned.columns, planned.rows)
    for text in planned.texts:
        made.text(text)
    made.figure(chart(planned), "What there is of each kind at the moment when a method needs the most.")
    made.heading("How it was made")
    made.code(command)
    return made


def chart(planned: Planned) -> Figure:
    """A stacked bar for each method, and a line for what there is."""
    names = list(planned.found)[::-1]
    figure, axes = new_axes("GB", "", size=(5.8, 1.2 + 0.28 * len(names)))
    start = [0.0] * len(names)
    for kind, color in zip(KINDS, COLORS, strict=False):
        widths = [planned.found[name].peak[kind] / 1e9 for name in names]
        axes.barh(names, widths, left=start, color=color, label=kind)
        start = [one + width for one, width in zip(start, widths, strict=True)]
    if planned.memory is not None:
        axes.axvline(planned.memory / 1e9, color=GRAY, linestyle="--")
    axes.legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure
