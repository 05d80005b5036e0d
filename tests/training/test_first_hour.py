"""The mistakes of a newcomer: each is told in a line with its remedy, most before torch is imported.

In a process of its own that has not imported torch the whole table is gone through.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoConfig
from typer.testing import CliRunner

import galore_torch
from galore_torch.training.finetune.presets import configure as finetune
from galore_torch.training.pretrain.presets import configure as pretrain
from tests.command_line import app
from tests.training.mistakes import EARLY, FILES
from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[2]

# In Python: what is written, with a model, a weight W of it and groups of one's OWN; and words of what is told.
SNIPPETS = [
    ("GaLoreAdamW(OWN, lr='1e-2')", "lr is '1e-2'"),
    ("GaLoreAdamW(OWN, lr=-1)", "such as 0.01"),
    ("GaLoreAdamW(OWN, lr=0.1, betas=0.9)", "such as (0.9, 0.999)"),
    ("GaLoreAdamW([{'params': [W], 'rank': '4'}], lr=0.1)", "use a whole number"),
    ("GaLoreAdamW(model, lr=0.1)", "pass param_groups(model, rank=...)"),
    ("GaLoreAdamW([], lr=0.1)", "pass param_groups(model, rank=...)"),
    ("param_groups(model.parameters(), rank=4)", "pass the nn.Module itself"),
    ("param_groups(torch.nn.Linear, rank=4)", "pass the nn.Module itself"),
    ("param_groups(model, rank=4, target_modules='attn')", "all-linear"),
    ("param_groups(model, rank=4, proj_type='both')", "proj_type"),
    ("GaLore(OWN, optimizer_class='adamw', lr=0.1)", "pass a class of optimizers itself"),
    ("GaLore(OWN, optimizer_class=torch.optim.SGD([W], lr=1), lr=0.1)", "class"),
    ("GaLoreAdamW(OWN, lr=0.1).load_state_dict('run.pt')", "state_dict is a str; pass what"),
    ("GaLoreAdamW(OWN, lr=0.1).load_state_dict(model.state_dict())", "this is no optimizer's state"),
    ("attach(model, GaLoreAdamW)", "pass the GaLore optimizer itself"),
    ("attach(model, torch.optim.AdamW([W]))", "pass the GaLore optimizer itself"),
    ("attach(GaLoreAdamW(OWN, lr=0.1), model)", "pass the nn.Module"),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A newcomer's folder, with what may be wrong in it."""
    folder = tmp_path_factory.mktemp("here")
    for name in ("empty", "pictures", "mixed", "full", "begun", "bare", "broken", "listed", "torn", "encoder"):
        (folder / name).mkdir()
    AutoConfig.for_model("llama").save_pretrained(folder / "causal")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="latin-1")
    return folder


