"""What holds for every test: no network, no screen, one thread, the same random numbers, and the device asked for."""

import gc
import os

# Read when torch, Transformers and matplotlib are first imported, so they are set before any of them is.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for equal results of equal calls on a GPU

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tests.device
from tests.device import OnDevice

ON_ANY_DEVICE = {"optim", "projection", "lowbit", "gradients", "reference"}
"""The folders of tests that run on the device that `--device` names. All others are of the CPU."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="where the tests of the core run, such as cuda; the CPU by default"
    )


def pytest_configure(config: pytest.Config) -> None:
    tests.device.chosen = config.getoption("--device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out, on another device, what is of the CPU by design."""
    if config.getoption("--device") == "cpu":
        return
    for item in items:
        of_cpu = item.get_closest_marker("of_cpu")
        if of_cpu is not None:
            item.add_marker(pytest.mark.skip(reason=f"of the CPU: {of_cpu.args[0]}"))
        elif _folder(item.path) not in ON_ANY_DEVICE:
            item.add_marker(pytest.mark.skip(reason="takes no --device"))


def pytest_collection_finish() -> None:
    """Lets the garbage collector look only at what tests make: what is imported is some hundred thousand objects.

    Trainer collects at the end of each training, which took longer than to train a model of a test.
    """
    gc.collect()
    gc.freeze()


def _folder(path: Path) -> str:
    """The folder of `tests` that holds a file; empty of one that lies elsewhere."""
    here = Path(__file__).parent
    return path.relative_to(here).parts[0] if here in path.parents else ""


@pytest.fixture(scope="session")
def device() -> str:
    """The name of the device that `--device` asks for."""
    return tests.device.chosen


@pytest.fixture(autouse=True)
def on_device(device: str) -> Iterator[None]:
    """Makes the tensors of a test on the device that is asked for."""
    if device == "cpu":
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    with OnDevice(device):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give each test the same random numbers, whichever tests ran before it and in whichever process."""
    torch.manual_seed(0)
