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
