"""Processes of a benchmark's own: each builds what it is asked for, and answers commands until it is ended.

All that are wanted are alive at once, so that their steps can be timed in turn, and each may import a published package
in place of ours. A command is a line, its answer a line of JSON.
"""

import json
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

Commands = Mapping[str, Callable[[], Mapping[str, Any]]]
"""What each command calls."""

Running = TypeVar("Running", bound="Worker")


class Worker:
    """One process, which serves commands; a context manager that ends it.

    Args:
        name: What messages call it.
        make: What makes the commands in the process, where it is unpickled.
        environment: Of the process; see `peers.environment`.
    """

    def __init__(self, name: str, make: Callable[[], Commands], environment: Mapping[str, str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        words = [sys.executable, __file__, pickle.dumps(make).hex()]  # with -m the checkout would precede a peer
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            words, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, env=environment
        )

    def ask(self, command: str, within_s: float | None = None) -> dict[str, Any]:
        """Return the answer to a command.

        Raises:
            RuntimeError: the process has died, or was killed as its time was up; the message ends with its last words.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(within_s or 0, self._process.kill)
        if within_s is not None:
            timer.start()
        with suppress(BrokenPipeError):  # it has died: reading finds no answer
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        timer.cancel()
        if not answer:
            self._errors.seek(0)
            raise RuntimeError(f"{self.name} died while asked for {command!r}:\n{self._errors.read()[-2000:]}")
        figures: dict[str, Any] = json.loads(answer)
        return figures

    def __enter__(self: Running) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def _serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not look like an answer
    here = str(Path(__file__).parent)
    sys.path[:] = [path for path in sys.path if path != here]  # modules here have longer names
    commands: Commands = pickle.loads(bytes.fromhex(sys.argv[1]))()
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
