"""What holds for every test: no network, no screen, one thread, the same random numbers, and the device asked for."""

import gc
import os
from collections import defaultdict

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks as slow what a few cases stand for; leaves out, on another device, what is of the CPU by design."""
    _mark_slow_all_but_a_few(items)
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


def _mark_slow_all_but_a_few(items: list[pytest.Item]) -> None:
    """Of a test marked `broad` all cases are slow but a few, in which every value of each argument is at least once."""
    cases: dict[str, list[tuple[pytest.Item, set[tuple[str, int]]]]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("broad") is not None:
            values = {(name, id(value)) for name, value in item.callspec.params.items()}  # type: ignore[attr-defined]
            cases[item.nodeid.partition("[")[0]].append((item, values))
    for of_one in cases.values():
        missing = set().union(*(values for _, values in of_one))
        while missing:
            most = max(of_one, key=lambda case: len(missing & case[1]))
            missing -= most[1]
            of_one.remove(most)
        for item, _ in of_one:
            item.add_marker(pytest.mark.slow)


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
