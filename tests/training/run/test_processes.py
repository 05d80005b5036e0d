"""A run in several processes, which torchrun starts: the run of one process, also where a process is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from galore_torch.training.run import processes, records
from galore_torch.training.run.folder import RunFolder

LAUNCHED = Path(__file__).with_name("launched.py")
BAR = 1e-5  # float32: other sums of the same numbers


def settings(**given: Any) -> Any:
    adapter = SimpleNamespace(adapter=given.pop("adapter", "none"))
    return SimpleNamespace(schedule=SimpleNamespace(**{"batch": 8, "micro_batch": None, **given}), adapter=adapter)


@pytest.mark.parametrize(
    ("world", "given", "micro_batch"),
    [("1", {}, 8), ("1", {"micro_batch": 2}, 2), ("2", {}, 4), ("4", {"micro_batch": 4}, 2), ("8", {}, 1)],
)
def test_a_batch_is_divided_among_the_processes(world, given, micro_batch, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    assert processes.require_served(settings(**given), in_processes=True) == micro_batch


@pytest.mark.parametrize(
    ("world", "given", "in_processes", "words"),
    [
        ("3", {}, True, "batch = 8 cannot be divided among 3"),
        ("2", {"micro_batch": 3}, True, "micro-batches of 3"),
        ("2", {"adapter": "relora"}, True, "adapter = 'relora'"),
        ("2", {}, False, "WORLD_SIZE = 2"),
    ],
)
def test_what_several_processes_cannot_run_is_refused(world, given, in_processes, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=words):
        processes.require_served(settings(**given), in_processes=in_processes)


# By torchrun ---------------------------------------------------------------------------------------------------------


def launch(folder: Path, *given: str, world: int = 2, restarts: int = 0, loses: str | None = None) -> str:
    """Run `galore pretrain` in so many processes, and return what it printed; an error if it failed."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", f"--max-restarts={restarts}"]
    command = [sys.executable, "-m", *launcher, str(LAUNCHED), "pretrain", *given, "--out", str(folder)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path.cwd()), "LOSES": loses or ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300 * (1 + restarts), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def losses(folder: Path) -> list[float]:
    found = records.read(RunFolder(folder).metrics)
    return [record.get("loss", record.get("eval_loss")) for record in found]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tmp_path_factory.mktemp("settings") / "config.toml"


@pytest.fixture
def alone(tiny, tmp_path, config):
    """The losses of one process, and the settings in a file."""
    made = tiny(save_every=3, steps=8, batch=8, micro_batch=None)
    config.write_text(made.to_toml(), encoding="utf-8")
    launch(tmp_path / "alone", "--config", str(config), world=1)
    return losses(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_make_the_run_of_one_also_where_one_is_killed(alone, config, tmp_path, parallel):
    printed = launch(tmp_path / "two", "--config", str(config), "--parallel", parallel)
    assert losses(tmp_path / "two") == pytest.approx(alone, rel=BAR)
    assert printed.count("perplexity") == 3  # of two evaluations and at the end, by the first process alone
    for rank in (0, 1):
        folder = tmp_path / f"lost-{rank}"
        launch(folder, "--config", str(config), "--parallel", parallel, restarts=1, loses=f"{rank}:5")
        assert losses(folder) == pytest.approx(alone, rel=BAR)
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            path.name for path in (tmp_path / "two").iterdir()
        )


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_two_goes_on_in_one_and_again_in_two(alone, config, tmp_path, parallel):
    """Each step's batch is the same, in as many parts as there are processes."""
    folder = tmp_path / "two"
    with pytest.raises(AssertionError):
        launch(folder, "--config", str(config), "--parallel", parallel, loses="0:5")
    with pytest.raises(AssertionError):
        launch(folder, "--resume", world=1, loses="0:7")
    launch(folder, "--resume")
    assert losses(folder) == pytest.approx(alone, rel=BAR)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_which_processes_are_killed_at_any_moment_ends_as_if_none_was(alone, config, tmp_path, parallel):
    """KILLS=20 has twenty of them."""
    kills = int(os.environ.get("KILLS", "2"))
    launch(tmp_path / "lost", "--config", str(config), "--parallel", parallel, restarts=kills, loses=f"{kills}*{kills}")
    assert losses(tmp_path / "lost") == pytest.approx(alone, rel=BAR)
