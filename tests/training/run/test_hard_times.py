"""Disks that are full or may not be written to, damaged run folders, and surroundings that would change a run."""

import errno
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import SafetensorError
from typer.testing import CliRunner

from galore_torch.training.compare.process import call_in_process
from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run import disk, processes
from galore_torch.training.run import machine as surroundings
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.run import new_run, resumed_run
from tests.command_line import app
from tests.training.during import During, crash
from tests.training.run.imported import import_all

FULL = OSError(errno.ENOSPC, "No space left on device", "model.safetensors")


def galore(*arguments) -> tuple[int, str]:
    told = CliRunner().invoke(app(), [str(each) for each in arguments])
    if told.exception is not None and not isinstance(told.exception, SystemExit):
        raise told.exception
    return told.exit_code, told.output


@pytest.fixture
def settings(tiny, tmp_path) -> Path:
    """A file of settings of a short run, for the command."""
    path = tmp_path / "tiny.toml"
    path.write_text(tiny(save_every=2).to_toml(), encoding="utf-8")
    return path


# Disks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EROFS, "Read-only file system", "x"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"),
    ],
)
def test_a_failed_write_is_known_whatever_library_met_it(error):
    outer = ValueError("the data are wrong")
    outer.__cause__ = error
    assert disk.failed_write(error)
    assert disk.failed_write(outer)
    with pytest.raises(OSError, match=r"\S"):
        disk.raise_failed_write(outer)
    assert disk.failed_write(ValueError("rank = 0 is out of range")) is None
    assert disk.failed_write(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None


def fills(monkeypatch, where: str) -> None:
    """Let the disk be full from some write on."""

    def full(*_, **__):
        raise FULL

    owner, name = {
        "text": ("galore_torch.training.text.packing", "sequences"),
        "records": ("galore_torch.training.run.records", "append"),
        "checkpoint": ("transformers.Trainer", "_save_optimizer_and_scheduler"),
        "model": ("transformers.PreTrainedModel", "save_pretrained"),
        "plot": ("galore_torch.training.run.run", "plot_losses"),
    }[where]
    monkeypatch.setattr(f"{owner}.{name}", full)


@pytest.mark.parametrize("where", ["text", "records", "checkpoint", "model", "plot"])
@pytest.mark.broad("text")
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(where, settings, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as now:
        fills(now, where)
        status, said = galore("pretrain", "--config", settings, "--out", out)
    assert (status, "No space left" in said, "Free some space" in said) == (2 if where == "text" else 1, True, True)
    assert out.exists() is (where != "text")
    if where != "text":
        assert f"galore pretrain --resume --out {out}" in said
        assert resumed_run(Pretraining, out).train().finished


def test_a_disk_that_will_be_full_is_refused_before_anything_is_written(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda _: 100_000)
    status, said = galore("pretrain", "--config", settings, "--out", tmp_path / "run")
    assert status == 2
    assert "100.0 kB free" in said
    assert "choose another --out" in said
    assert not (tmp_path / "run").exists()


def test_a_folder_that_may_not_be_written_to_is_told(settings, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "run"))

    monkeypatch.setattr(Path, "mkdir", refused)  # root may write everywhere
    status, said = galore("pretrain", "--config", settings, "--out", tmp_path / "run")
    assert (status, "Permission denied" in said, "another path" in said) == (2, True, True)


# Damage --------------------------------------------------------------------------------------------------------------


def flipped(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1 << int(8 * at)
    path.write_bytes(bytes(content))


DAMAGE = {
    "truncated": lambda path, at: path.write_bytes(path.read_bytes()[: int(at * path.stat().st_size)]),
    "emptied": lambda path, _: path.write_bytes(b""),
    "removed": lambda path, _: path.unlink(),
    "flipped": flipped,
}


def is_listed(path: Path) -> bool:
    return (path.parent / "manifest.json").exists()


def damages(folder: Path, count: int) -> Iterator[tuple[Path, str, float]]:
    """Draw files of a folder, each with a kind of damage and a place in it."""
    draw = random.Random(0)
    kept = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".holder"))
    files = sorted(path.relative_to(folder) for path in kept if path.parent == folder or is_listed(path))
    for number in range(count):
        yield files[number % len(files)], draw.choice(list(DAMAGE)), draw.uniform(0.01, 0.99)


