"""Comparisons: the plan, real runs that are killed and go on, and what is made of them."""

import dataclasses
import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from rich.console import Console

from galore_torch.training.compare.plan import keep_plan, make_plan, rates_by_method, require_same_plan
from galore_torch.training.compare.report import apart_and_shared, held_out, in_lines, losses, report, sensitivity
from galore_torch.training.compare.results import RunEnd, as_json, compare, notes, rows, table
from galore_torch.training.finetune.command import FINETUNE, Amount
from galore_torch.training.pretrain.command import PRETRAIN
from galore_torch.training.run import records
from tests.architecture import ROOT
from tests.forked import Galore, galore
from tests.training.during import last_record
from tests.waiting import wait_for


@pytest.fixture
def given(tiny):
    config = tiny(steps=6, eval_every=0, save_every=2, micro_batch=8)
    return {
        name: value
        for section in (config.model, config.data, config.schedule)
        for name, value in vars(section).items()
        if value is not None and name != "seed"
    } | {"rank": 8, "update_proj_gap": 3}


def plan(given, methods=("full", "galore"), lrs=("0.01",), others=(), seeds=(0,), sets=(), job=PRETRAIN):
    return make_plan(job, None, methods, lrs, others, seeds, given, sets)


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
    assert {run.amount for run in runs} == {Amount(6 * 8 * 32, "tokens")}
    assert {run.config.schedule.seed for run in runs} == {1, 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ("gallore",)}, "did you mean 'galore'"),
        ({"lrs": ("lora=0.1",)}, "add --method lora"),
        ({"lrs": ("quick",)}, "is no number"),
        ({"lrs": ("-1",)}, "must be more than 0"),
        ({"sets": ("galore",)}, "is not METHOD:NAME=VALUE"),
        ({"sets": ("galore:rank=",)}, "is not METHOD:NAME=VALUE"),
        ({"sets": ("rank=4",)}, "is not METHOD:NAME=VALUE"),
        ({"sets": ("lora:rank=4",)}, "add --method lora"),
        ({"sets": ("galore:rnak=4",)}, "rnak = 4 is no setting of a pre-training; did you mean rank"),
        ({"sets": ("galore:rank=four",)}, "rank = 'four' is a str; give an int"),
        ({"sets": ("galore:stagger=perhaps",)}, "stagger = 'perhaps' is a str; give a bool"),
        ({"sets": ("galore:rank=0",)}, "rank = 0 is out of range; it must be at least 1"),
        ({"sets": ("galore:rank=2", "galore:rank=3")}, "sets rank of galore a second time"),
        ({"sets": ("full:update_proj_gap=3",)}, "update_proj_gap = 3 has no effect with method = 'full'"),
        ({"sets": ("full:adapter_rank=3",)}, "adapter_rank = 3 has no effect .*'low-rank' or 'lora'"),
        ({"sets": ("galore:optim=adamw",)}, "galore:optim=adamw.* choose them by --method"),
        ({"sets": ("galore:lr=1",)}, "give --lr METHOD=X"),
        ({"sets": ("galore:seed=1",)}, "give --seed N"),
        ({"sets": ("galore:seq=16",)}, "runs with another seq cannot be compared; give it for all"),
        ({"sets": ("galore:steps=7",)}, "full would see 1,536 tokens and galore 1,792 tokens"),
    ],
)
def test_a_wrong_plan_is_refused(given, change, words):
    with pytest.raises(ValueError, match=words):
        plan(given, **change)
    with pytest.raises(ValueError, match="choose them by --method"):
        plan({**given, "optim": "adamw"})


def test_a_setting_for_all_that_suits_one_method_is_refused_with_the_way_to_give_it(given):
    with pytest.raises(ValueError, match=r"adapter = 'none'; leave it out.* For one .* --set lora:adapter_rank=4\.$"):
        plan({**given, "adapter_rank": 4}, methods=("full", "lora"))
    with pytest.raises(ValueError, match=r"at least 1\.$"):
        plan({**given, "rank": 0}, methods=("full", "lora"))


def test_another_plan_is_refused_with_what_differs(given, tmp_path):
    path = tmp_path / "plan.json"
    runs = plan(given)
    keep_plan(path, PRETRAIN, runs, "galore compare")
    require_same_plan(path, PRETRAIN, runs)
    with pytest.raises(ValueError, match="steps was 6"):
        require_same_plan(path, PRETRAIN, plan({**given, "steps": 7}))
    with pytest.raises(ValueError, match=r"full/lr-0\.01/seed-0 was planned"):
        require_same_plan(path, PRETRAIN, plan(given, methods=("galore",)))


