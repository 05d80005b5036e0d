"""One page of HTML that stands alone: text, tables and figures, light or dark as the reader's screen is.

Nothing is fetched: style and figures are inside. A table or a figure that is wider than a phone scrolls in its own box.
``page.html`` is the template: of what it is given, only a figure's SVG is not escaped.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader

from galore_torch.training.run.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


class Page:
    """A page that is filled from top to bottom and then written. All text is escaped.

    Args:
        title: the page's name and first heading.
        lead: a sentence or two below it.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title, self.lead = title, lead
        self._blocks: list[dict[str, Any]] = []

    def _add(self, kind: str, **content: Any) -> None:
        self._blocks.append({"kind": kind, **content})

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._add("heading", text=text)

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._add("text", text=text)

    def code(self, text: str) -> None:
        """Add lines as they are, in a type of one width."""
        self._add("code", text=text)

    def facts(self, facts: Mapping[str, object]) -> None:
        """Add names with their values, one a line."""
        self._add("facts", facts=facts)

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        *,
        caption: str = "",
        words: int = 1,
        links: Sequence[str] = (),
    ) -> None:
        """Add a table.

        Args:
            columns: their headings.
            rows: their cells, each as many as there are columns.
            caption: what the table is, above it.
            words: how many columns from the left hold words; the others hold numbers, which end at one line.
            links: folders, from the page on, that the first cells of the rows lead to; none if empty.

        Raises:
            ValueError: when a row has more or fewer cells than there are columns.
        """
        rows = list(rows)
        for row in rows:
            if len(row) != len(columns):
                wanted = f"{len(columns)} columns; give one for each of {', '.join(columns)}."
                raise ValueError(f"row = {row!r} has {len(row)} cells for {wanted}")
        self._add("table", columns=columns, rows=rows, caption=caption, words=words, links=links)

    def figure(self, figure: Figure, caption: str) -> None:
        """Add a figure, best made by `galore_torch.training.run.plots.new_axes`, and below it what can be seen.

        What it draws in black takes the color of the page's text.
        """
        self._add("figure", svg=_inline_svg(figure, f"figure{len(self._blocks)}", caption), caption=caption)

    def render(self) -> str:
        """The page as HTML."""
        return _TEMPLATES.get_template("page.html").render(title=self.title, lead=self.lead, blocks=self._blocks)

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        write_whole(path, self.render())


def _inline_svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an ``<svg>`` element inside a page, the same text for the same figure.

    Its ids begin with a name of its own, a screen reader says the label, and black is the color of the text around it.
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
        for key, value in element.attrib.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == f"{{{_XLINK}}}href":
                value = value.replace("#", f"#{name}-", 1)
            element.set(key, value.replace("url(#", f"url(#{name}-").replace("#000000", "currentColor"))
    for size in ("width", "height"):
        del svg.attrib[size]
    svg.attrib |= {"role": "img", "aria-label": label}
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(svg, encoding="unicode")