@pytest.fixture(scope="module")
def crashed(tiny, tmp_path_factory) -> Path:
    """A run that has crashed after its checkpoints at steps 2 and 4."""
    out = tmp_path_factory.mktemp("crashed") / "run"
    with pytest.raises(RuntimeError, match="went down"):
        new_run(Pretraining, tiny(save_every=2, steps=6), out, callbacks=[During(5, crash)]).train()
    return out


@pytest.fixture
def stopped(crashed, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(crashed, tmp_path / "stopped"))


def model_of(out: Path) -> bytes:
    return (RunFolder(out).model / "model.safetensors").read_bytes()


def outcomes_of_damage(command: str, stopped: Path, whole: Path, count: int) -> dict[str, int]:
    """Damage copies of a stopped run, and hold each resumption to the whole run's model or to a remedy."""
    outcomes = {"told": 0, "harmless": 0}
    for file, how, at in damages(stopped, count):
        out = stopped.with_name("run")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(stopped, out)
        DAMAGE[how](out / file, at)
        before = {path for path in out.rglob("*") if path.is_file()}
        status, said = galore(command, "--resume", "--out", out)
        if status == 0:
            assert model_of(out) == model_of(whole), (file, how, at)
            outcomes["harmless"] += 1
        else:
            assert (status, "Traceback" in said) == (2, False), (file, how, at, said)
            assert any(word in said for word in ("estore", "another --out", "--resume")), said
            assert {path for path in out.rglob("*") if path.is_file()} >= before, (file, how, at)
            outcomes["told"] += 1
    return outcomes


@pytest.mark.parametrize("count", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_damage_to_a_stopped_run_is_told_or_harmless(count, stopped, tiny, tmp_path):
    new_run(Pretraining, tiny(save_every=2, steps=6), tmp_path / "whole").train()
    outcomes = outcomes_of_damage("pretrain", stopped, tmp_path / "whole", count)
    assert count < 60 or all(outcomes.values()), outcomes  # so many show both


@pytest.mark.parametrize("name", ["config.toml", "text.sha256"])
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.broad
def test_settings_that_are_not_as_they_were_are_not_trained_by(name, how, stopped):
    DAMAGE[how](stopped / name, 0.6)
    status, said = galore("pretrain", "--resume", "--out", stopped)
    assert (status, "Traceback" in said) == (2, False)
    assert "another --out" in said or "holds no run to resume" in said


# Surroundings --------------------------------------------------------------------------------------------------------


def test_what_accelerate_would_read_changes_nothing_and_is_told(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    run = new_run(Pretraining, tiny(steps=1, eval_every=0), tmp_path / "run", console=Console(width=200))
    said = capsys.readouterr().out
    assert "ACCELERATE_MIXED_PRECISION = 'bf16'" in said
    assert "USE_CPU" not in said
    assert run.trainer.accelerator.mixed_precision == "no"
    assert not [name for name in os.environ if name.startswith(surroundings._ACCELERATE + "MIXED")]


@pytest.mark.slow
def test_a_child_imports_nothing_from_the_working_directory(tmp_path, monkeypatch):
    for name in ("datasets", "typer", "torch", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    found = call_in_process(
        import_all, ["json", "typer", "datasets"], log=tmp_path / "log", console=Console(quiet=True)
    )
    assert not [place for place in found if place.startswith(str(tmp_path))]


def test_brackets_in_names_are_no_markup(tiny, texts, tmp_path):
    folder = tmp_path / "a [bold]b[/x]"
    shutil.copytree(texts, folder / "texts")
    settings = folder / "x].toml"
    given = {"data": str(folder / "texts"), "cache": str(folder / "cache"), "steps": 1, "eval_every": 0}
    settings.write_text(tiny(**given).to_toml(), encoding="utf-8")
    status, said = galore("pretrain", "--config", settings, "--out", folder / "run")
    assert status == 0, said
    assert f"model {folder}/run/model" in said
    assert f"{folder}/texts (" in said
    status, said = galore("pretrain", "--config", settings, "--prepare")
    assert (status, f"cached in {folder}/cache" in said) == (0, True)
    status, said = galore("pretrain", "--resume", "--out", folder / "run")
    assert (status, f"{folder}/run" in said) == (2, True)


@pytest.mark.parametrize("left", [{"LOCAL_RANK": "3"}, {"WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_what_a_launcher_has_left_in_the_environment_is_told(left, monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"no .*MASTER_ADDR.* unset {' '.join(left)}"):
        processes.connect()
