"""How bytes, seconds and errors are written for people."""


def megabytes(count: int) -> str:
    """Bytes for people.

    >>> megabytes(24_900_000)
    '24.9 MB'
    """
    return f"{count / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(3725.4)
    '1:02:05'
    """
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{left:02d}"


def sentence(error: BaseException) -> str:
    """What an error says, ended by one full stop.

    >>> sentence(ValueError("no such file"))
    'no such file.'
    """
    return f"{str(error).strip().rstrip('.')}."
