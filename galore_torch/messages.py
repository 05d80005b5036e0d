"""Warnings that point at the caller, and the nearest right name for a wrong one."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from galore_torch.units import first_of

_INSIDE = tuple(f"{folder}/" for folder in (Path(__file__).parent.as_posix(), Path(torch.__file__).parent.as_posix()))


def warn(message: str) -> None:
    """Warns at the line of the program that called this library, however deep the cause lies.

    Args:
        message: what is not as the caller may think, and the remedy.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and Path(frame.f_code.co_filename).as_posix().startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level - 1 if frame.f_back is None else level)


def nearest(wrong: str, names: Collection[str], cutoff: float = 0.6) -> str | None:
    """The right name that is nearest to a wrong one.

    Args:
        wrong: what was written.
        names: what could have been.
        cutoff: likeness from which on a name is offered, from 0 to 1.

    Returns:
        One of the names: equal but for case, alike, or sharing a word between underscores; or None.

    Example:
        >>> nearest("Rank", ["rank", "scale"]), nearest("gap", ["rank", "update_proj_gap"]), nearest("x", ["rank"])
        ('rank', 'update_proj_gap', None)
    """
    lowered = {name.lower(): name for name in names}
    word = wrong.lower().replace("-", "_")
    for candidate in (word, word.removeprefix("galore_")):
        close = difflib.get_close_matches(candidate, lowered, 1, cutoff)
        if close:
            return lowered[close[0]]
    sharing = [name for low, name in lowered.items() if set(low.split("_")) & set(word.split("_"))]
    return sharing[0] if cutoff <= 0.6 and len(sharing) == 1 else None


def did_you_mean(wrong: str, names: Collection[str]) -> str:
    """The end of a message about an unknown name: the nearest one, or all there are.

    Args:
        wrong: what was written.
        names: what could have been.

    Returns:
        Some words, without a full stop.
    """
    close = nearest(wrong, names)
    return f"did you mean {close}?" if close else f"use one of {', '.join(names)}"


def collapse_indices(names: Iterable[str]) -> list[str]:
    """Names with `*` for their numbers, each once: as many for a deep model as for a shallow one.

    Names that are numbers alone, as `nn.Sequential` gives them, stay as they are.

    Args:
        names: of modules or parameters.

    Returns:
        The names, sorted.
    """
    return sorted({re.sub(r"\d+", "*", name) if re.search(r"[^\d.]", name) else name for name in names})


def list_names(names: Iterable[str], most: int) -> str:
    """Names for a message, as `collapse_indices` has them.

    Args:
        names: of modules or parameters.
        most: how many are shown.

    Returns:
        The names, with commas.
    """
    return first_of(collapse_indices(names), most)
