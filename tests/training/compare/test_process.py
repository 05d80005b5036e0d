"""Functions in processes of their own: what comes back of them, and that none outlives the process that called it."""

import os
import signal
import threading
import time

import pytest
from rich.console import Console

from galore_torch import messages
from galore_torch.training.compare import process
from galore_torch.training.compare.process import ProcessDiedError, call_in_process
from galore_torch.training.run.signals import Stop, exit_status
from tests.forked import CONTEXT, TORCH, begin
from tests.waiting import DEADLINE


class TwoWordsError(Exception):
    """One that cannot be pickled back: its constructor wants two arguments and keeps neither."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def call(function, *args, log):
    return call_in_process(function, *args, log=log, console=Console(quiet=True))


@pytest.fixture
def forked(monkeypatch):
    """Processes that start at once: a new one imports torch first."""
    monkeypatch.setattr(process, "_SPAWN", CONTEXT)
    with TORCH.forking():
        yield


def whoami(name, console):
    print(f"hello {name}")
    console.print("shown")
    messages.warn("told")
    return name, os.getpid(), os.getsid(0)


def fail(console):
    raise ValueError("rank = 0 is out of range")


def fail_in_two_words(console):
    raise TwoWordsError("no", "luck")


def die(console):
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_to_be_stopped(begun, console):
    begun.touch()
    end = time.monotonic() + DEADLINE
    try:
        while time.monotonic() < end:
            time.sleep(0.01)
    except BaseException:  # and not where it was left alone until the deadline
        begun.unlink()
        raise


def test_what_a_function_returns_comes_back_from_a_process_and_session_of_its_own(tmp_path):
    name, child, session = call(whoami, "you", log=tmp_path / "log")
    assert (name, session) == ("you", child)
    assert child != os.getpid()
    assert (tmp_path / "log").read_text().splitlines() == ["hello you", "shown", "warning: told"]


def test_what_a_function_raises_comes_back_as_it_is(forked, tmp_path):
    with pytest.raises(ValueError, match=r"^rank = 0 is out of range$"):
        call(fail, log=tmp_path / "log")
    assert "Traceback" in (tmp_path / "log").read_text()
    with pytest.raises(RuntimeError, match="TwoWordsError: no luck"):
        call(fail_in_two_words, log=tmp_path / "log")


def test_a_killed_process_is_an_error_with_its_signal_and_last_line(forked, tmp_path):
    with pytest.raises(ProcessDiedError, match="SIGKILL: the last words"):
        call(die, log=tmp_path / "log")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_function_first_and_then_stops_its_caller(number, forked, tmp_path):
    begun = tmp_path / "begun"

    def signal_us():
        until(begun.exists)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=signal_us)
    thread.start()
    with pytest.raises(Stop):
        call(wait_to_be_stopped, begun, log=tmp_path / "log")
    thread.join()
    assert exit_status() == 128 + number
    assert not begun.exists()


def test_a_function_ends_when_the_process_that_called_it_is_killed(tmp_path):
    begun = tmp_path / "begun"
    caller = TORCH.start(call_and_wait, begun, tmp_path)
    until(begun.exists)
    caller.kill()
    caller.join()
    until(lambda: not begun.exists())


def call_and_wait(begun, folder):
    begin([folder / "stdout", folder / "stderr"])
    process._SPAWN = CONTEXT
    call(wait_to_be_stopped, begun, log=folder / "log")


def until(met):
    end = time.monotonic() + DEADLINE
    while not met():
        assert time.monotonic() < end
        time.sleep(0.005)
