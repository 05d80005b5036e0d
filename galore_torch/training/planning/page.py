"""The page of a plan, with a chart. It is apart from the table, which is shown without waiting for matplotlib."""

from __future__ import annotations

from matplotlib.figure import Figure

from galore_torch.memory import KINDS
from galore_torch.training.page.page import Page
from galore_torch.training.planning.report import GB, Planned
from galore_torch.training.run.plots import COLORS, GRAY, new_axes


def page_of(shown: Planned, command: str) -> Page:
    """A page with the table and a stacked bar for each method.

    Args:
        shown: what was planned.
        command: by which it was made.
    """
    made = Page("Memory, planned", shown.title)
    made.table(shown.columns, shown.rows)
    if shown.costs:
        made.table(shown.cost_columns, shown.cost_rows)
    for text in shown.texts:
        made.text(text)
    made.figure(chart(shown), "What there is of each kind at the moment when a method needs the most.")
    made.heading("How it was made")
    made.code(command)
    return made


def chart(shown: Planned) -> Figure:
    """A stacked bar for each method, and a line for what there is.

    Args:
        shown: what was planned.
    """
    names = list(shown.found)[::-1]
    figure, axes = new_axes("GB", "", size=(5.8, 1.2 + 0.28 * len(names)))
    start = [0.0] * len(names)
    for kind, color in zip(KINDS, COLORS, strict=False):
        widths = [shown.found[name].peak[kind] / GB for name in names]
        axes.barh(names, widths, left=start, color=color, label=kind)
        start = [one + width for one, width in zip(start, widths, strict=True)]
    if shown.memory is not None:
        axes.axvline(shown.memory / GB, color=GRAY, linestyle="--")
    axes.legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure
