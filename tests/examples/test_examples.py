"""Each example runs as a reader would run it, and what it trains learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples():
    assert {"plain_pytorch.py", "transformers_trainer.py", "trl_sft.py", "lightning_module.py"} <= {
        path.name for path in EXAMPLES
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_its_loss_falls(path, tmp_path):
    found = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "HF_HOME": str(tmp_path)}
    child = subprocess.run(
        [sys.executable, path], cwd=tmp_path, env=found, capture_output=True, text=True, check=False, timeout=240
    )
    assert child.returncode == 0, child.stderr
    losses = [float(loss) for loss in re.findall(r"(?:loss|->) +(\d+\.\d+)", child.stdout)]
    assert len(losses) >= 2, child.stdout
    assert losses[-1] < losses[0] - 1


def test_an_example_is_short():
    assert all(len(path.read_text().splitlines()) <= 80 for path in EXAMPLES)
