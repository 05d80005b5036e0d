"""Small runs to look at, made once for all tests of a process."""

import json

import pytest

from galore_torch.training.finetune.presets import configure as configure_tuning
from galore_torch.training.finetune.run import Finetuning
from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.run import new_run
from tests.training.quick import quickly


@pytest.fixture(scope="session")
def run(tiny, tmp_path_factory):
    """The folder of a finished run of eight steps."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    with quickly():
        new_run(Pretraining, tiny(eval_every=0, gradients="full"), folder).train()  # formed as an inspection does
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Rows with labels."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    kinds = {"good": "import this and that", "bad": "return nothing at all"}
    lines = [{"text": f"{kinds[label]} {place}", "label": label} for place in range(24) for label in kinds]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tuning(run, rows, tmp_path_factory):
    """The folder of a finished fine-tuning of six steps."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    config = configure_tuning(
        task="classify", data=str(rows), model=str(RunFolder(run).model), steps=6, batch=4, max_length=16, rank=4
    )
    with quickly():
        new_run(Finetuning, config, folder).train()
    return folder
