"""Real text and a model small enough to train in a second."""

import gc
import inspect
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.pretrain.presets import configure
from galore_torch.training.run import machine, plots, run
from tests.training.quick import PLANNED_PEAK, quickly

MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "cmd", "code", "codecs", "colorsys", "copy", "csv", "dis",
    "enum", "fnmatch", "fractions", "getopt", "gettext", "glob", "gzip", "heapq",
)  # fmt: skip


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files: modules of the standard library."""
    folder = tmp_path_factory.mktemp("texts")
    for name in MODULES:
        source = inspect.getsource(__import__(name))
        (folder / f"{name}.txt").write_text(source, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests of a process."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(texts: Path, cache: Path):
    """Make the configuration of a run of eight steps, any setting overridden."""

    def make(**given) -> PretrainConfig:
        settings = {
            "data": str(texts), "cache": str(cache), "vocab": 400, "seq": 32, "eval_tokens": 640, "hidden": 32,
            "intermediate": 64, "layers": 2, "heads": 2, "rank": 8, "update_proj_gap": 3, "steps": 8, "batch": 8,
            "micro_batch": 4, "eval_every": 4,
        }  # fmt: skip
        return configure("llama-tiny", **{**settings, **given})

    return make


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    """Spares every run, one that is made for several tests too, what takes longer than its training.

    So does a look through the garbage of all modules before, at the end of each.
    """
    gc.freeze()
    with quickly():
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at the picture of a run's losses."""
    monkeypatch.setattr(run, "plot_losses", plots.plot_losses)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at what a run says of its memory."""
    monkeypatch.setattr(machine, "planned_peak", PLANNED_PEAK)


@pytest.fixture(autouse=True)
def _terminal():
    """Signals as in a terminal: a process that a script started in the background may have them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def browser(tmp_path: Path):
    """A headless Chromium that finds no host."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("needs chromium and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND",  # its start page is fetched from nowhere
        f"--user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()
