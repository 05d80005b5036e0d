"""A run that nothing spoils: damaged checkpoints, a second process, what is taken back, and no step too many."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run import files, records
from galore_torch.training.run.checkpoints import Checkpoints, step_of
from galore_torch.training.run.files import MANIFEST, Lock, damage, write_manifest
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.run import new_run, resumed_run

HOLD = """
import sys
from pathlib import Path
from galore_torch.training.run.files import Lock
lock = Lock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


class Crash(TrainerCallback):
    """The process goes down after a step's checkpoint, or before a step."""

    def __init__(self, *, save=None, begin=None):
        self.save, self.begin = save, begin

    def on_save(self, args, state, control, **_):
        if state.global_step == self.save:
            raise RuntimeError("the machine went down")

    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 == self.begin:
            raise RuntimeError("the machine went down")


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """An undisturbed run of eight steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    new_run(Pretraining, tiny(save_every=2), out).train()
    return out


@pytest.fixture(scope="module")
def crashed(tiny, tmp_path_factory):
    """The same run, gone down in its seventh step."""
    out = tmp_path_factory.mktemp("crashed") / "run"
    with pytest.raises(RuntimeError, match="went down"):
        new_run(Pretraining, tiny(save_every=2), out, callbacks=[Crash(begin=7)]).train()
    return out


@pytest.fixture
def copied(crashed, tmp_path):
    return Path(shutil.copytree(crashed, tmp_path / "run"))


def model(out):
    return (out / "model" / "model.safetensors").read_bytes()


def named(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_the_last_two_checkpoints_are_kept_and_whole(crashed, whole):
    for out, names in ((crashed, ["checkpoint-4", "checkpoint-6"]), (whole, ["checkpoint-6", "checkpoint-8"])):
        assert [name for name in named(out) if name != "tmp"] == names
        assert [damage(out / "checkpoints" / name) for name in names] == [None, None]
    assert named(whole) == ["checkpoint-6", "checkpoint-8"]
    files = {path.name for path in (whole / "checkpoints" / "checkpoint-8").iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"} < files


def flip(path):
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [Path.unlink, halve, flip, lambda path: path.write_bytes(b"")])
def test_every_harm_to_every_file_is_seen(harm, crashed, tmp_path):
    checkpoint = crashed / "checkpoints" / "checkpoint-6"
    names = [path.name for path in checkpoint.iterdir()]
    assert len(names) > 8
    for name in names:
        copy = Path(shutil.copytree(checkpoint, tmp_path / name / checkpoint.name))
        harm(copy / name)
        assert damage(copy) is not None, name
        if name != MANIFEST:
            assert name in damage(copy)


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", MANIFEST])
@pytest.mark.broad("optimizer.pt")
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_leads_to_the_same_model(name, copied, whole):
    flip(copied / "checkpoints" / "checkpoint-6" / name)
    with pytest.warns(UserWarning, match=r"checkpoint-6 is damaged: .*\. Resuming from checkpoint-4\.") as told:
        run = resumed_run(Pretraining, copied)
    assert [Path(one.filename) for one in told if "checkpoint-6" in str(one.message)] == [Path(__file__)]
    assert name in str(told[0].message)
    run.train()
    assert model(copied) == model(whole)
    assert named(copied) == ["checkpoint-6", "checkpoint-8"]
    assert damage(copied / "checkpoints" / "checkpoint-6") is None


def test_records_that_are_missing_are_told_and_change_nothing_of_the_model(copied, whole):
    (copied / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is missing"):
        run = resumed_run(Pretraining, copied)
    run.train()
    assert model(copied) == model(whole)


def test_where_every_checkpoint_is_damaged_nothing_is_trained_and_nothing_removed(copied):
    for step, name in ((4, "rng_state.pth"), (6, "scheduler.pt")):
        (copied / "checkpoints" / f"checkpoint-{step}" / name).unlink()
    before = sorted(copied.rglob("*"))
    words = (
        r"checkpoint-6 is damaged: scheduler.pt is missing; checkpoint-4 is damaged: rng_state.pth is missing; .*copy"
    )
    for _ in range(2):  # and the folder is free again
        with pytest.raises(ValueError, match=words):
            resumed_run(Pretraining, copied)
    assert set(before) <= {*copied.rglob("*"), copied / "checkpoints" / "tmp"}


def test_what_was_being_written_is_no_checkpoint(copied, whole):
    torn = copied / "checkpoints" / "tmp" / "checkpoint-8"
    shutil.copytree(copied / "checkpoints" / "checkpoint-6", torn)
    (torn / MANIFEST).unlink()
    run = resumed_run(Pretraining, copied)
    assert run.checkpoint.name == "checkpoint-6"
    run.train()
    assert model(copied) == model(whole)


def test_a_run_killed_between_its_last_checkpoint_and_its_end_makes_no_further_step(tiny, whole, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="went down"):
        new_run(Pretraining, tiny(save_every=2), out, callbacks=[Crash(save=8)]).train()
    result = resumed_run(Pretraining, out).train()
    assert (result.finished, result.step) == (True, 8)
    assert model(out) == model(whole)
    ends = [records.final(RunFolder(folder).metrics) for folder in (out, whole)]
    told = ("step", "tokens", "eval_loss", "perplexity", "renewals", "overlap", "state_bytes", "trained_parameters")
    assert [ends[0][name] for name in told] == [ends[1][name] for name in told]
    assert [record["step"] for record in records.read(RunFolder(out).metrics) if "loss" in record] == [*range(1, 9)]


def test_an_evaluation_whose_record_was_lost_is_made_again(tiny, whole, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="went down"):
        new_run(Pretraining, tiny(save_every=2), out, callbacks=[Crash(save=8)]).train()
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert resumed_run(Pretraining, out).train().eval_loss == records.final(RunFolder(whole).metrics)["eval_loss"]


def held_elsewhere(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_by_name_until_the_first_one_is_gone(copied, tiny, tmp_path):
    words = r"run' is in use by process {} on \S+ \(galore .*\); wait for its end, or choose another --out"
    with held_elsewhere(copied / "run.lock") as first:
        with pytest.raises(ValueError, match=words.format(first.pid)):
            resumed_run(Pretraining, copied)
        first.kill()
    assert resumed_run(Pretraining, copied).train().finished

    (tmp_path / "new").mkdir()
    with held_elsewhere(tmp_path / "new" / "run.lock") as first:
        with pytest.raises(ValueError, match=rf"in use by process {first.pid}"):
            new_run(Pretraining, tiny(steps=1), tmp_path / "new")
        first.kill()
    assert (
        new_run(Pretraining, tiny(steps=1), tmp_path / "new").train().finished
    )  # what a killed start leaves is no hindrance


def test_one_process_does_not_work_twice_on_a_run(copied):
    run = resumed_run(Pretraining, copied)
    with pytest.raises(ValueError, match="in use by process"):
        resumed_run(Pretraining, copied)
    assert run.train().finished


@pytest.mark.parametrize("made", [True, False])
def test_what_is_taken_back_is_ones_own(made, tiny, tmp_path):
    out = tmp_path / "run"
    if not made:
        out.mkdir()
    folder = RunFolder(out)
    folder.create(tiny(), "digest")
    folder.abandon()
    assert out.exists() is not made
    folder.create(tiny(), "digest")
    (out / "notes.txt").write_text("mine")
    folder.abandon()
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="not an empty folder"):
        folder.create(tiny(), "digest")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_run_with_a_checkpoint_or_of_another_process_is_not_taken_back(crashed, tiny, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(tiny(), "digest")
    shutil.copytree(crashed / "checkpoints", tmp_path / "run" / "checkpoints")
    folder.abandon()
    assert folder.config.exists()
    folder.hold()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    folder.abandon()  # resumed: it was there before
    assert folder.config.exists()


def test_what_cannot_be_prepared_is_taken_back(tiny, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("no trainer today")

    monkeypatch.setattr("galore_torch.training.pretrain.run.Trainer", refuse)
    with pytest.raises(ValueError, match="no trainer"):
        new_run(Pretraining, tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_lock_is_waited_for(tmp_path):
    told = []
    with held_elsewhere(tmp_path / "a.lock") as other:

        def waiting(holder):
            told.append(holder)
            other.kill()

        lock = Lock(tmp_path / "a.lock")
        assert lock.acquire(waiting=waiting)
    assert re.match(rf"process {other.pid} on ", told[0])
    lock.release(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_the_digests_of_a_large_file_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 7)
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(range(100)))
    write_manifest(folder)
    assert damage(folder) is None
    assert Checkpoints(tmp_path).newest_whole(pytest.fail) == folder
    assert step_of(folder) == 3
