"""How a command shows warnings: this package's as lines of its own, those of others as Python does."""

import io
import json
import warnings

import pytest
from rich.console import Console

from galore_torch import messages
from galore_torch.training.run.command import show_warnings
from galore_torch.training.run.folder import RunFolder
from tests.forked import galore

LONG = "9 of 39 tensors are too small for state in few bits, or no multiple of its blocks (model[a-z].weight)"


@pytest.fixture
def as_python():
    """The warnings of a test that are left to Python."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def shown_on(**how) -> io.StringIO:
    """What is shown of warnings from now on, on a screen of 40 columns."""
    screen = io.StringIO()
    show_warnings(Console(file=screen, width=40, **how))
    return screen


def test_a_warning_is_a_line_of_its_own(as_python):
    shown = shown_on()
    messages.warn(LONG)
    assert shown.getvalue() == f"warning: {LONG}\n"
    assert as_python == []


def test_a_warning_is_wrapped_at_words_on_a_terminal(as_python):
    shown = shown_on(force_terminal=True, color_system=None)
    messages.warn(LONG)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert " ".join(map(str.rstrip, lines)) == f"warning: {LONG}"


def test_of_several_processes_the_first_one_shows_it(as_python, monkeypatch):
    shown = shown_on()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        messages.warn(f"seen by {rank}")
    assert shown.getvalue() == "warning: seen by 0\n"
    assert as_python == []


def test_warnings_of_others_are_shown_as_before(as_python):
    shown = shown_on()
    warnings.warn("theirs", DeprecationWarning, stacklevel=1)
    assert shown.getvalue() == ""
    assert [str(one.message) for one in as_python] == ["theirs"]


@pytest.mark.slow
def test_a_real_command_warns_in_a_line_beside_its_json(tiny, tmp_path):
    given = tmp_path / "given.toml"
    given.write_text(tiny(steps=1, optim="galore-adamw8bit").to_toml(), encoding="utf-8")
    done = galore("pretrain", "--config", given, "--out", tmp_path / "run", "--json")
    assert json.loads(done.stdout)["out"] == str(RunFolder(tmp_path / "run").root)
    (line,) = [line for line in done.stderr.splitlines() if "too small for state in few bits" in line]
    assert line.startswith("warning: ")
    assert "UserWarning" not in done.stderr
