"""The console command: its help, its errors and its signals, in real processes where that is what counts."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from galore_torch.training.finetune.config import FinetuneConfig
from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.pretrain.presets import PRESETS
from galore_torch.training.settings.config import sections_of
from tests.command_line import app
from tests.forked import Galore
from tests.waiting import DEADLINE, wait_for

TEXT = "\n\n".join(
    f"The {index} small words of paragraph {index} are not many, but they are words." for index in range(200)
)
TINY = [
    "--vocab", "300", "--seq", "16", "--eval-tokens", "64", "--hidden", "16", "--intermediate", "32", "--layers", "1",
    "--heads", "2", "--rank", "4", "--update-proj-gap", "4", "--batch", "4", "--micro-batch", "4", "--eval-every", "0",
]  # fmt: skip


def shown(*arguments: str, width: int = 80) -> str:
    """What a command prints, without its colours and boxes."""
    result = CliRunner().invoke(app(), arguments, env={"COLUMNS": str(width), "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= width
    return " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


def galore(*arguments: str, python: str = "", **options) -> subprocess.Popen[str]:
    """A real process of the console command."""
    code = f"{python}\nfrom galore_torch.cli import main; import sys; sys.argv[0] = 'galore'; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.fixture
def tiny(tmp_path):
    """Flags of a very small run in a folder of its own."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return ["pretrain", "--data", str(tmp_path / "text.txt"), "--cache", str(tmp_path / "cache"), *TINY]


def test_help_names_the_commands():
    assert "pretrain" in shown("--help")


