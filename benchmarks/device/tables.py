"""What was measured, as tables: a row each, a column for each figure that any row of its kind has."""

from collections.abc import Iterable

from benchmarks.device.session import Figures, shown

WIDE = 44
"""Characters from which on a figure gets a line of its own below the table."""


def table(title: str, rows: dict[str, Figures]) -> str:
    """One part's rows as text.

    Args:
        title: The part.
        rows: Figures by row.

    Returns:
        Lines with aligned columns; figures that are long, such as lists, come below.

    Example:
        >>> print(table("steps", {"one": {"ms": 1.5}, "other": {"ms": 20, "note": None}}))
        steps
               ms   note
        one    1.5
        other  20   -
    """
    columns = list(dict.fromkeys(name for figures in rows.values() for name in _short(figures)))
    lines = [["", *columns]]
    lines += [[row, *(shown(_short(figures)[name]) if name in _short(figures) else "" for name in columns)]
              for row, figures in rows.items()]  # fmt: skip
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns) + 1)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([title, *text, *_notes(rows)])


def _short(figures: Figures) -> Figures:
    return {name: value for name, value in figures.items() if not _is_long(value)}


def _is_long(value: object) -> bool:
    return isinstance(value, (list, dict)) or len(shown(value)) > WIDE


def _notes(rows: dict[str, Figures]) -> Iterable[str]:
    for row, figures in rows.items():
        for name, value in figures.items():
            if _is_long(value) and value:
                words = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
                yield f"  {row}: {name}: {words}"
