"""The demo: two real processes, one table, one picture."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from galore_torch.training.compare.demo import RUNS, demo, table
from galore_torch.training.run import records


@pytest.mark.slow
def test_the_demo_compares_both_at_equal_tokens_and_draws_them(texts, cache, tmp_path):
    flags = (
        f"--data {texts} --cache {cache} --vocab 400 --seq 32 --eval-tokens 640 --hidden 32 --intermediate 64 "
        "--layers 2 --heads 2 --rank 4 --gap 5 --steps 10 --batch 4 --micro-batch 4 --eval-every 5"
    ).split()
    screen = io.StringIO()
    picture = demo(tmp_path, flags, Console(file=screen, width=80))
    assert picture.read_bytes().startswith(b"\x89PNG")
    galore, adamw = (records.final(tmp_path / optimizer / "metrics.jsonl") for optimizer in RUNS.values())
    assert galore["tokens"] == adamw["tokens"] == 10 * 4 * 32
    assert galore["state_bytes"] < adamw["state_bytes"]
    shown = screen.getvalue()
    assert f"{galore['perplexity']:,.2f}" in shown
    assert f"{adamw['perplexity']:,.2f}" in shown
    assert str(picture) in shown.replace("\n", "")


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_a_terminal(width):
    result = {
        "perplexity": 12345.678, "tokens_per_second": 1234567.8, "state_bytes": 10**11, "peak_memory_bytes": 10**11,
        "parameters": 7 * 10**9, "tokens": 2 * 10**10,
    }  # fmt: skip
    screen = io.StringIO()
    Console(file=screen, width=width).print(table(dict.fromkeys(RUNS, result)))
    text = screen.getvalue()
    assert "…" not in text
    assert text.count("12,345.68") == 2


def test_a_run_that_stops_early_ends_the_demo_and_says_how_to_go_on(monkeypatch, tmp_path):
    stopped = json.dumps({"finished": False, "out": str(tmp_path / "galore-adamw")})
    monkeypatch.setattr("sys.executable", str(fake_python(tmp_path, stopped)))
    screen = io.StringIO()
    assert demo(tmp_path, (), Console(file=screen, width=200)) is None
    assert "--resume --out" in screen.getvalue()


def fake_python(folder: Path, output: str) -> Path:
    """A program that prepares text and stops every run."""
    program = folder / "stopped"
    code = f"#!/bin/sh\ncase \"$*\" in *--prepare*) ;; *) echo '{output}'; exit 130 ;; esac\n"
    program.write_text(code, encoding="utf-8")
    program.chmod(0o755)
    return program