def test_a_setting_of_one_method_is_its_alone(given):
    sets = (
        "lora:adapter-rank=2",
        "galore:rank=4",
        "galore:stagger=false",
        "galore:micro_batch=4",
        "full:max_grad_norm=1",
    )
    configs = {run.method: run.config for run in plan(given, methods=("full", "galore", "lora"), sets=sets)}
    assert configs["lora"].adapter.adapter_rank == 2
    assert [config.optimizer.rank for config in configs.values()] == [8, 4, 8]
    assert [config.optimizer.stagger for config in configs.values()] == [True, False, True]
    assert [config.optimizer.max_grad_norm for config in configs.values()] == [1.0, 0.0, 0.0]
    apart, shared = apart_and_shared(configs)
    assert apart["rank"] == {"galore": 4}
    assert apart["adapter_rank"] == {"lora": 2}
    assert apart["update_proj_gap"] == {"galore": 3}
    assert apart["micro_batch"] == {"full": 8, "galore": 4, "lora": 8}
    assert shared["steps"] == 6
    assert not {"seed", "lr", "others_lr", "cos_threshold"} & {*apart, *shared}


def outcome(run, loss, **other):
    final = {
        "eval_loss": loss, "perplexity": None if loss is None else math.exp(loss), "tokens_per_second": 123456.7,
        "state_bytes": 10**10, "peak_memory_bytes": 10**11, "trained_parameters": 10**9, **other,
    }  # fmt: skip
    return RunEnd(run, final, None)


def drawn(comparison):
    screen = io.StringIO()
    Console(file=screen, width=80).print(table(comparison))
    assert "…" not in screen.getvalue()
    return screen.getvalue()


def test_the_best_rate_has_the_least_mean_loss_and_an_edge_is_told(given):
    runs = plan(given, lrs=("0.001", "0.01", "0.1"), seeds=(0, 1))
    of_rates = {0.001: 3.0, 0.01: 2.0, 0.1: None}
    outcomes = [
        outcome(run, 1.0 if run.folder.match("galore/lr-0.001/*") else of_rates[run.lr] and of_rates[run.lr] + run.seed)
        for run in runs
    ]  # fmt: skip
    comparison = compare(PRETRAIN, outcomes)
    best = comparison.best
    assert (best["full"].run.lr, best["galore"].run.lr) == (0.01, 0.001)
    (told,) = notes(comparison)
    assert "galore" in told
    assert "0.001, is the least tried" in told
    assert f"{math.e / ((math.exp(2) + math.exp(3)) / 2):.3f}" in drawn(comparison)


def tuned(run, loss, **scores):
    other = {"examples_per_second": 99.0, "scores": scores}
    return outcome(run, loss, **other)


def test_a_task_is_judged_by_its_main_score_over_the_seeds_and_then_by_loss():
    given = {"task": "cola", "model": "m", "steps": 3}
    runs = plan(given, lrs=("0.1", "0.2", "0.3"), seeds=(0, 1), job=FINETUNE)
    scores = {("full", 0.1): 0.5, ("full", 0.2): 0.7, ("full", 0.3): 0.7, ("galore", 0.2): 0.75}
    losses = {0.1: 0.1, 0.2: 0.6, 0.3: 0.5}
    outcomes = [
        tuned(run, losses[run.lr], matthews=scores.get((run.method, run.lr), 0.0) + run.seed / 10, accuracy=0.9)
        for run in runs
    ]
    comparison = compare(FINETUNE, outcomes)
    best = comparison.best
    assert (best["full"].run.lr, best["galore"].run.lr) == (0.3, 0.2)
    assert (comparison.score.name, comparison.score.beside_full) == ("matthews", "points to full")
    full, galore = rows(comparison)
    assert full[:4] == ["full", "0.3", "0.7500 ±0.0707", "+0.0"]
    assert galore[3] == "+5.0"
    assert "matthews" in drawn(comparison)


