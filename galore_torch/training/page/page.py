"""One page of HTML that stands alone: text, tables and figures, light or dark as the reader's screen is.

Nothing is fetched: style and figures are inside. A table or a figure that is wider than a phone scrolls in its own box.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import matplotlib as mpl

from galore_torch.training.page.template import TEMPLATE
from galore_torch.training.run.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_BLACK = "#000000"


class Page:
    """A page that is filled from top to bottom and then written. All text is escaped.

    Args:
        title: the page's name and first heading.
        lead: a sentence or two below it.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title, self.lead = title, lead
        self._blocks: list[dict[str, Any]] = []
        self._figures = 0

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._blocks.append({"kind": "heading", "text": text})

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._blocks.append({"kind": "text", "text": text})

    def code(self, text: str) -> None:
        """Add lines as they are, in a type of one width."""
        self._blocks.append({"kind": "code", "text": text})

    def facts(self, facts: Mapping[str, object]) -> None:
        """Add names with their values, one a line."""
        self._blocks.append({"kind": "facts", "facts": {name: str(value) for name, value in facts.items()}})

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "", words: int = 1
    ) -> None:
        """Add a table.

        Args:
            columns: their headings.
            rows: their cells, each as many as there are columns.
            caption: what the table is, above it.
            words: how many columns from the left hold words; the others hold numbers, which end at one line.

        Raises:
            ValueError: when a row has more or fewer cells than there are columns.
        """
        cells = [[str(cell) for cell in row] for row in rows]
        for row in cells:
            if len(row) != len(columns):
                wanted = f"{len(columns)} columns; give one for each of {', '.join(columns)}."
                raise ValueError(f"row = {row!r} has {len(row)} cells for {wanted}")
        block = {"kind": "table", "columns": list(columns), "rows": cells, "caption": caption, "words": words}
        self._blocks.append(block)

    def figure(self, figure: Figure, caption: str) -> None:
        """Add a figure, best made by `galore_torch.training.run.plots.new_axes`, and below it what can be seen.

        What it draws in black takes the color of the page's text.
        """
        self._figures += 1
        svg = inline_svg(figure, f"figure{self._figures}", caption)
        self._blocks.append({"kind": "figure", "svg": svg, "caption": caption})

    def render(self) -> str:
        """The page as HTML."""
        from jinja2 import Environment  # comes with torch

        template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
        return template.render(title=self.title, lead=self.lead, blocks=self._blocks)

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        write_whole(path, self.render())


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an ``<svg>`` element to stand inside a page.

    Args:
        figure: of matplotlib; black becomes the color of the surrounding text, its background is taken away.
        name: what all of its ids begin with; two figures of a page need two names.
        label: what a screen reader says.

    Returns:
        The element, the same text for the same figure.
    """
    drawn = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = ElementTree.fromstring(drawn.getvalue())
    for parent in list(svg.iter()):
        for child in list(parent):  # matplotlib's style sheet would style the whole page
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in svg.iter():
        for key, value in list(element.attrib.items()):
            element.set(key, _attribute(key, value, name))
    for size in ("width", "height"):
        svg.attrib.pop(size, None)
    svg.set("role", "img")
    svg.set("aria-label", label)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(svg, encoding="unicode")


def _attribute(key: str, value: str, name: str) -> str:
    """An attribute's value with ids under the figure's name and black as the text's color."""
    if key == "id":
        return f"{name}-{value}"
    if key == _LINK:
        return value.replace("#", f"#{name}-", 1)
    return value.replace("url(#", f"url(#{name}-").replace(_BLACK, "currentColor")
