"""Contenders as child processes: all alive at once, so that their steps can be timed in turn, round after round."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from benchmarks.contender import Request
from benchmarks.peers import APOLLO, GALORE_1, Peer, environment

FOLDER = Path(__file__).parent
PEER_OF: dict[str, Peer] = {"galore-torch 1.0": GALORE_1, "apollo-torch 1.0.3": APOLLO}


Running = TypeVar("Running", bound="Child")


class Child:
    """A script that answers commands (`serving.py`); a context manager that ends its process.

    Args:
        name: What messages call it.
        script: Its file in this folder.
        request: The script's argument.
        peer: What it imports in place of ours.
        settings: Environment variables of its own.

    Raises:
        RuntimeError: its peer is not installed.
    """

    def __init__(
        self,
        name: str,
        script: str,
        request: dict[str, Any],
        peer: Peer | None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, str(FOLDER / script), json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env={**environment(peer), **(settings or {})},
        )

    def ask(self, command: str) -> dict[str, float]:
        """Return the answer to a command.

        Raises:
            RuntimeError: the process has died; the message ends with what it last said.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: reading finds no answer
        answer = self._process.stdout.readline()
        if not answer:
            self._complaints.seek(0)
            raise RuntimeError(f"{self.name} died while asked for {command!r}:\n{self._complaints.read()[-2000:]}")
        figures: dict[str, float] = json.loads(answer)
        return figures

    def __enter__(self: Running) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._complaints):
            assert stream is not None
            stream.close()


class Contender(Child):
    """A running contender of the step benchmark.

    Args:
        request: What it is to be.

    Raises:
        RuntimeError: its peer is not installed.
    """

    def __init__(self, request: Request) -> None:
        super().__init__(request.contender, "contender.py", asdict(request), PEER_OF.get(request.contender))

    def step(self) -> dict[str, float]:
        """Take one step; return the seconds of each of its parts."""
        return self.ask("step")

    def memory(self) -> dict[str, float]:
        """Return the bytes that it keeps beside weights and gradients: "state" and "counters"."""
        return self.ask("memory")
