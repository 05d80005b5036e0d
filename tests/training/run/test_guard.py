"""Signals at any moment of a real command: a saved state or an untouched folder, and a line that says which."""

import contextlib
import os
import re
import signal
from collections.abc import Iterator

import pytest
import typer

from galore_torch.training.run import records
from galore_torch.training.run.checkpoints import step_of
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.signals import Screen, deferred, exit_status, stop_if_asked, stoppable
from tests.training.during import last_record
from tests.training.signalled import MOMENTS, signalled


def send(number=signal.SIGINT):
    signal.raise_signal(number)


@pytest.fixture
def as_in_a_terminal() -> Iterator[None]:
    """Hear of a closed terminal also where the tests themselves were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_body_and_says_what_is_left(number, capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(typer.Exit) as stopped, stoppable(lambda: "nothing is left"):
        send(number)
    assert stopped.value.exit_code == 128 + number
    assert "nothing is left" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable(lambda: pytest.fail("not stopped")):
            send(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def unread():
    """A stream whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        yield stream


def test_a_reader_that_went_away_is_a_signal(unread, capsys):
    with pytest.raises(typer.Exit) as stopped, stoppable(lambda: "nothing is left"):
        Screen(file=unread).print("a line")
    assert stopped.value.exit_code == 128 + signal.SIGPIPE
    assert "nothing is left" in capsys.readouterr().err


def test_what_is_being_written_ends_first_also_without_a_reader(unread):
    screen = Screen(file=unread)
    with deferred():
        screen.print("a line")
        screen.print("another")
    assert exit_status() == 128 + signal.SIGPIPE


def test_a_signal_that_a_library_swallowed_stops_at_the_next_look(capsys):
    def swallows():
        with contextlib.suppress(KeyboardInterrupt):
            send()
        stop_if_asked()

    with pytest.raises(typer.Exit), stoppable(lambda: "stopped"):
        swallows()
    stop_if_asked()  # forgotten by now


def test_an_error_that_no_signal_caused_is_no_stop():
    with pytest.raises(ValueError, match="wrong"), stoppable(lambda: pytest.fail("not stopped")):
        raise ValueError("wrong")


def test_what_is_being_written_ends_first_and_a_second_signal_does_not_wait():
    done = []
    with deferred():
        send()
        done.append(1)
    assert done
    with pytest.raises(KeyboardInterrupt), deferred():
        [send() for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_run_leaves_a_state_or_nothing(moment, number, tiny, tmp_path):
    out, given = tmp_path / "run", tmp_path / "given.toml"
    given.write_text(tiny(steps=10, eval_every=0).to_toml(), encoding="utf-8")
    ended = signalled(number, moment, "pretrain", "--config", given, "--out", out)
    said, folder = ended.stdout + ended.stderr, RunFolder(out)
    assert "Traceback" not in said
    if moment == "end":
        assert ended.returncode == 0, said
        assert records.final(folder.metrics)
        assert folder.model.exists()
        return
    assert ended.returncode == 128 + number, said
    assert re.search(r"[Ss]topped", said)
    if moment == "step":
        assert 5 <= step_of(folder.checkpoints.newest()) == last_record(folder.metrics)["step"] < 10
        assert f"resume with:\n  galore pretrain --resume --out {out}" in said
    else:
        assert not out.exists()
