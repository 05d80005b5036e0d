"""What is wrong is told in a line, with the field, the value and a remedy, before any training; nothing is left."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from galore_torch.training.finetune.config import GLUE, TASKS
from galore_torch.training.finetune.presets import configure
from galore_torch.training.finetune.run import Finetuning
from galore_torch.training.pretrain.presets import configure as pretrain
from galore_torch.training.run.files import write_manifest
from galore_torch.training.run.run import new_run
from tests.command_line import app
from tests.training.finetune.conftest import sentences

ROWS = [{"text": text, "label": label} for text, label in sentences()]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"task": "colla"}, ["task = 'colla'", "did you mean 'cola'"]),
        ({"method": "galor", "data": "x"}, ["method = 'galor'", "did you mean 'galore'"]),
        ({"preset": "glue", "data": "x"}, ["preset = 'glue'", "glue-rank4"]),
        ({}, ["data = None", "task = 'classify'", "give a file"]),
        ({"task": "rte", "data": "x.csv"}, ["data = 'x.csv'", "brings its own"]),
        ({"task": "rte", "label_column": "x"}, ["label_column = 'x'", "task = 'rte'"]),
        ({"task": "sft", "data": "x", "label_column": "stars"}, ["label_column = 'stars'", "task = 'sft'"]),
        ({"data": "x", "answers": 3}, ["answers = 3", "task = 'classify'"]),
        ({"data": "x", "rank": 0}, ["rank = 0", "at least 1"]),
        ({"data": "x", "stepps": 3}, ["stepps = 3", "did you mean steps"]),
        ({"data": "x", "batch": 8, "micro_batch": 3}, ["micro_batch = 3", "divisor"]),
        ({"data": "x", "method": "low-rank"}, ["adapter = 'low-rank'", "choose lora"]),
        ({"data": "x", "method": "full", "rank": 4}, ["rank = 4", "method = 'full'"]),
        ({"data": "x", "method": "lora", "update": "backward"}, ["update = 'backward'", "adapter = 'lora'"]),
        ({"data": "x", "method": "full", "gradients": "fused"}, ["gradients = 'fused'"]),
        ({"data": "x", "method": "relora"}, ["restart_every = None", "give it"]),
        (
            {"data": "x", "method": "galore-per-layer", "batch": 8, "micro_batch": 2},
            ["update is 'backward'", "micro_batch = 2"],
        ),
    ],
)
def test_settings_that_do_not_fit(given, words):
    with pytest.raises(ValueError, match="=") as wrong:
        configure(**given)
    for word in words:
        assert word in str(wrong.value)


def without(field):
    return [{name: value for name, value in row.items() if name != field} for row in ROWS]


def constant(rows=ROWS):
    return [{**row, "label": "one"} for row in rows]


@pytest.mark.parametrize(
    ("rows", "given", "words"),
    [
        (without("label"), {}, ["label_column = 'label'", "choose one of text"]),
        (without("text"), {}, ["text_column = 'text'", "choose one of label"]),
        (ROWS, {"label_column": "stars"}, ["label_column = 'stars'", "text, label"]),
        (constant(), {}, ["label_column = 'label' is 'one' in all rows", "at least two"]),
        ([{**row, "label": None} for row in ROWS], {}, ["label_column = 'label'", "without a label"]),
        ([*ROWS[:50], {**ROWS[0], "label": None}, *ROWS], {}, ["label_column = 'label'", "without a label in row 51;"]),
        ([*ROWS, {"text": "a", "label": 1}], {}, ["holds texts, and ints in row 141;", "make all texts"]),
        ([{**row, "label": [1]} for row in ROWS], {}, ["label_column = 'label' holds lists", "choose another column"]),
        ([*ROWS[:50], {**ROWS[0], "text": " "}, *ROWS], {}, ["text_column = 'text' is empty in row 51;"]),
        ([{**row, "text": {"a": 1}} for row in ROWS], {}, ["text_column = 'text' holds dicts"]),
        (ROWS[:1], {}, ["holds 1 rows", "at least two"]),
        (ROWS, {"labels": "numbers"}, ["labels = 'numbers'", "holds text"]),
        (ROWS, {"max_length": 65}, ["max_length = 65", "64 positions"]),
        (
            ROWS,
            {"method": "galore", "target_modules": "attn.c_proj"},
            ["target_modules", "attn.c_proj", "match no linear layer", "all-linear"],
        ),
        (ROWS, {"method": "lora", "rank": 64}, ["adapter_rank = 64", "at most 32"]),
        (ROWS, {"report_to": "nobody"}, ["report_to = 'nobody'", "not installed"]),
        (ROWS, {"model": "no/such/model"}, ["model = 'no/such/model'", "cannot be loaded"]),
        (ROWS, {"gguf_file": "x.gguf"}, ["model = ", "cannot be loaded"]),
    ],
)
def test_rows_and_models_that_do_not_fit(classify, write, tmp_path, rows, given, words):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r".") as wrong:
        new_run(Finetuning, classify(**{"data": write("given.jsonl", rows), **given}), out)
    for word in words:
        assert word in str(wrong.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere.csv", None, ["data = ", "does not exist", "give one that exists"]),
        ("rows.txt", "text,label\n", ["is no file of rows", "CSV, TSV, JSON lines or Parquet"]),
        ("rows.csv", "", ["is empty"]),
        ("rows.csv", "text,label\n", ["holds no rows"]),
        ("rows.jsonl", "{no json}\n", ["line 1 is not JSON", "fix the line"]),
        ("rows.parquet", "no parquet", ["cannot be read as parquet", "or give another"]),
        ("rows.parquet", "PAR1 cut off", ["cannot be read as parquet", "or give another"]),
        ("rows.jsonl", "\n\n", ["holds no rows"]),
        ("rows.tsv", "text\tlabel\n", ["holds no rows"]),
        ("rows.csv", "text,label\na,b\na, b,c\n", ["line 3 has 3 fields", "the header 2", '"quotes"']),
        ("rows.tsv", "text\tlabel\na\tb\tc\n", ["line 2 has 3 fields", "the header 2"]),
    ],
)
def test_files_that_cannot_be_read(classify, tmp_path, name, content, words):
    folder = tmp_path / "given"
    folder.mkdir()
    if content is not None:
        (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="data = ") as wrong:
        new_run(Finetuning, classify(data=str(folder / name)), tmp_path / "run")
    for word in words:
        assert word in str(wrong.value)
    assert not (tmp_path / "run").exists()


def test_words_that_stand_for_nothing_in_a_table_are_told_as_such(classify, tmp_path):
    data = tmp_path / "rows.csv"
    data.write_text("text,label\na,None\nb,some\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"without a label in row 1; .*None, null.*use other words"):
        new_run(Finetuning, classify(data=str(data)), tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.csv", "text,label\n", "holds no rows"),
        ("rows.csv", "text,label\na,b,c\n", "line 2 has 3 fields"),
        ("rows.csv", "text,label\na,one\nb,one\n", "is 'one' in all rows"),
        ("rows.csv", "text;label\na, b;c\n", "text_column = 'text' is not .* parted by commas"),
        ("rows.parquet", "PAR1 cut off", "cannot be read as parquet"),
    ],
)
def test_they_are_told_before_libraries_are_imported(name, content, words, classify, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    config = classify(data=str(tmp_path / name))
    with pytest.raises(ValueError, match=words):
        config.require_there()


def test_one_class_is_enough_for_a_model_that_knows_it(classify, encoder, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,one\nb,one\n", encoding="utf-8")
    shutil.copytree(encoder, tmp_path / "model")
    config = classify(data=str(tmp_path / "rows.csv"), model=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="is 'one' in all rows"):
        config.require_there()
    config.require_there("predict")
    file = tmp_path / "model" / "config.json"
    known = {**json.loads(file.read_text(encoding="utf-8")), "id2label": {"0": "one", "1": "two"}}
    file.write_text(json.dumps(known), encoding="utf-8")
    config.require_there()


def test_a_class_that_is_only_held_out(classify, write, tmp_path):
    held_out = write("held_out.jsonl", [{"text": "a line", "label": "json"}])
    with pytest.raises(ValueError, match=r"holds 'json' in held-out rows only; train on it too"):
        new_run(Finetuning, classify(held_out=held_out), tmp_path / "run")


@pytest.mark.parametrize("data", [{"data": "rows.jsonl"}, {"held_out": "rows.jsonl", "data": "rows.csv"}])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "galore-8bit"}, r"galore-adamw8bit.* needs bitsandbytes\. Install it with: .*\[bnb\]"),
        ({"others_bits": 4}, r"others_bits = 4 needs torchao\. Install it with: .*\[torchao\]"),
    ],
)
def test_a_library_that_an_optimizer_needs_is_told_first(data, settings, words, classify, monkeypatch):
    monkeypatch.setattr("galore_torch.training.settings.optimizer.find_spec", lambda _: None)
    config = classify(**data, **settings)
    with pytest.raises(ImportError, match=words):
        config.require_there()


@pytest.mark.parametrize(("batch", "at_once"), [(4, 4), (7, 7), (12, 6), (64, 8)])
def test_a_micro_batch_of_the_preset_fits_a_batch_of_ones_own(batch, at_once):
    assert pretrain("llama-tiny", batch=batch).schedule.micro_batch == at_once
    with pytest.raises(ValueError, match="choose a divisor"):
        pretrain("llama-tiny", batch=batch, micro_batch=5)


def test_numbers_that_are_not_finite(classify, write, tmp_path):
    rows = [{"text": text, "label": float(index)} for index, (text, _) in enumerate(sentences())]
    data = write("numbers.csv", [*rows, {"text": "endless", "label": float("inf")}])
    with pytest.raises(ValueError, match=r"label_column = 'label' holds inf; give finite numbers"):
        new_run(Finetuning, classify(data=data), tmp_path / "run")


def test_a_tokenizer_that_does_not_fit(classify, encoder, tmp_path):
    folder = tmp_path / "model"
    AutoModelForMaskedLM.from_pretrained(encoder).save_pretrained(folder)
    words = {f"w{index}": index for index in range(500)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w1", unk_token="w0"
    ).save_pretrained(folder)
    with pytest.raises(ValueError, match="embeds 400 tokens and its tokenizer has 500"):
        new_run(Finetuning, classify(model=str(folder)), tmp_path / "run")


@pytest.mark.parametrize(
    ("rows", "given", "words"),
    [
        ([{"question": "a"}] * 4, {}, ["messages or prompt, completion or text", "question"]),
        ([{"messages": []}] * 4, {}, ["messages in rows 1, 2, 3, 4 ", "mend it"]),
        ([{"messages": [{"content": "a"}]}] * 4, {}, ["messages in rows 1, 2, 3, 4 ", "role and content"]),
        ([{"prompt": "a", "completion": " "}] * 4, {}, ["is empty in row"]),
        ([{"text": "a"}] * 4, {"answers_only": True}, ["answers_only = True", "has no effect without messages"]),
        ([{"text": "a"}] * 4, {"max_length": 500}, ["max_length = 500", "128 positions"]),
        ([{"text": "a"}] * 4, {"model": "{encoder}"}, ["is an encoder (bert)", "--task classify"]),
        ([{"instruction": "a", "output": ""}] * 4, {}, ["column = 'completion' is empty in rows 1, 2, 3, 4;"]),
        ([{"prompt": "a " * 99, "completion": "b"}] * 4, {"max_length": 8}, ["max_length = 8", "give more"]),
        ([{"chosen": "a", "rejected": "b"}] * 4, {"task": "dpo"}, ["begin alike in no row", "name one so"]),
    ],
)
def test_rows_that_nothing_can_be_learnt_from(supervise, encoder, write, tmp_path, rows, given, words):
    given = {name: str(encoder) if value == "{encoder}" else value for name, value in given.items()}
    with pytest.raises(ValueError, match=r".") as wrong:
        new_run(Finetuning, supervise(data=write("given.jsonl", rows), **given), tmp_path / "run")
    for word in words:
        assert word in str(wrong.value)
    assert not (tmp_path / "run").exists()


def test_answers_alone_need_a_template_that_marks_them(supervise, causal, write, tmp_path):
    from transformers import AutoTokenizer, LlamaForCausalLM

    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
    data = write("chats.jsonl", rows)
    for template, words in (("{{ messages[0]['content'] }}", "does not mark answers"), (None, "no chat template")):
        folder = tmp_path / words.replace(" ", "-")
        LlamaForCausalLM.from_pretrained(causal).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(causal)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").unlink(missing_ok=template is None)
        tokenizer.save_pretrained(folder)
        with pytest.raises(ValueError, match=words):
            new_run(Finetuning, supervise(model=str(folder), data=data, answers_only=True), tmp_path / "run")


ASKED, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("sft", {"messages": "hello"}, "messages in rows 1, 2, 3, 4 is no list of messages"),
        ("sft", {"prompt": "a", "completion": [ANSWERED]}, "prompt in rows 1, 2, 3, 4 is no list of messages"),
        ("dpo", {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": "b"}, "rejected in rows 1, 2, 3, 4 is no list"),
        ("reward", {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": "b"}, "rejected in rows 1, 2, 3, 4 is no"),
    ],
)
def test_texts_among_messages_are_told_by_their_rows(task, row, words, causal, write, tmp_path):
    config = configure(task=task, model=str(causal), data=write("given.jsonl", [row] * 4), steps=1, max_length=32)
    with pytest.raises(ValueError, match=words):
        new_run(Finetuning, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bytes_are_no_text(classify, tmp_path):
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": [b"a", b"b"] * 4, "label": [0, 1] * 4}).to_parquet(file)
    with pytest.raises(ValueError, match="text_column = 'text' holds bytes, not text"):
        new_run(Finetuning, classify(data=str(file)), tmp_path / "run")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("text,label\n", "chat_template = .* is a file without a template of messages"),
        ("{% for message in messages %}", "does not take the messages of row .*Unexpected end"),
        ("{{ messages[0]['no'] or raise_exception('roles must alternate') }}", "row .*roles must alternate"),
    ],
)
def test_messages_that_the_chat_template_refuses_are_told(template, words, supervise, write, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(template, encoding="utf-8")
    data = write("chats.jsonl", [{"messages": [ASKED, ANSWERED]}] * 4)
    with pytest.raises(ValueError, match=words):
        new_run(Finetuning, supervise(data=data, chat_template=str(file)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--task", "colla"], ["--data", "nowhere.csv"], ["--resume"], ["--rank", "x"]])
def test_the_command_tells_it_in_a_line_and_leaves_nothing(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(app(), ["finetune", *arguments])
    assert told.exit_code == 2
    assert "Traceback" not in told.output
    assert list(tmp_path.iterdir()) == []


def test_glue_without_a_network_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"task = 'rte' is not given by the Hugging Face Hub: .* Check the network"):
        new_run(Finetuning, configure(task="rte", steps=1), tmp_path / "run")
    assert set(GLUE) <= set(TASKS)


def test_a_finished_model_that_was_damaged_is_not_tuned(classify, causal, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(Path(classify().model.model), folder)
    write_manifest(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"model\.safetensors is not as it was written.*Restore"):
        new_run(Finetuning, classify(model=str(folder)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_tuned(value, classify, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(classify().model.model)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 4] = value
    shutil.copytree(classify().model.model, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model = .*not finite: bert\.encoder\.layer\.1\.output\.dense\.weight.*give"):
        new_run(Finetuning, classify(model=str(tmp_path / "model")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