def test_supervised_fine_tuning_is_judged_by_loss_and_told_in_perplexity():
    given = {"task": "sft", "data": "chats.jsonl", "model": "m"}
    runs = plan(given, lrs=("0.1", "0.2"), job=FINETUNE)
    outcomes = [tuned(run, 10 * run.lr, perplexity=math.exp(10 * run.lr)) for run in runs]
    comparison = compare(FINETUNE, outcomes)
    assert [row.run.lr for row in comparison.best.values()] == [0.1, 0.1]
    assert rows(comparison)[1][2:4] == [f"{math.e:.2f}", "1.000"]
    assert {run.amount for run in runs} == {Amount(1.0, "epochs")}


def test_a_fine_tuning_of_unequal_length_or_unknown_task_is_refused():
    given = {"task": "rte"}
    for sets in (("lora:epochs=2",), ("lora:steps=9",)):
        with pytest.raises(ValueError, match="full would see 30 epochs and lora"):
            plan(given, methods=("full", "lora"), sets=sets, job=FINETUNE)
    with pytest.raises(ValueError, match="did you mean 'rte'"):
        plan({"task": "rtee"}, job=FINETUNE)
    with pytest.raises(ValueError, match="max_length cannot be compared"):
        plan(given, sets=("full:max_length=8",), job=FINETUNE)
    with pytest.raises(ValueError, match="low-rank"):
        plan(given, methods=("low-rank",), job=FINETUNE)


def test_a_command_in_lines_is_the_same_to_a_shell():
    command = shlex.join(["galore", "compare", "--data", "my text's.txt", "--dry-run", *["--lr", "galore=0.01"] * 9])
    lines = in_lines(command)
    assert max(map(len, lines.splitlines())) <= 40
    assert shlex.split(lines.replace("\\\n", "")) == shlex.split(command)


def test_what_a_reader_must_know_is_told(given):
    runs = plan(given, seeds=(0, 1))
    ended = [outcome(run, 1.0) for run in runs]
    one, *others = [dataclasses.replace(each, digest="a") for each in ended]
    assert notes(compare(PRETRAIN, [one, *others])) == []
    assert "have not seen the same" in notes(compare(PRETRAIN, [dataclasses.replace(one, digest="b"), *others]))[0]
    on_streams = [dataclasses.replace(end, final={**end.final, "stream": f"{end.run.seed}"}) for end in [one, *others]]
    assert notes(compare(PRETRAIN, on_streams)) == []  # which follow the seed
    run = plan(given, methods=("galore",), seeds=(1,))[0]
    other = dataclasses.replace(on_streams[1], run=run, final={**on_streams[1].final, "stream": "2"})
    assert "have not seen the same" in notes(compare(PRETRAIN, [*on_streams, other]))[-1]
    unfinished = [dataclasses.replace(one, final=None), *others]
    assert notes(compare(PRETRAIN, unfinished)) == ["full: 1 of 2 seeds have ended at 0.01."]
    none = compare(PRETRAIN, [RunEnd(run, None, "no") for run in runs])
    assert (none.best, as_json(none)["score"]) == ({}, None)
    assert "failed" in drawn(none)


