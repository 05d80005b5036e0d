"""How the tests look: through the command line, or through the modules behind it."""

import hashlib
from pathlib import Path

from rich.console import Console
from typer.testing import CliRunner

from galore_torch.cli import build_app
from galore_torch.training.inspection.config import configure
from galore_torch.training.inspection.of_model import recipe_of, subject_of_model
from galore_torch.training.inspection.of_run import require_run, subject_of_run
from galore_torch.training.inspection.session import session

SHORT = ["--steps", "6", "--every", "2"]
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FILES = {"report.html", "inspection.json", "spectra.png", "ages.png", "overlap.png", "stable_rank.png", "layers.png"}


def inspected(*arguments, code=0):
    result = CliRunner().invoke(build_app(), ["inspect", *map(str, arguments)], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    return result


def looked(subject, config):
    """The figures of an inspection that draws nothing."""
    with session(subject, config, Console(quiet=True)) as steps:
        steps.make_steps()
        return steps.conclude().as_json()


def of_run(folder, *, fresh=False, **given):
    config = configure(**{"steps": 6, "every": 2, **given})
    subject = subject_of_run(folder, require_run(folder, fresh=fresh), config.looks, Console(quiet=True))
    return looked(subject, config)


def of_model(model, data, **given):
    config = configure(**{"steps": 6, "every": 2, "batch": 4, **given})
    return looked(subject_of_model(recipe_of(str(model), str(data), config), config, Console(quiet=True)), config)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
