"""A run whose like others make in several processes."""

from __future__ import annotations

import pytest

from tests.training.run.torchrun import ended


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """The settings of the runs, in a file."""
    path = tmp_path_factory.mktemp("settings") / "config.toml"
    path.write_text(tiny(save_every=3, steps=8, batch=8, micro_batch=None).to_toml(), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    ended(folder, "--config", config, world=1)
    return folder


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory):
    """The options of a comparison, and the folder of one that one process has made."""
    config = tiny(steps=8, save_every=3, batch=8, micro_batch=None, eval_every=4)
    given = {**vars(config.data), **vars(config.model)}
    given |= {"rank": 8, "steps": 8, "batch": 8, "save_every": 3, "eval_every": 4, "update_proj_gap": 3}
    options = [
        f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value not in (None, True, False)
    ]
    options += ["--method=full", "--method=galore", "--lr=0.01"]
    folder = tmp_path_factory.mktemp("compared") / "alone"
    ended(folder, *options, job="compare", world=1)
    return options, folder
