"""Signals at any moment of a real command: a saved state or an untouched folder, and a line that says which."""

import contextlib
import signal
import subprocess
import sys
import time

import pytest
import typer

from galore_torch.training import records
from galore_torch.training.guard import deferred, stop_if_asked, stoppable
from galore_torch.training.run_folder import RunFolder


def send(number=signal.SIGINT):
    signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_body_and_says_what_is_left(number, capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(typer.Exit) as stopped, stoppable(lambda: "nothing is left"):
        send(number)
    assert stopped.value.exit_code == 130
    assert "nothing is left" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


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


@pytest.mark.parametrize("moment", [0.3, 1.5, 4.0, "folder", "step", "end"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_run_leaves_a_state_or_nothing(moment, number, tiny, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "given.toml").write_text(tiny(steps=60, eval_every=0).to_toml(), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "galore_torch",
        "pretrain",
        "--config",
        str(tmp_path / "given.toml"),
        "--out",
        str(out),
    ]
    folder = RunFolder(out)
    reached = {
        "folder": out.exists,
        "step": lambda: (records.last(folder.metrics) or {"step": 0})["step"] >= 5,
        "end": folder.model.exists,
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        if isinstance(moment, float):
            time.sleep(moment)
        else:
            while not reached[moment]() and process.poll() is None:
                time.sleep(0.005)
        process.send_signal(number)
        said, _ = process.communicate(timeout=120)
    if records.final(folder.metrics):
        assert folder.model.exists()
    elif folder.last_checkpoint() is not None:
        assert process.returncode == 130
        assert "--resume --out" in said
    else:
        assert not out.exists()
        assert process.returncode in (130, -number)  # the latter while Python itself is being started
    if moment == "step":
        assert folder.last_checkpoint() is not None
    if moment == "end":
        assert process.returncode == 0
