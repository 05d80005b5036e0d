"""Comparisons: the plan, real runs that are killed and go on, and what is made of them."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from galore_torch.training import records
from galore_torch.training.compare_plan import (
    PRETRAIN,
    make_plan,
    rates_by_method,
    require_same_plan,
    write_plan,
)
from galore_torch.training.compare_results import Outcome, best_settings, edges, table


@pytest.fixture
def given(tiny):
    config = tiny(steps=6, eval_every=0, save_every=2, micro_batch=8)
    return {
        name: value
        for section in (config.model, config.data, config.schedule)
        for name, value in vars(section).items()
        if value is not None and name != "seed"
    } | {"rank": 8, "gap": 3}


def plan(given, methods=("full", "galore"), lrs=("0.01",), others=(), seeds=(0,)):
    return make_plan(PRETRAIN, None, methods, lrs, others, seeds, given)


def test_the_plan_is_every_rate_with_every_seed(given):
    runs = plan(given, lrs=("0.001", "galore=0.01", "galore=0.02"), others=("full=0.05",), seeds=(1, 2))
    assert [str(run.folder) for run in runs] == [
        "full/lr-0.001-others-0.05/seed-1",
        "full/lr-0.001-others-0.05/seed-2",
        "galore/lr-0.01/seed-1",
        "galore/lr-0.01/seed-2",
        "galore/lr-0.02/seed-1",
        "galore/lr-0.02/seed-2",
    ]
    assert {run.tokens for run in runs} == {6 * 8 * 32}
    assert {run.config.schedule.seed for run in runs} == {1, 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ("gallore",)}, "did you mean 'galore'"),
        ({"lrs": ("lora=0.1",)}, "add --method lora"),
        ({"lrs": ("quick",)}, "is no number"),
        ({"lrs": ("-1",)}, "must be more than 0"),
    ],
)
def test_a_wrong_plan_is_refused(given, change, words):
    with pytest.raises(ValueError, match=words):
        plan(given, **change)
    with pytest.raises(ValueError, match="choose them by --method"):
        plan({**given, "optimizer": "adamw"})


def test_another_plan_is_refused_with_what_differs(given, tmp_path):
    path = tmp_path / "plan.json"
    runs = plan(given)
    write_plan(path, PRETRAIN, runs, "galore compare")
    require_same_plan(path, PRETRAIN, runs)
    with pytest.raises(ValueError, match="steps was 6"):
        require_same_plan(path, PRETRAIN, plan({**given, "steps": 7}))
    with pytest.raises(ValueError, match=r"galore/lr-0\.01/seed-0 was planned"):
        require_same_plan(path, PRETRAIN, plan(given, methods=("full",)))


def outcome(run, loss):
    final = {
        "eval_loss": loss, "perplexity": None if loss is None else math.exp(loss), "tokens_per_second": 123456.7,
        "state_bytes": 10**10, "peak_memory_bytes": 10**11,
    }  # fmt: skip
    return Outcome(run, final, None)


def test_the_best_rate_has_the_least_mean_loss_and_an_edge_is_told(given):
    runs = plan(given, lrs=("0.001", "0.01", "0.1"), seeds=(0, 1))
    losses = {0.001: 3.0, 0.01: 2.0, 0.1: None}
    outcomes = [
        outcome(run, 1.0 if run.folder.match("galore/lr-0.001/*") else losses[run.lr] and losses[run.lr] + run.seed)
        for run in runs
    ]  # fmt: skip
    best = best_settings(PRETRAIN, outcomes)
    assert (best["full"].lr, best["galore"].lr) == (0.01, 0.001)
    assert edges(best["full"], outcomes) is None
    assert "0.001, is the least tried" in edges(best["galore"], outcomes)
    screen = io.StringIO()
    Console(file=screen, width=80).print(table(PRETRAIN, best, outcomes))
    assert "…" not in screen.getvalue()
    assert f"{math.e / ((math.exp(2) + math.exp(3)) / 2):.3f}" in screen.getvalue()


def flags(given, out):
    words = ["--method", "full", "--method", "galore", "--lr", "0.01", "--out", str(out)]
    for name, value in given.items():
        option = name.replace("_", "-")
        words += (
            [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
        )
    return [sys.executable, "-m", "galore_torch", "compare", *words]


def losses(out, method):
    history = records.read(out / method / "lr-0.01" / "seed-0" / "metrics.jsonl")
    return [{name: record.get(name) for name in ("step", "loss", "eval_loss", "final")} for record in history]


def wait_for(met, process):
    end = time.monotonic() + 120
    while not met():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_comparison_goes_on_to_the_same_result(given, tmp_path):
    whole = subprocess.run([*flags(given, tmp_path / "whole")], capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr + whole.stdout
    assert "galore" in whole.stdout

    out = tmp_path / "parts"
    metrics = out / "galore/lr-0.01/seed-0/metrics.jsonl"
    with subprocess.Popen(flags(given, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        wait_for(lambda: (records.last(metrics) or {"step": 0})["step"] >= 3, killed)
        child = max(int(pid) for pid in children(killed.pid))
        os.kill(child, signal.SIGKILL)
        killed.kill()
    again = subprocess.run([*flags(given, out), "--json"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    for method in ("full", "galore"):
        assert losses(out, method) == losses(tmp_path / "whole", method)
    result = json.loads(again.stdout)
    assert [run["error"] for run in result["runs"]] == [None, None]
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()


def test_rates_for_all_and_for_one():
    assert rates_by_method("lr", [], ["full"]) == {"full": [None]}
    assert rates_by_method("lr", ["1", "1"], ["full"]) == {"full": [1.0]}
