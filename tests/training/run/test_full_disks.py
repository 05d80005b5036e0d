"""Real disks that fill at a random moment of a run: a mount of a few megabytes, where one can be made."""

import contextlib
import dataclasses
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from galore_torch.training.pretrain.presets import configure
from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.run import new_run
from tests.command_line import app
from tests.training.during import last_record
from tests.training.run.torchrun import BAR, ended, launch, losses

MEGABYTES = 48
RUNS = 3


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of `MEGABYTES`."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(place)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, left: int) -> None:
    """Take what is free, but for some bytes."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while (free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - left) > 0:
            file.write(bytes(min(free, 1 << 20)))


def galore(*arguments) -> tuple[int, str]:
    told = CliRunner().invoke(app(), [str(each) for each in arguments])
    if told.exception is not None and not isinstance(told.exception, SystemExit):
        raise told.exception
    return told.exit_code, told.output


def filled_at_random(number: int, settings: Path, disk: Path, whole: bytes) -> str:
    """Make one run on a disk that fills meanwhile, and go on with it; return how it ended."""
    draw = random.Random(number)
    out, step, left = disk / f"run-{number}", draw.randrange(-3, 12), draw.choice([0, 0, 4096, 60_000, 300_000])
    ended = threading.Event()

    def filler() -> None:
        # Before the first record: while the text is read; then after the record of some step.
        while not ended.wait(0.002):
            newest = last_record(out / "metrics.jsonl")
            if (disk / "cache").exists() and (newest["step"] if newest else -1) >= step:
                fill(disk, left)
                return

    thread = threading.Thread(target=filler)
    thread.start()
    try:
        status, said = galore("pretrain", "--config", settings, "--out", out)
    finally:
        ended.set()
        thread.join()
    (disk / "filler").unlink(missing_ok=True)
    assert "Traceback" not in said
    if status:
        assert "could not be written" in said or "B free" in said, said
        assert "ree some space" in said
        if out.exists():
            assert f"--resume --out {out}" in said
            status, said = galore("pretrain", "--resume", "--out", out)
        else:
            status, said = galore("pretrain", "--config", settings, "--out", out)
        how = "told"
    else:
        how = "harmless"
    assert status == 0, said
    assert (RunFolder(out).model / "model.safetensors").read_bytes() == whole
    shutil.rmtree(out)
    return how


@pytest.mark.slow
def test_a_disk_that_fills_is_told_and_nothing_is_lost(tiny, disk, tmp_path):
    given = {"save_every": 2, "steps": 12}
    new_run(Pretraining, tiny(**given), tmp_path / "whole").train()
    whole = (RunFolder(tmp_path / "whole").model / "model.safetensors").read_bytes()
    config = configure(**{**flat(tiny(**given)), "cache": str(disk / "cache")})
    settings = tmp_path / "run.toml"
    settings.write_text(config.to_toml(), encoding="utf-8")
    ended = [filled_at_random(number, settings, disk, whole) for number in range(RUNS)]
    print({how: ended.count(how) for how in set(ended)})


@pytest.mark.slow
def test_two_processes_whose_disk_fills_say_so_and_go_on_once_there_is_room(tiny, disk, tmp_path):
    settings = tmp_path / "run.toml"
    settings.write_text(tiny(save_every=3, batch=8, micro_batch=None).to_toml(), encoding="utf-8")
    ended(tmp_path / "alone", "--config", str(settings), world=1)
    status, said = launch(disk, "--config", str(settings), loses="fills:4")
    assert status == 1
    assert "ree some space" in said
    (disk / "filler").unlink()
    ended(disk, "--resume")
    assert losses(disk) == pytest.approx(losses(tmp_path / "alone"), rel=BAR)


def flat(config) -> dict:
    return {name: value for section in dataclasses.asdict(config).values() for name, value in section.items()}
