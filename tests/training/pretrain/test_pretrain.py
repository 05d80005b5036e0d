"""Whole runs of a tiny model on real text: what they leave behind, how they are stopped and go on, what they refuse."""

import itertools
import json
import signal
from pathlib import Path

import datasets
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from galore_torch.training.pretrain.presets import configure
from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run import records
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.run import new_run, resumed_run
from galore_torch.training.text import packing
from tests.training.during import During, crash, ctrl_c


def trajectory(folder: Path) -> list[dict]:
    """The records without their times: what must be equal, bit for bit."""
    timed = ("seconds", "tokens_per_second", "peak_memory_bytes", "planned_memory_bytes")
    return [
        {name: value for name, value in record.items() if name not in timed}
        for record in records.read(RunFolder(folder).metrics)
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(folder).model / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert trajectory(one) == trajectory(other)
    assert records.read(RunFolder(one).subspaces) == records.read(RunFolder(other).subspaces)
    kept, remade = weights(one), weights(other)
    assert kept.keys() == remade.keys()
    assert all(torch.equal(kept[name], remade[name]) for name in kept)


@pytest.mark.learning
@pytest.mark.usefixtures("drawn")
def test_a_run_leaves_all_that_it_promises(tiny, tmp_path):
    config = tiny()
    result = new_run(Pretraining, config, tmp_path / "run").train()
    folder = RunFolder(tmp_path / "run")

    assert configure(file=folder.config) == config
    history = records.read(folder.metrics)
    steps = [record for record in history if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert all(
        record.keys() == {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
        for record in steps
    )
    assert [record["tokens"] for record in steps] == [step * 8 * 32 for step in range(1, 9)]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5  # it fell by 1.0 to 1.1 over seeds
    assert all(record["grad_norm"] > 0 for record in steps)
    evaluations = [record for record in history if "eval_loss" in record and "final" not in record]
    assert [record["step"] for record in evaluations] == [4, 8]
    assert records.final(folder.metrics) == history[-1]
    assert history[-1]["perplexity"] == result.perplexity == evaluations[-1]["perplexity"]
    assert history[-1]["state_bytes"] == result.state_bytes > 0
    assert result.peak_memory_bytes > 10_000_000
    assert result.finished
    assert result.checkpoint is None
    assert folder.plot.read_bytes().startswith(b"\x89PNG")

    renewals = records.read(folder.subspaces)
    assert {record["step"] for record in renewals if record["renewals"] == 1} == {1}
    assert len({record["weight"] for record in renewals}) == 2 * 7
    # Of 14 layers, 4 take their turns in the steps 1, 4 and 7 from 0 on; the others two each.
    assert history[-1]["renewals"] == result.renewals == len(renewals) == 14 + 4 * 3 + 10 * 2
    last = {record["weight"]: record["overlap"] for record in renewals}.values()
    assert result.overlap == pytest.approx(sum(last) / len(last))
    assert {record["gap"] for record in renewals} == {3}

    model = AutoModelForCausalLM.from_pretrained(folder.model)
    words = AutoTokenizer.from_pretrained(folder.model)
    assert model.num_parameters() == result.parameters
    written = model.generate(**words("import ", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert words.decode(written[0]).startswith("import ")


def test_lazy_renewal_saves_renewals_and_tells_gap_and_overlap_of_each(tiny, tmp_path):
    given = {"update_proj_gap": 1, "steps": 12, "eval_every": 0}
    fixed = new_run(Pretraining, tiny(**given), tmp_path / "fixed").train()
    lazy = new_run(
        Pretraining, tiny(**given, cos_threshold=0.0, gamma_proj=3.0, queue_size=2), tmp_path / "lazy"
    ).train()
    assert fixed.renewals == 14 * 12
    assert lazy.renewals < fixed.renewals
    renewals = records.read(RunFolder(tmp_path / "lazy").subspaces)
    assert len(renewals) == lazy.renewals
    by_weight = {}
    for record in renewals:
        by_weight.setdefault(record["weight"], []).append(record)
    for own in by_weight.values():
        assert [record["renewals"] for record in own] == list(range(1, len(own) + 1))
        assert own[0]["overlap"] is None
        assert all(-1 <= record["overlap"] <= 1 for record in own[1:])
        between = [later["step"] - earlier["step"] for earlier, later in itertools.pairwise(own)]
        assert between == [record["gap"] for record in own[:-1]]  # a gap of 1 leaves no turns to take
        assert between[:2] == [1, 1]
    assert {record["gap"] for record in renewals} > {1, 3}


def test_a_full_rank_optimizer_renews_nothing(tiny, tmp_path):
    result = new_run(Pretraining, tiny(optim="adamw", steps=1, eval_every=0), tmp_path / "run").train()
    assert (result.renewals, result.overlap) == (0, None)
    assert not RunFolder(tmp_path / "run").subspaces.exists()


def test_the_learning_rate_warms_up_and_ends_at_its_share(tiny, tmp_path):
    new_run(Pretraining, tiny(steps=20, warmup=0.2, final_lr=0.1, lr=0.01, eval_every=0), tmp_path / "run").train()
    rates = [record["lr"] for record in records.read(RunFolder(tmp_path / "run").metrics) if "lr" in record]
    assert rates[:5] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01])
    assert rates == pytest.approx(rates[:5] + sorted(rates[5:], reverse=True))
    assert rates[-1] == pytest.approx(0.001, rel=0.1)


def test_the_same_seed_gives_the_same_run_and_another_another(tiny, tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        new_run(Pretraining, tiny(steps=3, eval_every=0, seed=seed), tmp_path / name).train()
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert trajectory(tmp_path / "one") != trajectory(tmp_path / "three")


def test_the_micro_batch_changes_nothing_else(tiny, tmp_path):
    losses = []
    for micro_batch in (2, 8):
        out = tmp_path / str(micro_batch)
        how = {"micro_batch": micro_batch, "gradients": "full"}  # else the first basis is of the first micro-batch
        new_run(Pretraining, tiny(steps=4, eval_every=0, **how), out).train()
        losses.append([record["loss"] for record in records.read(RunFolder(out).metrics) if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.learning
@pytest.mark.slow
def test_the_recipe_of_least_memory_trains_and_recomputing_changes_nothing(tiny, tmp_path):
    recipe = {"optim": "galore-adamw8bit", "gradients": "fused", "update": "backward", "dtype": "bfloat16"}
    losses = []
    for checkpointing in (True, False):
        out = tmp_path / str(checkpointing)
        run = new_run(
            Pretraining, tiny(**recipe, gradient_checkpointing=checkpointing, micro_batch=8, steps=5, eval_every=0), out
        )
        assert run.model.model.layers[0].gradient_checkpointing is checkpointing
        run.train()
        losses.append([record["loss"] for record in records.read(RunFolder(out).metrics) if "loss" in record])
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.3  # it fell by 0.66 to 0.73 over seeds


def epoch_of_three_steps(texts: Path, folder: Path) -> Path:
    """So little text that eight steps pass over it more than twice."""
    folder.mkdir()
    for name in ("bisect", "getopt", "glob", "colorsys"):
        (folder / f"{name}.txt").write_bytes((texts / f"{name}.txt").read_bytes()[:1900])
    return folder


@pytest.mark.parametrize(
    ("optimizer", "data", "stop"),
    [
        ("galore-adamw", "long", 5),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("galore-adamw", "short", 3),
                ("galore-adamw8bit", "long", 2),
                ("adamw", "short", 4),
                ("galore-adamw", "stream", 5),
                ("galore-adamw", "lazy", 4),
            )
        ),
    ],
)
def test_a_run_that_was_interrupted_goes_on_exactly(optimizer, data, stop, tiny, texts, tmp_path, monkeypatch):
    given = {"optim": optimizer}
    if data == "lazy":
        given |= {"cos_threshold": 0.0, "queue_size": 1, "update_proj_gap": 1}
    if data == "short":
        given["data"] = str(epoch_of_three_steps(texts, tmp_path / "short"))
    if data == "stream":
        given |= {"data": "someone/texts", "tokenizer": "train"}
        monkeypatch.setattr(packing, "_TRAINING_DOCUMENTS", 20)
        monkeypatch.setattr(packing, "_AT_ONCE", 5)
        load = datasets.load_dataset
        files = {"train": str(texts / "*.txt"), "validation": str(texts / "ast.txt")}
        monkeypatch.setattr(
            datasets,
            "load_dataset",
            lambda *_, streaming: load("text", data_files=files, sample_by="document", streaming=streaming),
        )
    config = tiny(**given)
    new_run(Pretraining, config, tmp_path / "whole").train()

    stopped = new_run(Pretraining, config, tmp_path / "parts", callbacks=[During(stop, ctrl_c)]).train()
    assert (stopped.finished, stopped.step) == (False, stop)
    assert Path(stopped.checkpoint).name == f"checkpoint-{stop}"
    assert not RunFolder(tmp_path / "parts").model.exists()
    resumed = resumed_run(Pretraining, tmp_path / "parts").train()
    assert resumed.finished
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """The result of a run whose gradients are formed, a batch at a time."""
    config = tiny(micro_batch=8, gradients="full")
    return new_run(Pretraining, config, tmp_path_factory.mktemp("plain") / "run").train()


@pytest.mark.parametrize(("gradients", "update"), [("projected", "step"), ("fused", "step"), ("fused", "backward")])
@pytest.mark.broad("fused-backward")
def test_forms_of_gradients_change_nothing_but_cost(gradients, update, plain, tiny, tmp_path):
    config = tiny(micro_batch=8, gradients=gradients, update=update)
    formed = new_run(Pretraining, config, tmp_path / "formed").train()
    assert formed.eval_loss == pytest.approx(plain.eval_loss, rel=1e-4)
    assert formed.state_bytes == plain.state_bytes


@pytest.mark.slow
def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(tiny, tmp_path):
    config = tiny(save_every=3)
    new_run(Pretraining, config, tmp_path / "whole").train()
    with pytest.raises(RuntimeError, match="went down"):
        new_run(Pretraining, config, tmp_path / "parts", callbacks=[During(5, crash)]).train()
    with RunFolder(tmp_path / "parts").metrics.open("a") as file:
        file.write('{"step": 5, "lo')  # cut short by the crash
    resumed_run(Pretraining, tmp_path / "parts").train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_run_that_crashed_before_its_first_checkpoint_starts_again(tiny, tmp_path):
    config = tiny(steps=4)
    new_run(Pretraining, config, tmp_path / "whole").train()
    with pytest.raises(RuntimeError, match="went down"):
        new_run(Pretraining, config, tmp_path / "parts", callbacks=[During(2, crash)]).train()
    resumed_run(Pretraining, tmp_path / "parts").train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_text(tiny, tmp_path):
    book = tmp_path / "book.txt"
    paragraphs = [f"In paragraph {index} there are only a few words to be learnt." for index in range(400)]
    book.write_text("\n\n".join(paragraphs), encoding="utf-8")
    new_run(Pretraining, tiny(data=str(book)), tmp_path / "run", callbacks=[During(2, ctrl_c)]).train()
    book.write_text("\n\n".join(paragraphs).replace("few words", "few letters"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"book\.txt' has changed since the run .* restore the text"):
        resumed_run(Pretraining, tmp_path / "run")
    book.write_text("\n\n".join(paragraphs), encoding="utf-8")
    assert resumed_run(Pretraining, tmp_path / "run").train().finished


def test_a_second_ctrl_c_acts_as_it_always_does(tiny, tmp_path):
    twice = During(2, lambda: (ctrl_c(), ctrl_c()))
    with pytest.raises(KeyboardInterrupt):
        new_run(Pretraining, tiny(), tmp_path / "run", callbacks=[twice]).train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_folder_that_holds_something_is_refused_and_untouched(tiny, tmp_path):
    config = tiny(steps=1, eval_every=0)
    new_run(Pretraining, config, tmp_path / "run").train()
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"already holds a run; resume it with --resume .* another --out"):
        new_run(Pretraining, config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"ended after step 1; choose another --out"):
        resumed_run(Pretraining, tmp_path / "run")
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(ValueError, match="not an empty folder; choose another --out"):
        new_run(Pretraining, config, tmp_path / "mine")
    with pytest.raises(ValueError, match="holds no run to resume"):
        resumed_run(Pretraining, tmp_path / "mine")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": "nowhere.txt"}, "does not exist"),
        ({"report_to": "wandbb"}, "report_to = 'wandbb'"),
        ({"tokenizer": "./nowhere"}, "tokenizer = './nowhere'"),
        ({"seq": 100_000, "eval_tokens": 100_000}, "sequences of 100000 tokens"),
    ],
)
def test_what_cannot_be_trained_on_leaves_no_folder(given, words, tiny, tmp_path):
    with pytest.raises(ValueError, match=words):
        new_run(Pretraining, tiny(**given), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_processes_cannot_divide_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"batch = 8 cannot be divided among 3 processes"):
        new_run(Pretraining, tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_is_recorded_as_such(tiny, tmp_path):
    result = new_run(Pretraining, tiny(optim="sgd", lr=1e30, warmup=0.0, steps=4), tmp_path / "run").train()
    lines = RunFolder(tmp_path / "run").metrics.read_text(encoding="utf-8").splitlines()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert strict[3]["loss"] is None
    assert strict[-1]["perplexity"] is None
    assert not result.perplexity < float("inf")


def test_that_the_text_is_gone_through_more_than_once_is_said_before(tiny):
    job = Pretraining(tiny(), Console(quiet=True))
    once = job.text.tokens // (8 * 32)  # whole steps
    assert "passes" not in Pretraining(tiny(steps=once), Console(quiet=True)).announcement
    assert ", 2.0 passes over the text" in Pretraining(tiny(steps=2 * once), Console(quiet=True)).announcement


def test_callbacks_of_ones_own_are_called(tiny, tmp_path):
    seen = []
    run = new_run(
        Pretraining, tiny(steps=2, eval_every=0), tmp_path / "run", callbacks=[During(2, lambda: seen.append(2))]
    )
    run.train()
    assert seen == [2]
