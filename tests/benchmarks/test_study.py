"""The study asks for what it should, trains every method, and keeps what it knows."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch

from benchmarks.study import __main__ as study
from benchmarks.study.methods import METHODS, Scaled
from benchmarks.study.plan import BATCHES, FIRST, LONG, LONGER, SEEDS, THEN, at_seed_0, means, searched, wanted
from benchmarks.study.training import Job, rate, rehearsal, train
from tests.forked import CONTEXT, TORCH


def perplexity(job: Job) -> float:
    """A bowl whose bottom lies one doubling of both rates away from where each search starts."""
    method = METHODS[job.method]
    off = math.log2(job.lr / method.lr) - 1, math.log2(job.others_lr / method.others_lr) - 1
    return 20 + off[0] ** 2 + off[1] ** 2 + job.seed / 100


def finished(methods: Sequence[str], plan: Callable[..., Iterator[Job]] = wanted) -> list[Job]:
    """Return all trainings in their order, each ended before the next begins."""
    known: dict[Job, float] = {}
    while new := next((job for job in plan(known, methods) if job not in known), None):
        known[new] = perplexity(new)
    return list(known)


def test_the_plan_finds_the_best_rates_and_then_asks_for_seeds():
    known = {job: perplexity(job) for job in finished(LONG)}
    for name in LONG:
        found = means(known, name)
        job = next(iter(found))
        assert (job.lr, job.others_lr) == (2 * METHODS[name].lr, 2 * METHODS[name].others_lr)
        assert [len(each) for each in found.values()] == [len(SEEDS)] * 2
        assert next(iter(at_seed_0(known, name))) == job


def test_a_search_at_another_length_is_of_that_length_alone():
    known = {job: perplexity(job) for job in finished(["adamw", "muon"], partial(searched, steps=LONGER))}
    assert {job.steps for job in known} == {LONGER}
    for name in ("adamw", "muon"):
        ((job, values),) = means(known, name, LONGER).items()
        assert (job.lr, job.others_lr) == (2 * METHODS[name].lr, 2 * METHODS[name].others_lr)
        assert len(values) == len(SEEDS)


def test_what_matters_most_is_trained_first():
    jobs = finished([*LONG, *FIRST, *THEN, "sign"])
    best = [job for job in jobs if job.lr == 2 * METHODS[job.method].lr and job.tokens == Job.tokens]
    best = [job for job in best if job.others_lr == 2 * METHODS[job.method].others_lr]
    stages = [
        [job for job in best if job.steps == LONGER],
        [job for job in best if job.method in LONG and job.steps == Job.steps and job.seed],
        [job for job in best if job.method in FIRST],
        [job for job in best if job.method in THEN],
        [job for job in best if job.method == "sign"],
        [job for job in jobs if job.tokens != Job.tokens],
    ]
    for before, after in pairwise(stages):
        assert max(map(jobs.index, before)) < min(map(jobs.index, after))
    assert [len(stage) for stage in stages[:-1]] == [12, 8, 3 * len(FIRST), 3 * len(THEN), 3]
    assert {job.method for job in jobs if job.steps == LONGER} == set(LONG)
    assert {job.tokens for job in jobs} == {Job.tokens, *BATCHES}


def test_idle_places_get_what_does_not_wait_for_a_search():
    known = {job: perplexity(job) for job in finished(["adamw"]) if job.seed == 0 and job.steps == Job.steps}
    jobs = [job for job in wanted(known, LONG) if job not in known]
    assert {job.method for job in jobs if job.seed == 0 and job.steps == Job.steps} == set(LONG) - {"adamw"}
    assert {job.method for job in jobs if job.seed or job.steps == LONGER} == {"adamw"}


def test_what_heeds_no_streams_is_not_trained_beside_others(capsys):
    with pytest.raises(SystemExit):
        study.main(["--small", "--only", "others-8bit", "--streams", "2"])
    assert "others-8bit" in capsys.readouterr().err


def test_a_method_that_always_fails_is_left_alone():
    known = {}
    while new := [job for job in wanted(known, ["adamw"]) if job not in known]:
        known[new[0]] = math.inf
    assert len(known) == 5


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.broad("adamw", "galore", "fira", "blocks", "muon", "alice", "factored", "sampled")
def test_every_method_trains(name):
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
    monkeypatch.setattr(study.multiprocessing, "get_context", lambda _: CONTEXT)  # a new process imports torch first
    for count in (2, 3):
        monkeypatch.setattr(study, "wanted", lambda known, methods, count=count: iter(jobs[:count]))
        with TORCH.forking():
            study.main(["--small", "--streams", "2", "--out", str(out)])
        assert len(out.read_text().splitlines()) == count
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {study.job_of(line) for line in lines} == set(jobs)
    pictures = tmp_path / "rates.png", tmp_path / "curves.png"
    study.main(["--table", str(out), "--plot", str(pictures[0]), "--curves", str(pictures[1])])
    assert "| AdamW | 0.001 / 0.01 |" in capsys.readouterr().out
    assert all(picture.stat().st_size > 1000 for picture in pictures)


def test_rates_rise_and_fall():
    assert [rate(step, 100) for step in (0, 9)] == [0.1, 1.0]
    assert rate(99, 100) == pytest.approx(0.1)
