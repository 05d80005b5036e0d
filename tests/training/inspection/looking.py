"""How the tests inspect: through the command line, or through the modules behind it."""

import hashlib
import tempfile
from pathlib import Path

from rich.console import Console
from typer.testing import CliRunner

from galore_torch.training.inspection import figures as found
from galore_torch.training.inspection.config import configure
from galore_torch.training.inspection.jobs import job_of_model, job_of_run
from galore_torch.training.inspection.observer import GradientObserver, observed_trainer
from tests.command_line import app

SHORT = ["--steps", "6", "--every", "2"]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FILES = {"report.html", "inspection.json", "spectra.png", "ages.png", "overlap.png", "stable_rank.png", "layers.png"}


def inspected(*arguments, code=0):
    result = CliRunner().invoke(app(), ["inspect", *map(str, arguments)], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    return result


def figures(inspected_job, config):
    """The figures of an inspection that draws nothing."""
    observer = GradientObserver(inspected_job, config)
    with tempfile.TemporaryDirectory() as scratch:
        observed_trainer(observer, scratch).train()
    return found.figures(observer)


def of_run(folder, *, fresh=False, **given):
    config = configure(**{"steps": 6, "every": 2, **given})
    return figures(job_of_run(folder, config.snapshots, Console(quiet=True), fresh=fresh), config)


def of_model(model, data, **given):
    config = configure(**{"steps": 6, "every": 2, "batch": 4, **given})
    return figures(job_of_model(str(model), str(data), config, Console(quiet=True)), config)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
