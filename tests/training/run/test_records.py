"""What is recorded, how it is drawn, and how it is shown in a terminal."""

import inspect
import io
import math
import subprocess
import sys

import pytest
from matplotlib.image import imread
from rich.console import Console

from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run import callbacks, machine, records
from galore_torch.training.run.plots import COLORS, plot_losses, smooth
from galore_torch.training.run.run import new_run


def step_record(step, loss):
    return {"step": step, "tokens": step * 1000, "loss": loss, "lr": 0.1, "seconds": step / 10}


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe", b"null", b"[1]", b"{}", b'{"step": 2', b'{"step": 1, "loss": 2.0}', b'{"step": "2", "loss": 2.0}',
        b'{"step": 2, "lnss": 2.0, "tokens": 9, "lr": 0.1, "seconds": 1.0}', b"",
        b'{"step": 1, "tokens": 9, "loss": 2.0, "lr": 0.1, "seconds": 1.0}',  # after step 2
        b'{"step": 3, "tokens": 9, "loss": "2.0", "lr": 0.1, "seconds": 1.0}',
    ],
)  # fmt: skip
def test_a_damaged_line_is_told_with_the_remedy(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    records.append(path, step_record(2, 1.0))
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged in line 2.*Restore.*remove that line"):
        records.read(path)


def test_records_come_back_and_later_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert records.read(path) == []
    for step in (1, 2, 3):
        records.append(path, step_record(step, 1 / step))
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    records.keep_until(path, 2)
    assert records.read(path) == [step_record(1, 1.0), step_record(2, 0.5)]
    assert records.final(path) is None
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_perplexity_is_the_exponential_even_where_it_overflows():
    assert records.perplexity(math.log(50)) == pytest.approx(50)
    assert records.perplexity(1e6) == math.inf


def test_smoothing_takes_out_noise_and_lags_behind_nothing():
    line = [5 - step / 100 for step in range(200)]
    assert smooth(line) == pytest.approx(line)
    noisy = smooth([loss + (-1) ** step for step, loss in enumerate(line)])
    assert noisy[20:180] == pytest.approx(line[20:180], abs=0.1)


def test_a_plot_shows_training_and_held_out_losses_in_their_colors(tmp_path):
    evaluation = {"step": 20, "tokens": 20_000, "eval_loss": None, "perplexity": None, "seconds": 2.0}
    for step in range(1, 20):
        records.append(tmp_path / "one", step_record(step, 5 - step / 10))
    records.append(tmp_path / "one", {**evaluation, "step": 19, "eval_loss": 3.0, "perplexity": 20.1})
    records.append(tmp_path / "one", evaluation)
    plot_losses("one", tmp_path / "one", tmp_path / "one.png")
    picture = imread(tmp_path / "one.png")[..., :3]
    for color, least in ((COLORS[0], 200), (COLORS[1], 50)):
        near = abs(picture - [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]).max(axis=-1) < 0.02
        assert near.sum() > least


def test_a_terminal_gets_a_bar_with_an_estimated_end(tiny, tmp_path):
    screen = io.StringIO()
    new_run(Pretraining, tiny(), tmp_path / "run", console=Console(file=screen, force_terminal=True, width=100)).train()
    text = screen.getvalue()
    assert all(word in text for word in ("8/8", "loss", "lr", "tok/s", "state", "left", "perplexity"))


def test_what_is_being_written_stays_until_all_processes_have_ended(tiny, tmp_path, monkeypatch):
    tmp, seen = tmp_path / "out" / "checkpoints" / "tmp", []
    monkeypatch.setattr(callbacks, "wait_for_all", lambda: seen.append(tmp.exists()))
    new_run(Pretraining, tiny(steps=2), tmp_path / "out").train()
    assert seen == [True] * 2  # at the checkpoint, and at the end
    assert not tmp.exists()


CHILD = f"""
import sys
import psutil
import torch
from pathlib import Path
{inspect.getsource(machine.peak_memory_bytes)}
print(peak_memory_bytes())
"""  # alone, for what else its module imports takes longer than all of the test


@pytest.mark.slow
def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    parent = (
        "import subprocess, sys; large = bytearray(b'x') * 1_500_000_000; "
        "print(subprocess.run([sys.executable, '-c', sys.argv[1]], capture_output=True, text=True, check=True).stdout)"
    )
    peak = int(subprocess.run([sys.executable, "-c", parent, CHILD], capture_output=True, text=True, check=True).stdout)
    assert 50_000_000 < peak < 1_000_000_000
