"""Runs on a stream: what was trained on is known by a digest, and a resumed run goes on from nothing else."""

import hashlib
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run import records
from galore_torch.training.run.checkpoints import stream_digest
from galore_torch.training.run.folder import OtherDataError, RunFolder
from galore_torch.training.run.run import new_run, resumed_run
from galore_torch.training.run.stream import Stream
from galore_torch.training.text import packing
from galore_torch.training.text.packing import prepare_text
from tests.command_line import app
from tests.training.during import During, ctrl_c


def sha256(rows) -> str:
    return hashlib.sha256(np.array([row["input_ids"] for row in rows], dtype="<i8").tobytes()).hexdigest()


@pytest.fixture
def rows() -> list[dict]:
    return [{"input_ids": [number, number + 1]} for number in range(12)]


def test_a_stream_tells_what_it_was_read_of_after_each_step(rows):
    stream = Stream(rows, batch=4, data="someone/texts")
    for _ in range(2):  # each reading is from the first row on
        assert list(islice(stream, 9)) == rows[:9]
        assert (stream.digest(1), stream.digest(2), stream.digest(3)) == (sha256(rows[:4]), sha256(rows[:8]), None)


@pytest.mark.parametrize("changed", range(12))
def test_what_comes_after_a_checkpoint_may_be_other_and_what_came_before_may_not(changed, rows, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "stream.sha256").write_text(sha256(rows[:8]))
    rows[changed] = {"input_ids": [changed, 0]}
    stream = Stream(rows, batch=4, data="someone/texts")
    stream.go_on_from(checkpoint)
    if changed >= 8:
        assert list(stream) == rows
        return
    read = iter(stream)
    assert list(islice(read, 7)) == rows[:7]
    with pytest.raises(OtherDataError) as told:
        next(read)
    for named in ("'someone/texts'", repr(str(tmp_path / "run")), sha256(rows[:8]), stream.digest(2), "another --out"):
        assert named in str(told.value)


def test_a_stream_without_end_is_read_again_in_the_same_order(rows):
    stream = Stream(rows, batch=4, data="someone/texts", endless=True)
    assert list(islice(stream, 30)) == (3 * rows)[:30]
    assert stream.digest(7) == sha256((3 * rows)[:28])
    assert list(Stream([], batch=4, data="someone/texts", endless=True)) == []


@pytest.mark.parametrize("endless", [False, True])
def test_a_stream_that_has_become_too_short_is_told_with_both_numbers(endless, rows, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "stream.sha256").write_text(sha256(rows))
    stream = Stream(rows[:10], batch=4, data="someone/texts", endless=endless)
    stream.go_on_from(checkpoint)
    with pytest.raises(OtherDataError, match=r"'someone/texts' has changed .* it has 10 sequences, of 12 .* step 3"):
        list(islice(stream, 100))


@pytest.mark.slow
def test_a_run_of_several_passes_goes_on_exactly(streamed, on_hub, tmp_path):
    on_hub[2:] = [text[:1500] for text in on_hub[2:4]]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = new_run(Pretraining, streamed, whole)
    assert len(list(first.job.stream._rows)) < 8 * 8
    first.train()
    new_run(Pretraining, streamed, parts, callbacks=[During(7, ctrl_c)]).train()
    resumed_run(Pretraining, parts).train()
    ends = [records.final(RunFolder(each).metrics) for each in (whole, parts)]
    assert ends[0]["stream"] == ends[1]["stream"]
    assert ends[0]["eval_loss"] == ends[1]["eval_loss"]


@pytest.fixture
def on_hub(texts, monkeypatch) -> list[str]:
    """The documents of someone/texts, which a test may change, as the Hub streams them."""
    documents = [path.read_text(encoding="utf-8") for path in sorted(texts.iterdir())]
    monkeypatch.setattr(packing, "_AT_ONCE", 5)

    def load_dataset(*_, streaming):
        parts = {"train": documents[2:], "validation": documents[:2]}
        return {
            name: datasets.IterableDataset.from_generator(
                lambda texts: ({"text": text} for text in texts), gen_kwargs={"texts": tuple(part)}
            )
            for name, part in parts.items()
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return documents


@pytest.fixture
def streamed(tiny, tmp_path):
    """Settings of a run on the Hub's texts, by a ready tokenizer: what is trained on is in no other digest."""
    ready = prepare_text(tiny().data, Console(quiet=True), batch=8, seed=0).tokenizer
    ready.save_pretrained(tmp_path / "tokenizer")
    return tiny(data="someone/texts", tokenizer=str(tmp_path / "tokenizer"), eval_every=0)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_does_not_go_on_with_another_stream(streamed, on_hub, tmp_path):
    before, whole = on_hub.copy(), new_run(Pretraining, streamed, tmp_path / "whole")
    read = list(islice(whole.job.stream, 8 * 8))
    whole.train()
    out, folder = tmp_path / "run", RunFolder(tmp_path / "run")
    new_run(Pretraining, streamed, out, callbacks=[During(5, ctrl_c)]).train()
    checkpoint = folder.checkpoints.newest()
    assert stream_digest(checkpoint) == sha256(read[: 5 * 8])

    on_hub[2:] = [text.replace("return", "retort") for text in before[2:]]
    kept = files(out)
    with pytest.raises(OtherDataError, match=stream_digest(checkpoint)):
        resumed_run(Pretraining, out).train()
    assert files(out) == kept
    told = CliRunner().invoke(app(), ["pretrain", "--resume", "--out", str(out)])
    assert (told.exit_code, type(told.exception)) == (1, SystemExit)
    assert "'someone/texts' has changed" in told.output
    assert str(out) in told.output
    assert files(out) == kept

    on_hub[:] = before
    resumed_run(Pretraining, out).train()
    ends = [records.final(RunFolder(each).metrics) for each in (tmp_path / "whole", out)]
    assert ends[0]["stream"] == ends[1]["stream"] == sha256(read)
    assert ends[0]["eval_loss"] == ends[1]["eval_loss"]
