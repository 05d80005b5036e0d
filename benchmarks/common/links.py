"""Links between processes, in tc's words."""


def seconds_allowed(bytes_sent: float, link: str) -> float | None:
    """Return the least time in which so many bytes cross a link, such as "100mbit"; None if it is no bandwidth.

    >>> seconds_allowed(25e6, "100mbit")
    2.0
    """
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
    unit = next((unit for unit in units if link.endswith(unit)), None)
    return None if unit is None else bytes_sent * 8 / (float(link.removesuffix(unit)) * units[unit])
