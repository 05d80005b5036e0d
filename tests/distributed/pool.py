"""Processes that stay for many cases, for starting one takes seconds. Each case makes its own process group."""

from __future__ import annotations

import datetime
import gc
import queue
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing  # tensors go through queues

from tests.forked import CONTEXT, TORCH, Server
from tests.waiting import DEADLINE

COLLECTIVE = 60
"""Seconds that a process waits for the others."""


class Pool:
    """Up to four processes, which run functions of modules.

    Args:
        size: how many.
        server: which forks them, with what it has imported.
    """

    def __init__(self, size: int = 4, server: Server = TORCH) -> None:
        self._server = server
        self._folder = tempfile.TemporaryDirectory()
        self._size = size
        self._case = 0
        self._processes: list[Any] = []

    def _start(self) -> None:
        self._answers = CONTEXT.Queue()
        self._questions = [CONTEXT.Queue() for _ in range(self._size)]
        self._processes = [
            self._server.start(_serve, rank, questions, self._answers, daemon=True)
            for rank, questions in enumerate(self._questions)
        ]

    def run(self, case: Callable[..., Any], world: int, **given: Any) -> list[Any]:
        """What a case returns in each of some processes.

        Args:
            case: a function of a module, called with its rank, how many there are, and what is given.
            world: how many.
            **given: for it.

        Raises:
            RuntimeError: it raised, or was not done in time.
        """
        answers = self.ask(case, world, **given)
        wrong = [answer for answer in answers if isinstance(answer, Raised)]
        if wrong:
            raise RuntimeError(f"{case.__name__} on {world}: {wrong[0].text}")
        return answers

    def ask(self, case: Callable[..., Any], world: int, *, survivors: int | None = None, **given: Any) -> list[Any]:
        """The same, with what was raised among the answers; None of a process that is not to answer."""
        if not self._processes:
            self._start()
        self._case += 1
        store = str(Path(self._folder.name) / f"store{self._case}")
        for questions in self._questions[:world]:
            questions.put((self._case, case, world, store, given))
        answers: list[Any] = [None] * world
        try:
            for _ in range(world if survivors is None else survivors):
                number, rank, answer = self._answers.get(timeout=DEADLINE)
                assert number == self._case
                answers[rank] = answer
        except queue.Empty:
            self.close()
            raise RuntimeError(f"{case.__name__} on {world} was not done in {DEADLINE} s") from None
        return answers

    def close(self) -> None:
        """Ends the processes; the next case starts others."""
        for process in self._processes:
            process.kill()
        self._processes = []


class Raised:
    """What a process raised.

    Attributes:
        kind: the name of the error's class.
        text: its message, and where.
    """

    def __init__(self, error: BaseException) -> None:
        self.kind = type(error).__name__
        self.text = f"{self.kind}: {error}\n{''.join(traceback.format_exc()[-3000:])}"


def _serve(rank: int, questions: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    timeout = datetime.timedelta(seconds=COLLECTIVE)
    while True:
        number, case, world, store, given = questions.get()
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
            dist.barrier()  # one that raises at once would be gone while others still connect to it
            answer = case(rank, world, **given)
            dist.barrier()
        except BaseException as error:
            answer = Raised(error)
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # each group that is still alive has a thread, which looks for work a hundred times a second
        answers.put((number, rank, answer))


def assert_every_process_raises(answers: Sequence[Any], words: str) -> None:
    """Hold every process to a ValueError that says what is wrong."""
    for answer in answers:
        assert answer is not None
        assert answer.kind == "ValueError"
        assert words in answer.text