def flags(given, out):
    words = ["--method", "full", "--method", "galore", "--lr", "0.01", "--out", str(out)]
    for name, value in given.items():
        option = name.replace("_", "-")
        words += (
            [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
        )
    return ["compare", *words]


def losses_of(out, method):
    history = records.read(out / method / "lr-0.01" / "seed-0" / "metrics.jsonl")
    return [{name: record.get(name) for name in ("step", "loss", "eval_loss", "final")} for record in history]


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_result(given, tmp_path):
    whole = galore(*flags(given, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr + whole.stdout
    assert "galore" in whole.stdout

    out = tmp_path / "parts"
    metrics = out / "galore/lr-0.01/seed-0/metrics.jsonl"
    killed = Galore(*flags(given, out))
    wait_for(lambda: (last_record(metrics) or {"step": 0})["step"] >= 3, killed)
    killed.kill_with_children()
    again = galore(*flags(given, out), "--json")
    assert again.returncode == 0, again.stderr
    for method in ("full", "galore"):
        assert losses_of(out, method) == losses_of(tmp_path / "whole", method)
    result = json.loads(again.stdout)
    assert [run["error"] for run in result["runs"]] == [None, None]
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_data_that_cannot_be_read_are_told_before_any_run(given, tmp_path):
    out = tmp_path / "there"
    out.mkdir()
    done = galore(*flags({**given, "data": "nowhere.txt"}, out))
    assert done.returncode == 2
    assert done.stderr == (
        "galore compare pretrain: data = 'nowhere.txt' does not exist; give an existing file or folder, or stdlib.\n"
    )
    assert list(out.iterdir()) == []


def test_rates_for_all_and_for_one():
    assert rates_by_method("lr", [], ["full"]) == {"full": [None]}
    assert rates_by_method("lr", ["1", "2"], ["full"]) == {"full": [1.0, 2.0]}


def test_the_demo_compares_galore_and_full_rank_at_the_rates_that_suit_each():
    outside = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # not as part of a make
    make = ["make", "--no-print-directory", "-n", "demo", "ARGS="]
    told = subprocess.run(make, cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout
    arguments = shlex.split(told.splitlines()[-1].partition(" ")[2])
    command = [sys.executable, "-m", "galore_torch", *arguments, "--dry-run"]
    planned = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.partition(" seed")[0] for line in planned[:-1]] == [
        f"{method} lr-{lr}-others-{others}"
        for method, (lr, others) in {"galore": ("0.01", "0.04"), "full": ("0.001", "0.04")}.items()
    ]


def test_a_figure_of_learning_rates_is_drawn_where_a_method_has_several(given):
    for lrs, lines in ((("0.01", "galore=0.02"), None), (("0.01", "galore=0.02", "galore=0.01"), 2)):
        figure = sensitivity(compare(PRETRAIN, [outcome(run, 1.0) for run in plan(given, lrs=lrs)]))
        assert (figure and len(figure.axes[0].lines)) == lines


def test_a_figure_of_evaluations_shows_all_of_them(given, tmp_path):
    runs = plan(given)
    for run in runs:
        (tmp_path / run.folder).mkdir(parents=True)
        for step in (1, 2, 3):
            seen = {"step": step, "tokens": 1000 * step, "seconds": 1.0 * step}
            records.append(tmp_path / run.folder / "metrics.jsonl", {**seen, "eval_loss": 4.0 - step})
    figure = held_out(compare(PRETRAIN, [outcome(run, 1.0) for run in runs]), tmp_path)
    (axes,) = figure.axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1000, 2000, 3000]] * 2
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] > 3000


def test_the_page_has_every_run_with_its_folder_and_every_curve_from_its_first_point(given, tmp_path):
    runs = plan(given, lrs=("0.01", "0.02"))
    for run in runs:
        (tmp_path / run.folder).mkdir(parents=True)
        for step in range(1, 61):
            seen = {"step": step, "tokens": 100 * step, "seconds": 1.0 * step}
            records.append(tmp_path / run.folder / "metrics.jsonl", {**seen, "lr": 0.01, "loss": 2 + 6 / step})
    comparison = compare(PRETRAIN, [outcome(run, 1.0 + run.lr) for run in runs])
    (axes,) = losses(comparison, tmp_path, "tokens").axes
    low, high = axes.get_ylim()
    for line in axes.lines:
        assert low < min(line.get_ydata()) < max(line.get_ydata()) == 8 < high
    html = report(comparison, tmp_path, "galore compare").render()
    for run in runs:
        assert f'<a href="{run.folder.as_posix()}/">{run.label}</a>' in html
    assert "± std" not in html
    assert "mean over the seeds" not in html
    runs = [run for run in plan(given, lrs=("0.01",), seeds=(0, 1)) if run.seed or run.method == "full"]
    for run in runs:
        (tmp_path / "seeds" / run.folder).mkdir(parents=True)
        shutil.copy(tmp_path / "full/lr-0.01/seed-0/metrics.jsonl", tmp_path / "seeds" / run.folder)
    seeded = compare(PRETRAIN, [outcome(run, 1.0 + run.seed) for run in runs])
    assert "perplexity ± std" in report(seeded, tmp_path / "seeds", "galore compare").render()


@pytest.mark.parametrize(
    "damaged", ["", "[]", '{"job": "pretrain"}', '{"job": "pretrain", "runs": {"a": {"model": [1]}}}']
)
def test_a_damaged_plan_is_refused_with_the_remedy(damaged, given, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(damaged, encoding="utf-8")
    with pytest.raises(ValueError, match=r"plan\.json is damaged.*Restore it from a copy"):
        keep_plan(path, PRETRAIN, plan(given), "galore compare")
    assert path.read_text(encoding="utf-8") == damaged
