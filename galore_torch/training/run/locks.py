"""One process at a time, on every system: a lock that ends with the process, and who holds it."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from galore_torch.training.run.files import write_whole


class Lock:
    """A file that at most one process has locked. The system frees it when that process ends, however it ends.

    Args:
        path: the lock's file. Its folder must exist when the lock is acquired. Beside it stands, for messages alone,
            a file that says who holds it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.lock"
        >>> one, other = Lock(path), Lock(path)
        >>> one.acquire(), other.acquire(), f"process {os.getpid()} on" in other.holder()
        (True, False, True)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(str(path), thread_local=False)

    @property
    def files(self) -> tuple[Path, Path]:
        """All that it leaves in its folder: the lock's file and the one with the holder."""
        return self.path, self.path.with_suffix(".holder")

    @property
    def is_held(self) -> bool:
        """Whether this object holds it."""
        return self._lock.is_locked

    def acquire(self, *, waiting: Callable[[str], None] | None = None) -> bool:
        """Lock it.

        Args:
            waiting: called with the holder before an unlimited wait, where another process holds it; None not to wait.

        Returns:
            Whether it is held now.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            if waiting is None:
                return False
            waiting(self.holder())
            self._lock.acquire()
        command = " ".join(["galore", *sys.argv[1:2]])
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        write_whole(self.files[1], f"process {os.getpid()} on {socket.gethostname()} ({command}, since {since})\n")
        return True

    def holder(self) -> str:
        """Who holds it, for a message."""
        try:
            return self.files[1].read_text(encoding="utf-8").strip() or "another process"
        except (OSError, ValueError):  # it has only just been acquired
            return "another process"

    def release(self, *, remove: bool = False) -> None:
        """Free it; nothing happens if this object does not hold it.

        Args:
            remove: remove its file too, which nobody may be waiting for.
        """
        if not self.is_held:
            return
        path, holder = self.files
        holder.unlink(missing_ok=True)
        if remove:  # while it is held: whoever has opened it meanwhile sees that it is gone, and makes a new one
            with suppress(PermissionError):  # Windows removes no open file
                path.unlink(missing_ok=True)
        self._lock.release()
        if remove and os.name == "nt":
            with suppress(OSError):
                path.unlink(missing_ok=True)
