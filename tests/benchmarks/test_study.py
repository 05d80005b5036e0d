"""The study asks for what it should, trains every method, and keeps what it knows."""

import json
import math

import pytest
import torch

from benchmarks.study import __main__ as study
from benchmarks.study.methods import METHODS, Scaled
from benchmarks.study.plan import CORE, LONGER, SEEDS, at_seed_0, leaders, means, wanted
from benchmarks.study.training import Job, rate, rehearsal, train

PUBLISHED = {"alice": "pytorch_optimizer", "fira-published": "pytorch_optimizer", "others-8bit": "bitsandbytes"}


def perplexity(job: Job) -> float:
    """A bowl whose bottom lies one doubling of both rates away from where each search starts."""
    method = METHODS[job.method]
    off = math.log2(job.lr / method.lr) - 1, math.log2(job.others_lr / method.others_lr) - 1
    return 20 + CORE.index(job.method) / 10 + off[0] ** 2 + off[1] ** 2 + job.seed / 100


def test_the_plan_finds_the_best_rates_and_then_asks_for_seeds_and_length():
    known: dict[Job, float] = {}
    while new := [job for job in wanted(known, CORE) if job not in known]:
        known[new[0]] = perplexity(new[0])
    for name in CORE:
        (job, values), *_ = means(known, name).items()
        assert (job.lr, job.others_lr) == (2 * METHODS[name].lr, 2 * METHODS[name].others_lr)
        assert len(values) == len(SEEDS)
    assert leaders(known, CORE) == ["adamw", "galore", "galore-rotate", "fira"]
    assert {job.method for job in known if job.steps == LONGER} == {"adamw", "galore", "galore-rotate", "fira"}
    assert all(min(known.values()) <= value for value in at_seed_0(known, "adamw", LONGER).values())


def test_a_method_that_always_fails_is_left_alone():
    known = {}
    while new := [job for job in wanted(known, ["adamw"]) if job not in known]:
        known[new[0]] = math.inf
    assert len(known) == 3


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name):
    if name in PUBLISHED:
        pytest.importorskip(PUBLISHED[name])
    job = Job(method=name, lr=METHODS[name].lr, others_lr=0.01, steps=4, tokens=64)
    *steps, result = train(job, *rehearsal("cpu"), "cpu", 0)
    assert steps == [{}] * 4
    assert 20 < result["perplexity"] < 100
    assert len(result["curve"]) == 4


def test_seeds_draw_other_models_and_the_same_seed_the_same():
    text, size = rehearsal("cpu")
    jobs = [Job(method="adamw", lr=0.001, others_lr=0.01, steps=2, tokens=64, seed=seed) for seed in (0, 0, 1)]
    first, again, other = ([*train(job, text, size, "cpu", 0)][-1]["curve"] for job in jobs)
    assert first == again
    assert first != other


def test_columns_are_scaled_to_a_fifth_of_the_rate():
    weight = torch.nn.Parameter(torch.zeros(6, 3))
    weight.grad = torch.randn(6, 3)
    Scaled([weight], lr=0.5).step()
    torch.testing.assert_close(weight.detach().square().mean(dim=0).sqrt(), torch.full((3,), 0.1))


def test_a_study_keeps_its_lines_and_goes_on_from_them(tmp_path, monkeypatch, capsys):
    jobs = [Job(method="adamw", lr=0.001, others_lr=0.01, tokens=64, seed=seed) for seed in SEEDS]
    out = tmp_path / "lines.jsonl"
    for count in (2, 3):
        monkeypatch.setattr(study, "wanted", lambda known, methods, count=count: iter(jobs[:count]))
        study.main(["--small", "--streams", "2", "--out", str(out)])
        assert len(out.read_text().splitlines()) == count
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {study.job_of(line) for line in lines} == set(jobs)
    study.main(["--table", str(out), "--plot", str(tmp_path / "rates.png")])
    assert "| AdamW | 0.001 / 0.01 |" in capsys.readouterr().out
    assert (tmp_path / "rates.png").stat().st_size > 1000


def test_rates_rise_and_fall():
    assert [rate(step, 100) for step in (0, 9)] == [0.1, 1.0]
    assert rate(99, 100) == pytest.approx(0.1)
