"""``galore inspect`` from end to end: what it leaves behind, what it refuses, and how it is stopped."""

import json
import os
import re
import signal
import sys

import pytest
import torch
from typer.testing import CliRunner

from galore_torch.training.inspection import report
from galore_torch.training.run.folder import RunFolder
from galore_torch.units import readable
from tests.command_line import app
from tests.forked import Galore
from tests.training.inspection.looking import FILES, MODULES, SHORT, digests, inspected, of_run
from tests.waiting import wait_for


def test_an_inspection_from_the_command_line_leaves_the_run_as_it_was(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["galore", "inspect", "--run", str(run)])
    before = digests(run)
    out = tmp_path / "new" / "looks"
    result = inspected("--run", run, *SHORT, "--rank", "4", "--out", out)
    assert digests(run) == before
    assert {path.name for path in out.iterdir()} == {*FILES, "run.png"}
    assert [path.name for path in out.parent.iterdir()] == ["looks"]
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    lines = result.output.splitlines()
    table = [line for line in lines if re.match(r" ?\w+_proj ", line)]
    assert [line.split()[0] for line in table] == MODULES
    assert max(len(line) for line in table) <= 80
    assert "step 6/6  loss" in result.output
    assert "0:00:00 left" in result.output

    told = json.loads((out / "inspection.json").read_text(encoding="utf-8"))
    assert list(told["modules"]) == MODULES
    assert len(told["weights"]) == 14
    group = told["modules"]["down_proj"]
    assert (group["shape"], group["weights"], told["rank"], told["ages"]) == ([32, 64], 2, 4, [2])
    assert len(group["run"]) > 1  # what the run recorded at its own renewals
    assert all(0 < one["captured"] < 1 for one in group["run"])
    assert 0 < group["captured"]["2"] <= group["own"] <= 1
    assert group["by_rank"]["rank"] == list(range(1, 33))
    assert group["by_rank"]["own"][-1] == 1
    assert len(told["losses"]) == 6

    run_plot = report._plots(told)["run"].axes[0]
    filled = {line.get_markerfacecolor() != "none" for line in run_plot.lines if line.get_linestyle() == "-"}
    hollow = {line.get_markerfacecolor() == "none" for line in run_plot.lines if line.get_linestyle() == ":"}
    assert (filled, hollow) == ({True}, {True})  # a single renewal is two points of one colour

    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 6
    assert f"galore inspect --run {run}" in page  # by what it was made
    again = inspected("--run", run, *SHORT, "--out", out, code=2)
    assert "is not an empty folder; choose another --out" in again.stderr


@pytest.mark.slow
def test_the_same_inspection_finds_the_same_whichever_door_it_comes_through(run, tmp_path):
    (tmp_path / "empty").mkdir()
    told = json.loads(inspected("--run", run, *SHORT, "--json", "--out", tmp_path / "empty").stdout)
    assert told == of_run(run)
    assert json.loads((tmp_path / "empty" / "inspection.json").read_text(encoding="utf-8")) == told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "run = None and model = None leave nothing to inspect"),
        (["--run", "nowhere"], "run = 'nowhere' holds no config.toml"),
        (["--run", "EMPTY"], "holds no config.toml, so it is no run folder"),
        (["--run", "RUN/model"], "give it as --model RUN/model"),
        (["--run", "RUN", "--model", "x"], "are two things to inspect; give one of them"),
        (["--run", "RUN", "--data", "x", "--batch", "4"], "has its own data, batch; leave that out"),
        (["--run", "RUN", "--fresh", "--lr", "0.1"], "leave out one"),
        (["--run", "RUN", "--fresh", "--steps", "10"], "steps = 10 is beyond the 8 steps"),
        (["--run", "RUN", "--steps", "4", "--every", "3"], "give at least 6"),
        (["--run", "RUN", "--oldest", "100"], "oldest = 100, and in steps = 60"),
        (["--run", "RUN", "--target-modules", "nothing"], "target_modules = 'nothing': target_modules"),
        (["--run", "RUN", "--target-modules", "[a"], "no regular expression"),
        (["--run", "RUN", "--out", "EMPTY/.."], "is not an empty folder"),
        (["--run", "RUN", "--tanks", "4"], "No such option"),
        (["--model", "RUN/model"], "data = None leaves model = 'RUN/model' without gradients"),
        (["--model", "RUN/model", "--data", "nowhere.txt"], "data = 'nowhere.txt' does not exist"),
        (["--model", "nowhere/model", "--data", "TEXTS"], "model = 'nowhere/model' cannot be loaded"),
        (["--model", "RUN/model", "--data", "TEXTS", "--fresh"], "is for a run"),
        (["--model", "RUN/model", "--data", "x.csv", "--task", "classify"], "data = 'x.csv' does not exist"),
        (["--model", "RUN/model", "--data", "TEXTS", "--label-column", "x"], "task = 'text'"),
        (["--model", "RUN/model", "--data", "TEXTS", "--batch", "4", "--micro-batch", "3"], "does not divide"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_and_leaves_nothing(arguments, words, run, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    places = {"RUN": str(run), "TEXTS": str(texts)}
    given = [re.sub("RUN|TEXTS", lambda found: places[found[0]], argument) for argument in arguments]
    before = digests(run)
    result = inspected(*given, code=2)
    assert words.replace("RUN", str(run)) in re.sub(r"\s+", " ", result.stderr)
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["EMPTY"]
    assert digests(run) == before


@pytest.mark.slow
def test_a_real_inspection_that_is_stopped_leaves_nothing(run, tmp_path):
    before = digests(run)
    process = Galore("inspect", "--run", run, "--out", tmp_path / "out", "--steps", 4000, "--every", 2, "--oldest", 2)
    wait_for(lambda: "loss" in process.output(), process)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate()
    said = output + error
    assert process.returncode == 130
    assert said.endswith("Stopped. Nothing was written.\n")
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
    assert digests(run) == before


def stopped_before(real, times=1):
    def act(*arguments):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    return act


def test_a_stop_while_pictures_are_drawn_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "files", stopped_before(report.files))
    result = inspected("--run", run, *SHORT, "--out", tmp_path / "out", code=130)
    assert "Stopped. Nothing was written." in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_a_stop_while_the_folder_is_written_lets_it_be_whole_and_a_second_one_lets_it_be_nothing(
    times, run, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "replace", stopped_before(os.replace, times))
    result = inspected("--run", run, *SHORT, "--out", tmp_path / "out", code=130 if times == 2 else 0)
    if times == 1:
        assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, "run.png"}
    else:
        assert "Stopped. Nothing was written." in result.stderr
        assert list(tmp_path.iterdir()) == []


