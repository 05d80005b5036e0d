"""kill -9 at random moments of a command: gone on with, each ends with the model of an undisturbed run, to the bit.

A few moments here; ``GALORE_KILLS=60`` tries as many.
"""

import os
import random
import time
from pathlib import Path

import pytest

from galore_torch.training.run import records
from galore_torch.training.run.folder import RunFolder
from tests.forked import Galore, galore
from tests.training.during import last_record
from tests.training.finetune import conftest as tuning
from tests.waiting import DEADLINE

KILLS = int(os.environ.get("GALORE_KILLS", "6"))
STEPS = 8
encoder, labelled, write, classify = tuning.encoder, tuning.labelled, tuning.write, tuning.classify


def ended(*arguments):
    """What a command said that ended well."""
    done = galore(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def step_of(folder):
    return (last_record(folder.metrics) or {"step": 0})["step"]


def is_writing(folder):
    return any(folder.checkpoints.tmp.glob("*"))


EARLY = {
    "config": lambda folder: folder.config.exists(),
    "checkpoint": is_writing,
    "step": lambda folder: step_of(folder) >= 3,
    "later step": lambda folder: step_of(folder) >= 6,
}
LATE = {  # after the last checkpoint
    "last": lambda folder: (folder.checkpoints.root / f"checkpoint-{STEPS}").exists(),
    "model": lambda folder: folder.model.exists(),
}


def killed(arguments, watched, draw, late):
    """Start a command and kill it a moment after an event; False if it was faster."""
    met = draw.choice(list((LATE if late else EARLY).values()))
    process = Galore(*arguments)
    end = time.monotonic() + DEADLINE * 5
    while process.poll() is None and not met(watched):
        assert time.monotonic() < end
        time.sleep(0.001)
    process.wait(draw.uniform(0, 0.03))
    process.kill()
    return records.final(watched.metrics) is None


@pytest.fixture(scope="module")
def command(tiny, tmp_path_factory):
    """The options of each command, but for its folder."""
    made = tmp_path_factory.mktemp("settings")
    pretrain = tiny(steps=STEPS, save_every=2)
    (made / "pretrain.toml").write_text(pretrain.to_toml(), encoding="utf-8")
    given = [
        f"--{name.replace('_', '-')}={value}"
        for section in (pretrain.model, pretrain.data, pretrain.schedule)
        for name, value in vars(section).items()
        if value is not None and not isinstance(value, bool) and name != "seed"
    ]
    compare = ["compare", "--method=full", "--method=galore", "--lr=0.01", "--rank=8", "--update-proj-gap=3", *given]
    return {"pretrain": ["pretrain", f"--config={made / 'pretrain.toml'}"], "compare": compare}


@pytest.fixture
def finetune(classify, tmp_path):
    path = tmp_path / "finetune.toml"
    config = classify(steps=STEPS, save_every=2, method="galore", rank=4, update_proj_gap=3)
    path.write_text(config.to_toml(), encoding="utf-8")
    return ["finetune", f"--config={path}"]


def models(out):
    """All that must be equal of a folder: its finished models and how many steps they are of."""
    files = {path.relative_to(out): path.read_bytes() for path in out.rglob("model/model.safetensors")}
    steps = {path.relative_to(out): records.final(path)["step"] for path in out.rglob("metrics.jsonl")}
    return files, steps


@pytest.mark.slow
@pytest.mark.parametrize("job", ["pretrain", "finetune", "compare"])
def test_a_killed_command_goes_on_to_the_same_model(job, command, finetune, tmp_path):
    whole = tmp_path / "whole"
    arguments = finetune if job == "finetune" else command[job]
    ended(*arguments, f"--out={whole}")
    assert models(whole)[0]
    draw = random.Random(job)
    for number in range(KILLS // 3):
        run = Path(draw.choice(["full", "galore"]), "lr-0.01", "seed-0") if job == "compare" else Path()
        for attempt in range(20):
            out = tmp_path / f"killed-{number}-{attempt}"
            new, watched = [*arguments, f"--out={out}"], RunFolder(out / run)
            if killed(new, watched, draw, late=number % 3 == 0):
                break
        else:
            pytest.fail("the command was always faster")
        resumes = job != "compare" and watched.config.exists()
        said = ended(*([job, "--resume", f"--out={out}"] if resumes else new))
        assert models(out) == models(whole), said