TYPED = """
import json, sys
from typer.testing import CliRunner
from tests.command_line import app
from tests.training.mistakes import EARLY, FILES
found = []
for line in json.loads(sys.stdin.read()):
    before = "torch" in sys.modules
    told = CliRunner().invoke(app(), line.split(), env={"COLUMNS": "400"})
    found.append([told.exit_code, told.output, "torch" in sys.modules and not before])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def told(here: Path) -> dict[str, list]:
    """Exit status and output of each command of the table, and whether torch had been imported by then."""
    lines = [line for line, _ in EARLY]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", TYPED], input=json.dumps(lines), capture_output=True, text=True, cwd=here,
        env=environment, timeout=DEADLINE, check=True,
    )  # fmt: skip
    return dict(zip(lines, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("line", "words"), EARLY)
def test_a_mistake_is_told_with_its_remedy_before_torch_is_imported(line, words, told):
    status, output, torch_was_imported = told[line]
    assert status == 2, output
    assert words in " ".join(output.split())
    assert "Traceback" not in output
    assert not torch_was_imported


def test_there_are_enough_of_them():
    assert len({line for line, _ in EARLY}) >= 60


@pytest.mark.parametrize(("snippet", "words"), SNIPPETS)
def test_a_mistake_in_python_is_a_value_error_with_its_remedy(snippet, words):
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    W = model[0].weight
    names = {**{name: getattr(galore_torch, name) for name in galore_torch.__all__}, "torch": torch}
    with pytest.raises(ValueError, match=r"\S") as caught:
        eval(snippet, {**names, "model": model, "W": W, "OWN": [{"params": [W], "rank": 4}]})
    assert words in str(caught.value), str(caught.value)


# The Hub -------------------------------------------------------------------------------------------------------------


class NoSuchRepositoryError(RepositoryNotFoundError):
    """As the Hub's client raises it, without the response that it is made of."""

    def __init__(self):
        Exception.__init__(self, "no such repository")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """Stand in for the Hub, which answers a question by an error; whether it is offline is put back."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    asked = []

    def answering(error: Exception):
        def repo_info(_self, name, **_):
            asked.append(name)
            raise error

        monkeypatch.setattr(HfApi, "repo_info", repo_info)
        return asked

    return answering


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (lambda: pretrain(model="nobody/nothing"), "nobody/nothing"),
        (lambda: pretrain(config_of="nobody/nothing"), "nobody/nothing"),
        (lambda: pretrain(data="nobody/texts"), "nobody/texts"),
        (lambda: finetune(data="nobody/rows", model="nobody/nothing"), "nobody/rows"),
    ],
)
def test_a_name_that_the_hub_does_not_have_is_told_at_once(settings, name, hub):
    asked = hub(NoSuchRepositoryError())
    with pytest.raises(ValueError, match=f"= '{name}' cannot be loaded: .* check the name"):
        settings().require_there()
    assert asked == [name]


def test_where_the_hub_is_not_reached_nobody_tries_again(hub):
    from huggingface_hub import constants

    hub(OSError("no network"))
    with pytest.raises(ValueError, match=r"not reached \(no network\); check the path and the network"):
        pretrain(model="nobody/nothing").require_there()
    pretrain(data="nobody/texts").require_there()
    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"


# What is told of a run -----------------------------------------------------------------------------------------------


def told_by(*arguments: str) -> str:
    done = CliRunner().invoke(app(), list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def test_version_and_help_have_their_usual_names():
    assert told_by("--version").startswith("galore-torch 2")
    for line in ("-h", "pretrain -h", "finetune -h", "compare -h", "compare pretrain -h", "evaluate -h"):
        assert "Usage" in told_by(*line.split())


SMALL = [
    "--vocab", "300", "--seq", "16", "--eval-tokens", "64", "--hidden", "16", "--intermediate", "32", "--layers", "1",
    "--heads", "2", "--rank", "4", "--batch", "4", "--micro-batch", "4", "--eval-every", "0", "--steps", "1",
]  # fmt: skip
WORDS = [f"The {index} small words of line {index} are not many, but they are words." for index in range(60)]


@pytest.mark.parametrize(
    ("name", "text", "documents"),
    [
        ("lines.txt", "\n".join(WORDS), 60),
        ("paragraphs.txt", "\n\n".join(WORDS[:50]), 50),
        ("rows.csv", "text,stars\n" + "".join(f'"{line}",1\n' for line in WORDS[:40]), 40),
    ],
)
def test_what_was_read_is_told(name, text, documents, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    said = told_by("pretrain", "--prepare", "--data", str(tmp_path / name), "--cache", str(tmp_path / "cache"), *SMALL)
    assert f"files 1, documents {documents}, held out {max(1, round(documents / 20))}" in said


def test_of_a_short_run_is_told_that_rates_are_for_longer_ones_and_that_a_guess_is_as_good(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.txt").write_text("\n".join(WORDS[index::4]), encoding="utf-8")
    (folder / "logo.png").write_bytes(b"\x89PNG")
    flags = ["--data", str(folder), "--cache", str(tmp_path / "cache"), *SMALL]
    said = told_by("pretrain", *flags, "--warmup", "0", "--out", str(tmp_path / "run"))
    assert "left out, as empty or no text: logo.png" in said
    assert "are for 400 steps, not 1" in said
    worse = told_by("pretrain", *flags, "--lr", "30", "--warmup", "0", "--out", str(tmp_path / "worse"))
    assert "no better than to guess among 300 tokens" in worse
    assert "are for 400 steps" not in worse
