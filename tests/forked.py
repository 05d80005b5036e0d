"""Processes that a server forks: they have what takes longer to import than they take to run.

The servers are forked themselves, from pytest once it has collected: by then it has imported most of what they need.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from tests.waiting import DEADLINE

CONTEXT = multiprocessing.get_context("forkserver")


class Server:
    """A server of its own, for `multiprocessing` has one for everybody.

    Args:
        modules: what it imports when it is first asked for a process.
    """

    def __init__(self, *modules: str) -> None:
        self._server = forkserver.ForkServer()
        self._modules = [*modules, "tests.frozen"]

    def fork(self) -> None:
        """Fork it from this process, with what that has imported; as `ensure_running` starts one by itself."""
        resource_tracker.ensure_running()
        sys.stdout.flush()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(connection.arbitrary_address("AF_UNIX"))
        listener.listen()
        alive, held = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _leave_pytest({listener.fileno(), alive, resource_tracker.getfd()})
                _preempt_no_other()
                asked, _, _ = select.select([listener, alive], [], [])
                if listener in asked:  # and pytest has not ended without a word, so that nothing is to be imported
                    forkserver.main(listener.detach(), alive, self._modules)
            finally:
                os._exit(0)
        self._server._forkserver_address = listener.getsockname()
        self._server._forkserver_alive_fd = held
        self._server._forkserver_pid = pid
        os.close(alive)
        listener.close()

    def start(self, target: Callable[..., Any], *args: Any, daemon: bool = False) -> BaseProcess:
        """Start a process that calls a function of a module."""
        process = CONTEXT.Process(target=target, args=args, daemon=daemon)
        with self.forking():
            process.start()
        return process

    @contextmanager
    def forking(self) -> Iterator[None]:
        """Have it fork what is started in `CONTEXT` meanwhile."""
        others = forkserver.connect_to_new_process
        forkserver.connect_to_new_process = self._server.connect_to_new_process
        try:
            yield
        finally:
            forkserver.connect_to_new_process = others

    def children(self, since: float = 0.0) -> list[psutil.Process]:
        """What it has forked from a time on, in seconds of the epoch, and still runs."""
        forked = psutil.Process(self._server._forkserver_pid).children(recursive=True)
        return [one for one in forked if one.create_time() >= since]


def _leave_pytest(ours: set[int]) -> None:
    """In a process that was forked from pytest: log to stderr, not to what it reads, and hold no end of its pipes."""
    for descriptor in (int(path.name) for path in Path("/dev/fd").iterdir()):
        with suppress(OSError):  # the one that listed them
            if descriptor > 2 and descriptor not in ours and stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                os.close(descriptor)
    for logger in map(logging.getLogger, ["", *logging.root.manager.loggerDict]):
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)


def _preempt_no_other() -> None:
    """On Linux, let no thread take the core of another as soon as it is woken.

    A thread of gloo that wakes while another of its process holds the lock spins until that one runs again: four
    processes on two cores took a quarter more.
    """
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


TORCH = Server(
    "tests.distributed.trained", "pytest", "typer",
    "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict",
)  # fmt: skip
"""Of those that need torch alone; with what DDP imports when it is made."""

TRAINING = Server(
    "galore_torch.cli", "galore_torch.training.pretrain.run", "galore_torch.training.finetune.run",
    "torch.distributed.fsdp", "torch.distributed.run", "scipy.io", "matplotlib.backends.backend_agg",
    "tests.training.unplanned", "tests.training.warmed",
)  # fmt: skip
"""Of those that train by the command line; with what they import and make on their way."""


class Galore:
    """`galore ARGUMENTS` in a process of its own, with what `subprocess.Popen` has; all that it starts is forked too.

    Args:
        *arguments: of the command line.
        before: a function of a module, which the process calls first.
    """

    def __init__(self, *arguments: object, before: Callable[[], object] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._said = [Path(self._folder.name) / stream for stream in ("stdout", "stderr")]
        self._begun = time.time() - 0.1  # the clock of processes ticks in hundredths
        self._process = TRAINING.start(_be_galore, [str(each) for each in arguments], self._said, before)

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def wait(self, seconds: float) -> None:
        """Wait for its end, no longer than that."""
        self._process.join(seconds)

    def kill_with_children(self) -> None:
        """As when the machine goes down."""
        for one in TRAINING.children(self._begun):
            one.kill()
        self._process.join()

    def output(self) -> str:
        """What it has written to stdout so far."""
        return self._said[0].read_text(encoding="utf-8") if self._said[0].exists() else ""

    def communicate(self, timeout: float = DEADLINE) -> tuple[str, str]:
        """Wait for its end: what it wrote to stdout and to stderr."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "the deadline has passed"
        output, error = (path.read_text(encoding="utf-8") for path in self._said)
        return output, error


def galore(*arguments: object, before: Callable[[], object] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `galore ARGUMENTS` to its end."""
    process = Galore(*arguments, before=before)
    output, error = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode or 0, output, error)


def _be_galore(arguments: list[str], said: list[Path], before: Callable[[], object] | None) -> None:
    begin(said)
    from galore_torch.cli import main
    from galore_torch.training.compare import process

    process._SPAWN = CONTEXT  # type: ignore[assignment]
    sys.argv = ["galore", *arguments]
    if before is not None:
        before()
    main()


def begin(said: list[Path]) -> None:
    """Let a process write to files (for stdout, for stderr), hear Ctrl-C, and fork from where it came from."""
    for stream, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    forkserver._forkserver.ensure_running = lambda: None
