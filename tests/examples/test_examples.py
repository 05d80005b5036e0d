"""Each example runs as a reader would run it, and what it trains learns."""

import os
import re
import runpy
import sys
from pathlib import Path

import datasets
import pytest

from tests.forked import TRAINING, begin
from tests.waiting import DEADLINE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples():
    assert {"plain_pytorch.py", "transformers_trainer.py", "trl_sft.py", "lightning_module.py"} <= {
        path.name for path in EXAMPLES
    }


def run(path, said):
    """Be the script, in a folder of its own."""
    begin([said, said])
    os.chdir(said.parent)
    os.environ.update(TMPDIR=str(said.parent))
    datasets.config.HF_DATASETS_CACHE = said.parent
    sys.argv = [str(path)]
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.learning
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_its_loss_falls(path, tmp_path):
    said = tmp_path / "said"
    child = TRAINING.start(run, path, said)
    child.join(DEADLINE)
    told = said.read_text(encoding="utf-8")
    assert child.exitcode == 0, told
    losses = [float(loss) for loss in re.findall(r"(?:loss|->) +(\d+\.\d+)", told)]
    assert len(losses) >= 2, told
    assert losses[-1] < losses[0] - 1


def test_an_example_is_short():
    assert all(len(path.read_text().splitlines()) <= 80 for path in EXAMPLES)
