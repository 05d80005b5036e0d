"""Comparisons of fine-tunings: real runs of a tiny encoder that are stopped, killed and go on, and their page."""

import json
import random
import signal

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, TrainerCallback

from galore_torch.training.compare.plan import make_plan
from galore_torch.training.finetune.command import FINETUNE
from galore_torch.training.finetune.presets import configure
from galore_torch.training.finetune.run import Finetuning
from galore_torch.training.run import records
from galore_torch.training.run.run import new_run, resumed_run
from tests.forked import Galore, galore
from tests.training.during import last_record
from tests.waiting import wait_for

WORDS = ("good", "fine", "bad", "poor", "film", "book", "it", "is", "was", "the", "a", "not", "very")
RATE = "lr-0.003"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Flags of a comparison in seconds: a BERT of two layers on eighty rows."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder / "bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "bert")
    draw = random.Random(0)
    rows = []
    for index in range(80):
        said = draw.choices(WORDS[4:], k=5)
        said[index % 5] = WORDS[index % 4]
        rows.append(json.dumps({"text": " ".join(said), "label": int(index % 4 < 2)}) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows))
    return [
        "--model", str(folder / "bert"), "--data", str(folder / "rows.jsonl"), "--max-length", "12", "--epochs", "6",
        "--batch", "8", "--update-proj-gap", "5", "--save-every", "5", "--lr", "0.003", "--held-out-share", "0.25",
        "--method", "full", "--method", "galore", "--set", "galore:rank=2",
    ]  # fmt: skip


def compare(given, out, *more):
    return ["compare", "finetune", *given, "--out", str(out), *more]


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """The folder of a comparison that nothing disturbed, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "compared"
    done = galore(*compare(given, out))
    assert done.returncode == 0, done.stderr + done.stdout
    return out, done.stdout


def measured(out, method):
    timed = ("seconds", "examples_per_second", "peak_memory_bytes", "planned_memory_bytes")
    history = records.read(out / method / RATE / "seed-0" / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in timed} for record in history]


@pytest.mark.slow
def test_a_stopped_and_a_killed_comparison_go_on_to_the_same_result(given, whole, tmp_path):
    out = tmp_path / "parts"

    def step(method):
        return (last_record(out / method / RATE / "seed-0/metrics.jsonl") or {"step": 0})["step"]

    stopped = Galore(*compare(given, out))
    wait_for(lambda: step("full") >= 7, stopped)
    stopped.send_signal(signal.SIGINT)
    _, error = stopped.communicate()
    assert stopped.returncode == 130
    assert f"of 2 runs finished. {out} is saved; the same command goes on." in error
    killed = Galore(*compare(given, out))
    wait_for(lambda: step("galore") >= 7, killed)
    killed.kill_with_children()
    again = galore(*compare(given, out, "--json"))
    assert again.returncode == 0, again.stderr
    for method in ("full", "galore"):
        assert measured(out, method) == measured(whole[0], method)
    result = json.loads(again.stdout)
    assert (result["job"], result["score"]) == ("finetune", "accuracy")
    assert [run["error"] for run in result["runs"]] == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("at", [7, 8])
def test_a_run_stopped_at_the_end_of_an_epoch_goes_on_exactly(at, whole, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == at

    config = whole[0] / "galore" / RATE / "seed-0" / "config.toml"
    new_run(Finetuning, configure(None, config), tmp_path / "run", callbacks=[Stop()]).train()
    assert resumed_run(Finetuning, tmp_path / "run").train().finished
    history = records.read(tmp_path / "run" / "metrics.jsonl")
    assert [record.get("loss") for record in history] == [record.get("loss") for record in measured(whole[0], "galore")]


@pytest.mark.slow
def test_the_end_is_told_with_the_score_and_what_is_behind_it(whole):
    out, printed = whole
    final = measured(out, "galore")[-1]
    accuracy = f"{final['scores']['accuracy']:.4f}"
    assert f"2/2 galore {RATE} seed 0: accuracy {accuracy}, matthews " in printed
    words = [line.split()[0].strip("─") for line in printed.splitlines()[-5:-1]]
    assert words == ["method", "", "full", "galore"]
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    assert plan["job"] == "finetune"
    assert plan["runs"][f"galore/{RATE}/seed-0"]["optimizer"]["rank"] == 2
    steps = [record for record in measured(out, "full") if "loss" in record]
    assert [record["epoch"] for record in steps[7::8]] == [1, 2, 3, 4, 5, 6][: len(steps[7::8])]
    assert steps[-1]["epoch"] == 6


@pytest.mark.slow
def test_a_browser_shows_the_page_on_a_phone_and_in_the_dark(whole, browser):
    path = whole[0] / "report.html"
    for width, scheme in ((375, "dark"), (1200, "light")):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 400}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(path.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        headings = browser.execute_script("return [...document.querySelectorAll('h1, h2')].map(e => e.textContent)")
        assert headings == [
            "2 methods, 6 epochs each", "Curves", "Subspaces", "All runs", "How it was made",
            "Settings of each method", "Settings of all runs",
        ]  # fmt: skip
        figures = browser.execute_script(
            "return [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)"
        )
        assert len(figures) == 5
        assert min(figures) > 300
        caption = browser.execute_script("return document.querySelector('caption span').getBoundingClientRect().right")
        assert caption <= width
    cells = browser.execute_script(
        "return [...document.querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    full, galore = cells[0], cells[1]
    assert (full[0], full[3], galore[0]) == ("full", "+0.0", "galore")
    assert full[-1] == galore[-1] != ""
    assert ["rank", "", "2"] in cells
    assert "examples seen" in browser.find_element("tag name", "body").text
    assert browser.get_log("browser") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "instead", "words"),
    [
        ("rows.jsonl", "nowhere.csv", "data = 'nowhere.csv' does not exist"),
        ("bert", "no/model", "model = 'no/model' cannot be loaded: "),
    ],
)
def test_what_the_first_run_refuses_is_told_in_a_line_and_nothing_is_left(suffix, instead, words, given, tmp_path):
    wrong = [instead if word.endswith(suffix) else word for word in given]
    done = galore(*compare(wrong, tmp_path / "compared"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"galore compare finetune: {words}")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_settings_of_every_run_survive_its_file(tmp_path):
    sets = ("lora:adapter_rank=2", "galore:rank=8", "galore:stagger=false")
    methods = ("full", "galore", "lora", "qgalore", "full-per-layer")
    for run in make_plan(FINETUNE, None, methods, (), (), (3,), {"task": "cola", "max_grad_norm": 0.0}, sets):
        path = tmp_path / "run.toml"
        path.write_text(run.config.to_toml(), encoding="utf-8")
        assert configure(None, path) == run.config
