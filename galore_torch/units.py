"""How bytes, bandwidths, seconds, names and errors are written for people, and read: ``24GB``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str, name: str = "memory") -> int:
    """The bytes that a size says.

    Args:
        text: a number and a unit: B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024).
        name: of the setting, for the error.

    Raises:
        ValueError: no number, no unit, an unknown one, or nothing at all.

    Example:
        >>> parse_bytes("24GB"), parse_bytes("1.5 GiB")
        (24000000000, 1610612736)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"{name} = {text!r} is no size; give a number with a unit, such as 200MB, 24GB or 24GiB.")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def parse_bandwidth(text: str) -> float:
    """The bytes a second that a bandwidth says.

    Args:
        text: a number and a unit, in powers of 1000: kbit, mbit, gbit, tbit of any case, or kB/s, MB/s, GB/s, TB/s.

    Raises:
        ValueError: no number, no unit, an unknown one, or nothing at all.

    Example:
        >>> parse_bandwidth("100mbit"), parse_bandwidth("25 GB/s")
        (12500000.0, 25000000000.0)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)([bB]it(?:/s)?|B/s)\s*", text)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"bandwidth = {text!r} is none; give a number with a unit, such as 10gbit or 25GB/s.")
    return float(found[1]) * _UNITS[found[2].lower()] / (1 if found[3] == "B/s" else 8)


def parse_tokens(text: str) -> float:
    """The tokens that a number says.

    Args:
        text: a number, or one and K, M, B or T of any case, in powers of 1000.

    Raises:
        ValueError: no number above 0, or another unit.

    Example:
        >>> parse_tokens("20B"), parse_tokens("1.5t"), parse_tokens("20e9")
        (20000000000.0, 1500000000000.0, 20000000000.0)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*([kmbt]?)\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"tokens = {text!r} is no number of tokens; give one such as 20B, 300M or 20e9.")
    return float(found[1]) * _UNITS[found[2].lower().replace("b", "g")]


def readable(count: float) -> str:
    """Bytes for people, in powers of 1000.

    Args:
        count: bytes, of either sign.

    Example:
        >>> readable(116_147_200), readable(13_476_839_424), readable(0)
        ('116.1 MB', '13.48 GB', '0')
    """
    size = abs(count)
    for unit, factor, digits in (("GB", 10**9, 2), ("MB", 10**6, 1), ("kB", 10**3, 1)):
        if size >= factor:
            return f"{count / factor:,.{digits}f} {unit}"
    return f"{count:.0f} B" if count else "0"


def duration(seconds: float) -> str:
    """Seconds for people.

    Example:
        >>> duration(3725.4)
        '1:02:05'
    """
    return str(timedelta(seconds=round(seconds)))


def sentence(error: BaseException) -> str:
    """What an error says, ended by one full stop."""
    return f"{str(error).strip().rstrip('.')}."


def first_of(names: Sequence[object], most: int = 3) -> str:
    """The first of some names or numbers, for a message, and how many more there are.

    Args:
        names: in the order in which they are shown.
        most: how many are shown.

    Example:
        >>> first_of(["a", "b", "c", "d"])
        'a, b, c, and 1 more'
    """
    more = len(names) - most
    return ", ".join(map(str, names[:most])) + (f", and {more:,} more" if more > 0 else "")
