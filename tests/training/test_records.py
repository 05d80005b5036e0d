"""What is recorded, how it is drawn, and how it is shown in a terminal."""

import io
import math

import pytest
from matplotlib.image import imread
from rich.console import Console

from galore_torch.training import records
from galore_torch.training.plots import plot_losses, smooth
from galore_torch.training.pretrain import new_run


def test_records_come_back_and_later_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert records.read(path) == []
    for step in (1, 2, 3):
        records.append(path, {"step": step, "loss": 1 / step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    records.keep_until(path, 2)
    assert records.read(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    assert records.final(path) is None
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_perplexity_is_the_exponential_even_where_it_overflows():
    assert records.perplexity(math.log(50)) == pytest.approx(50)
    assert records.perplexity(1e6) == math.inf


def test_smoothing_follows_without_a_bias_at_the_start():
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    fallen = smooth([4.0] * 10 + [2.0] * 50)
    assert fallen == sorted(fallen, reverse=True)
    assert abs(fallen[-1] - 2.0) < 0.02


def test_a_plot_of_several_runs_shows_both_in_their_colours(tmp_path):
    for name, loss in (("one", 5.0), ("two", 4.0)):
        for step in range(1, 20):
            records.append(tmp_path / name, {"step": step, "tokens": step * 1000, "loss": loss - step / 10})
        records.append(tmp_path / name, {"step": 20, "tokens": 20_000, "eval_loss": None, "perplexity": None})
    plot_losses({"one": tmp_path / "one", "two": tmp_path / "two"}, tmp_path / "both.png")
    picture = imread(tmp_path / "both.png")[..., :3]
    for colour in ((0x0B, 0x6E, 0x99), (0xD9, 0x73, 0x0D)):
        near = abs(picture - [part / 255 for part in colour]).max(axis=-1) < 0.02
        assert near.sum() > 200


def test_a_terminal_gets_a_bar_with_an_estimated_end(tiny, tmp_path):
    screen = io.StringIO()
    new_run(tiny(), tmp_path / "run", console=Console(file=screen, force_terminal=True, width=100)).train()
    text = screen.getvalue()
    assert all(word in text for word in ("8/8", "loss", "lr", "tok/s", "state", "left", "perplexity"))
