"""What holds for every test: no network, no screen, one thread, the same random numbers, and the device asked for.

Libraries are imported where they are used: the process that only hands tests to workers needs none of them.
"""

import gc
import getpass
import os
import sys
import tempfile
from collections import defaultdict

# Read when torch, Transformers and matplotlib are first imported, so they are set before any of them is.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# With more threads than free cores, threads that spin while they wait take the time of those that work: three times as
# long with two threads beside busy processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# torch's compiler finds kernels again without asking for which kind of processor they were written, and one for another
# kind writes beyond its tensors.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    os.path.join(  # noqa: PTH118 (an assignment may not stand before imports)
        tempfile.gettempdir(),
        f"torchinductor_{getpass.getuser()}_{os.environ.get('ATEN_CPU_CAPABILITY', 'default')}",
    ),
)
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes, each of which imports torch anew
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for equal results of equal calls on a GPU

from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests start many interpreters, which are to find compiled what the first of them has compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
gc.disable()  # while all is imported, which stays
collect_ignore = [
    "frozen.py",
    "training/unplanned.py",
    "training/warmed.py",
]  # whose import has effects, which are not for pytest

ON_ANY_DEVICE = {"optim", "projection", "lowbit", "gradients", "reference"}
"""The folders of tests that run on the device that `--device` names. All others are of the CPU."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="where the tests of the core run, such as cuda; the CPU by default"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Marks as slow what a few cases stand for, leaves out what is not of the device, and puts what is slow first."""
    _mark_slow_all_but_a_few(items, whole=not any("::" in asked for asked in config.args))
    _leave_out_what_is_not_of_the_device(config, items)
    yield  # while `-m` and `-k` choose
    items[:] = _slow_first(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def _slow_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """The order in which several workers end at the same time: each begins with a part of what is slow.

    The first tests of the list are those of the first worker, as many the second's, and so on; who is done takes from
    the ends of the others'. The slow ones of a file stay together, for they share what is made once for all of them;
    where they are few, they are the longest. Cases of a test marked `broad` take no time each.
    """
    slow: dict[Path, list[pytest.Item]] = defaultdict(list)
    quick = []
    for item in items:
        is_slow = item.get_closest_marker("slow") is not None and item.get_closest_marker("broad") is None
        (slow[item.path] if is_slow else quick).append(item)
    shares: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for of_file in sorted(slow.values(), key=len):
        min(shares, key=len).extend(of_file)
    for number, share in enumerate(shares, start=1):
        missing = max(0, len(items) * number // workers - sum(map(len, shares[:number])))
        share += quick[:missing]
        del quick[:missing]
    return [*(test for share in shares for test in share), *quick]


def _leave_out_what_is_not_of_the_device(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        return
    for item in items:
        of_cpu = item.get_closest_marker("of_cpu")
        if of_cpu is not None:
            item.add_marker(pytest.mark.skip(reason=f"of the CPU: {of_cpu.args[0]}"))
        elif _folder(item.path) not in ON_ANY_DEVICE:
            item.add_marker(pytest.mark.skip(reason="takes no --device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Lets the garbage collector look only at what tests make, and forks the servers of processes for them.

    What is imported is some hundred thousand objects. To look through them took a fifth of the collection, and at the
    end of each training, where Trainer collects, longer than to train a model of a test.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    if session.items and not session.config.option.collectonly:
        _seed_no_device_that_is_not_there()
        from tests.forked import TORCH, TRAINING

        for server in (TORCH, TRAINING):
            server.fork()


def _seed_no_device_that_is_not_there() -> None:
    """Spares every `torch.manual_seed`, of libraries too, three lists of all callers with their lines of source.

    It keeps them, with the seed, until a GPU is first used: some milliseconds each time.
    """
    import torch

    for devices, asked in (
        (torch.cuda, torch.cuda.random), (torch.xpu, torch.xpu.random), (torch.mtia, torch.mtia),
    ):  # fmt: skip
        if not devices.device_count():
            asked._lazy_call = lambda *_, **__: None  # type: ignore[attr-defined]


def _mark_slow_all_but_a_few(items: list[pytest.Item], whole: bool) -> None:
    """Of a test marked `broad` all cases are slow but those of some ids.

    Where it names none, they are a few in which every value of each argument is at least once. Of whole files each id
    must be that of a case.
    """
    cases: dict[str, list[tuple[pytest.Item, set[tuple[str, int]]]]] = defaultdict(list)
    named: dict[str, set[str]] = {}
    for item in items:
        broad = item.get_closest_marker("broad")
        if broad is None:
            continue
        test, case = item.nodeid.partition("[")[0], item.callspec  # type: ignore[attr-defined]
        if not broad.args:
            cases[test].append((item, {(name, id(value)) for name, value in case.params.items()}))
        else:
            named.setdefault(test, set(broad.args)).discard(case.id)
            if case.id not in broad.args:
                item.add_marker(pytest.mark.slow)
    if unknown := {test: ids for test, ids in named.items() if ids and whole}:
        raise pytest.UsageError(f"broad names cases that there are not: {unknown}")
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
def device(request: pytest.FixtureRequest) -> str:
    """The name of the device that `--device` asks for."""
    import tests.device

    tests.device.chosen = request.config.getoption("--device")
    return tests.device.chosen


@pytest.fixture(autouse=True)
def on_device(device: str) -> Iterator[None]:
    """Makes the tensors of a test on the device that is asked for."""
    if device == "cpu":
        yield
        return
    import torch

    from tests.device import OnDevice

    torch.use_deterministic_algorithms(True, warn_only=True)
    with OnDevice(device):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded(device: str) -> None:
    """Give each test the same random numbers, whichever tests ran before it and in whichever process.

    Of a GPU that is not asked for, `torch.manual_seed` would keep who asked, with all lines of source up to here.
    """
    import torch

    (torch.default_generator if device == "cpu" else torch).manual_seed(0)


@pytest.fixture
def bfloat16_in_float32() -> Iterator[None]:
    """For steps in bfloat16 where the CPU has no instructions for its products: ten times as fast, rounded once."""
    from benchmarks.common.bf16_products import as_torch_does, in_float32

    in_float32()
    yield
    as_torch_does()