def test_help_teaches():
    result = CliRunner().invoke(app(), ["inspect", "--help"], env={"COLUMNS": "80", "NO_COLOR": "1"})
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())
    assert max(map(len, result.output.splitlines())) <= 80
    for option in ("--run", "--fresh", "--model", "--data", "--steps", "--oldest", "--capture-share", "--json"):
        assert option in text
    assert "galore inspect --run runs/60m --fresh" in text


@pytest.mark.slow
def test_a_browser_shows_the_page(browser, run, tmp_path):
    inspected("--run", run, *SHORT, "--out", tmp_path / "out")
    for scheme in ("light", "dark"):
        for width in (375, 1200):
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 400}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            browser.get((tmp_path / "out" / "report.html").as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            assert browser.execute_script("return document.querySelectorAll('figure svg').length") == 6
            assert browser.execute_script("return document.querySelectorAll('tbody tr').length") == 7
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_what_cannot_be_recommended_is_said(run, tmp_path):
    result = inspected("--run", run, "--steps", "4", "--every", "2", "--out", tmp_path / "out")
    told = " ".join(result.output.split())
    assert "for any module: bases of an age were judged by 1 later gradient, and 2" in told
    assert json.loads((tmp_path / "out" / "inspection.json").read_text(encoding="utf-8"))["recommended"]["rank"] is None


def test_within_a_budget_no_module_has_a_higher_rank_and_the_state_is_no_larger(run):
    free = of_run(run, rank_multiple=2)
    budget = 0.6 * free["recommended"]["state_bytes"]
    found = of_run(run, rank_multiple=2, state_budget=f"{budget / 1000:.6f}kB")
    ranks = [{name: own["recommended"]["rank"] for name, own in one["modules"].items()} for one in (free, found)]
    assert all(0 < ranks[1][name] <= rank for name, rank in ranks[0].items())
    assert ranks[1] != ranks[0]
    taken = 0
    for name, own in found["modules"].items():
        short, long = sorted(own["shape"])
        taken += 4 * own["weights"] * (short + 2 * long) * ranks[1][name]  # a basis and two moments in float32
    assert found["recommended"]["state_bytes"] == taken <= budget
    assert all(f"{name}={rank}" in found["recommended"]["flags"] for name, rank in ranks[1].items())
    (told,) = [text for text in report.texts(found) if "of optimizer state" in text]
    assert f"{readable(taken)}" in told


def test_a_budget_that_the_least_ranks_exceed_is_told(run, tmp_path):
    told = inspected("--run", run, *SHORT, "--state-budget", "1kB", "--out", tmp_path / "out", code=2).output
    assert "budget of 1.0 kB" in " ".join(told.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_trains_by_the_flags_of_the_advice(run, tmp_path):
    told = inspected("--run", run, *SHORT, "--rank-multiple", "4", "--out", tmp_path / "looks")
    (line,) = [line for line in told.output.splitlines() if line.startswith(report.BY_IT)]
    advice = line.rpartition(": ")[2]
    found = json.loads((tmp_path / "looks" / "inspection.json").read_text(encoding="utf-8"))
    assert found["recommended"]["flags"] == advice
    assert f"<code>{advice}</code>" in (tmp_path / "looks" / "report.html").read_text(encoding="utf-8")
    wanted = {name: own["recommended"]["rank"] for name, own in found["modules"].items()}
    assert len(set(wanted.values())) > 1  # else it would be one rank for all

    out, recorded = tmp_path / "by-it", run / "config.toml"
    flags = ["--config", str(recorded), "--steps", "4", "--out", str(out), *advice.split()]
    done = CliRunner().invoke(app(), ["pretrain", *flags])
    assert done.exit_code == 0, done.output
    state = torch.load(RunFolder(out).checkpoints.newest() / "optimizer.pt", weights_only=True)
    ranks = {name: group["rank"] for group in state["param_groups"] for name in group["param_names"] if "rank" in group}
    assert len(ranks) == 2 * len(wanted)
    assert all(rank == wanted[name.split(".")[-2]] for name, rank in ranks.items())
    assert f'rank_pattern = "{advice.split()[1]}"' in (out / "config.toml").read_text(encoding="utf-8")
    longer = CliRunner().invoke(app(), ["pretrain", "--resume", "--out", str(out), "--steps", "6"])
    assert longer.exit_code == 0, longer.output
