"""How bytes, seconds and errors are written for people."""

from datetime import timedelta


def megabytes(count: int) -> str:
    """Bytes: ``24.9 MB``."""
    return f"{count / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Seconds: ``1:02:05``."""
    return str(timedelta(seconds=round(seconds)))


def sentence(error: BaseException) -> str:
    """What an error says, ended by one full stop."""
    return f"{str(error).strip().rstrip('.')}."