@pytest.mark.parametrize("width", [80, 100])
def test_the_help_of_pretrain_teaches(width):
    text = shown("pretrain", "--help", width=width)
    for section in sections_of(PretrainConfig).values():
        for field in dataclasses.fields(section):
            assert f"--{field.name.replace('_', '-')}" in text
    assert all(preset in text for preset in PRESETS)
    assert "galore pretrain --preset llama-60m --data allenai/c4 --out runs/60m" in text
    assert "Steps between two renewals of a basis. [by preset; llama-tiny: 50]" in text
    assert "--no-stagger" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "0"], "rank = 0 is out of range; it must be at least 1."),
        (["--preset", "llama-2b"], "preset = 'llama-2b' is not known"),
        (["--resume"], "give its folder as --out"),
        (["--resume", "--out", "x", "--rank", "4"], "leave out rank"),
        (["--resume", "--out", "x"], "holds no run to resume"),
        (["--config", "nowhere.toml"], "cannot be read as TOML"),
        (["--data", "nowhere.txt"], "data = 'nowhere.txt' does not exist"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app(), ["pretrain", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_help_of_compare_teaches_both_jobs():
    whole = shown("compare", "--help")
    assert "pretrain Compare methods on a pre-training" in whole
    assert "finetune Compare methods on a fine-tuning" in whole
    assert "galore compare pretrain --method full --method galore --seed 0 --seed 1" in whole
    assert "galore compare finetune --task rte" in whole
    for command, config in (("pretrain", PretrainConfig), ("finetune", FinetuneConfig)):
        text = shown("compare", command, "--help")
        for section in sections_of(config).values():
            for field in dataclasses.fields(section):
                assert f"--{field.name.replace('_', '-')}" in text
        assert all(f"--{name}" in text for name in ("set", "method", "report-only", "dry-run"))
        assert f"galore compare {command} " in text


@pytest.mark.parametrize("start", [["compare"], ["compare", "pretrain"]])
def test_compare_means_pretrain_where_it_does_not_say(start):
    text = shown(*start, "--dry-run", "--steps", "10", "--method", "galore", "--lr", "0.5", "--set", "galore:batch=8")
    assert text == "galore lr-0.5 seed 0: 10,240 tokens 1 runs, 10,240 tokens in all"
    bare = CliRunner().invoke(app(), ["compare", "pretrian"])
    assert bare.exit_code == 2
    assert "Did you mean 'pretrain'" in bare.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "gallore"], "method = 'gallore' is not known; did you mean 'galore'"),
        (["finetune", "--task", "rtee"], "task = 'rtee' is not known"),
        (["finetune"], "data = None leaves task = 'classify' without rows; give a file."),
        (["finetune", "--task", "rte", "--set", "adam:eps=1"], "add --method adam"),
        (["finetune", "--task", "rte", "--set", "lora"], "is not METHOD:NAME=VALUE"),
        (["finetune", "--task", "rte", "--set", "lora:rnk=1"], "rnk = 1 is no setting of a fine-tuning"),
        (["finetune", "--task", "rte", "--set", "full:rank=1"], "rank = 1 has no effect with method = 'full'"),
        (["finetune", "--task", "rte", "--set", "lora:lr=1"], "give --lr METHOD=X"),
        (["finetune", "--task", "rte", "--set", "lora:adapter=none"], "choose them by --method"),
        (["finetune", "--task", "rte", "--set", "lora:epochs=1"], "full would see 30 epochs and lora 1 epoch"),
        (["finetune", "--task", "rte", "--preset", "rte"], "preset = 'rte' is not known"),
        (["finetune", "--task", "rte", "--report-only"], "holds no comparison to report on"),
    ],
)
def test_what_is_wrong_with_a_comparison_is_told_in_a_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app(), ["compare", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.startswith("galore compare ")
    assert len(result.output.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_told_with_the_line_that_installs_it():
    hide = (
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name in ('datasets', 'typer') else find(name, *rest)"
    )
    process = galore("pretrain", python=hide)
    _, error = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "needs datasets, typer" in error
    assert 'pip install ".[train]"  in the folder of galore-torch 2' in error
    assert "Traceback" not in error


def test_a_run_is_shown_as_plain_lines_and_its_folder_is_refused_afterwards(tiny, tmp_path):
    out = str(tmp_path / "run")
    done = CliRunner().invoke(app(), [*tiny, "--steps", "6", "--out", out])
    assert done.exit_code == 0, done.output
    assert re.search(r"step 1/6  loss \d\.\d+  lr \S+  [\d,]+ tok/s  state [\d.]+ [kMG]B\n", done.output)
    assert re.search(r"step 6/6  loss .* [kMG]B  0:00:00 left\n", done.output)
    assert "perplexity" in done.output
    assert f"model {out}/model" in done.output.replace("\n", "")
    assert "\x1b" not in done.output

    again = CliRunner().invoke(app(), [*tiny, "--out", out])
    assert again.exit_code == 2
    assert "already holds a run" in again.stderr


def test_a_file_of_settings_is_enough(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("galore_torch.training.run.machine.planned_peak", lambda *_: None)
    first = CliRunner().invoke(app(), [*tiny, "--steps", "2", "--out", str(tmp_path / "one"), "--json"])
    config = str(tmp_path / "one" / "config.toml")
    second = CliRunner().invoke(
        app(), ["pretrain", "--config", config, "--out", str(tmp_path / "two"), "--steps", "3", "--json"]
    )
    one, two = json.loads(first.stdout), json.loads(second.stdout)
    assert (one["step"], two["step"]) == (2, 3)
    assert one["parameters"] == two["parameters"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"PYTHONOPTIMIZE": "2"}, ["PYTHONOPTIMIZE=2", "leave it out"]),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ["no UTF-8", "PYTHONUTF8=1"]),
    ],
    ids=["without docstrings", "without UTF-8"],
)
def test_surroundings_in_which_no_run_can_end_well_are_told_at_once(given, words, tmp_path):
    process = galore("pretrain", "--out", str(tmp_path / "\u00e9"), env={**os.environ, **given})
    output, error = process.communicate(timeout=DEADLINE)
    assert process.returncode == 2
    assert output == ""
    assert "Traceback" not in error
    assert all(word in error for word in words)
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_without_a_size_is_written_to():
    output, _ = galore("plan", "--help", env={**os.environ, "COLUMNS": "0"}).communicate(timeout=DEADLINE)
    assert "--memory" in output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_result_that_cannot_be_written_is_told():
    code = "import galore_torch.cli as cli; cli.build_app = lambda: lambda: print('a result'); cli.main()"

    def ended(output) -> tuple[int, str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
        return done.returncode, done.stderr

    with Path("/dev/full").open("w", encoding="utf-8") as full:
        assert ended(full) == (1, "galore: the output could not be written: No space left on device.\n")
    reader, writer = os.pipe()
    os.close(reader)
    assert ended(writer) == (128 + signal.SIGPIPE, "")
    os.close(writer)


def test_text_can_be_prepared_for_runs_to_come(tiny, tmp_path):
    done = CliRunner().invoke(app(), [*tiny, "--prepare"])
    assert done.exit_code == 0, done.output
    assert re.search(r"is ready: [\d,]+ tokens; cached in", done.output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text.txt"]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tiny, tmp_path):
    out = tmp_path / "run"
    process = Galore(*tiny, "--steps", "100000", "--out", out)
    wait_for(lambda: lines(out / "metrics.jsonl") >= 3, process)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate()
    assert process.returncode == 130, error
    stopped = int(re.search(r"Stopped after step ([\d,]+)\.", output)[1].replace(",", ""))
    checkpoint = out / "checkpoints" / f"checkpoint-{stopped}"
    assert f"It is saved in {checkpoint}; resume with:\n  galore pretrain --resume --out {out}\n" in output
    assert (checkpoint / "optimizer.pt").exists()
    assert lines(out / "metrics.jsonl") == stopped
    assert error == ""
