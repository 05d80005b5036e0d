"""The house, held up by a test: its rules are kept, and each is also shown a file that breaks it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture import (
    MAX_LINES,
    PACKAGE,
    ROOT,
    SOURCE_FOLDERS,
    TEXT_PATTERNS,
    Source,
    circles,
    climbing_benchmarks,
    climbing_imports,
    climbing_rooms,
    costly_imports,
    forbidden_text,
    named_modules,
    named_optimizers,
    too_long,
)

# The project keeps them ----------------------------------------------------------------------------------------------

PACKAGE_FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
SOURCE_FILES = sorted(path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def text_files() -> Iterator[Path]:
    """Every text that readers see: the root's own files, and all below the folders that the project keeps."""
    for folder in (*SOURCE_FOLDERS, "docs", ".ci"):
        for pattern in TEXT_PATTERNS:
            yield from filter(Path.is_file, (ROOT / folder).rglob(pattern))
    for pattern in TEXT_PATTERNS:
        yield from ROOT.glob(pattern)


@pytest.mark.parametrize(
    "rule",
    [climbing_imports, climbing_rooms, costly_imports, named_optimizers, named_modules],
    ids=lambda rule: rule.__name__,
)
def test_the_package_keeps_the_rule(rule):
    assert PACKAGE_FILES
    assert [wrong for path in PACKAGE_FILES for wrong in rule(Source.read(path))] == []


def test_the_benchmarks_share_only_what_is_common():
    paths = [path for path in SOURCE_FILES if path.is_relative_to(ROOT / "benchmarks")]
    assert paths
    assert [wrong for path in paths for wrong in climbing_benchmarks(Source.read(path))] == []


def test_training_has_no_circle():
    sources = {source.module: source for source in map(Source.read, PACKAGE_FILES) if "training" in source.module}
    assert circles(sources) == []


def test_every_file_is_short():
    assert [wrong for path in SOURCE_FILES for wrong in too_long(Source.read(path))] == []


def test_the_reference_is_under_a_hundred_lines():
    assert len((ROOT / "reference" / "galore.py").read_text().splitlines()) < 100


def test_texts_speak_of_the_project_alone():
    texts = list(text_files())
    assert ROOT / "pyproject.toml" in texts
    assert [wrong for path in texts for wrong in forbidden_text(str(path.relative_to(ROOT)), path.read_text())] == []


IMPORT_COST = """
import sys
import torch
before = set(sys.modules)
import galore_torch
from galore_torch import *
all(getattr(galore_torch, name) for name in galore_torch.__all__)
galore_torch.optim.GaLore
try:
    galore_torch.nothing
except AttributeError as error:
    assert str(error) == "module 'galore_torch' has no attribute 'nothing'"
else:
    raise AssertionError
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
# torch imports these of its own when parts of it are first used
through_torch = {"torch", "numpy", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec"}
print(*sorted(loaded - {"galore_torch"} - through_torch - set(sys.stdlib_module_names)))
"""


def test_the_command_line_answers_before_torch_is_imported():
    code = "import sys, galore_torch.cli as cli; cli.build_app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow  # each imports torch anew
@pytest.mark.parametrize("module", ["projection", "messages", "lowbit.codes"])
def test_any_package_may_be_imported_first(module):
    code = f"import galore_torch.{module}; from galore_torch import attach"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (child.returncode, child.stderr) == (0, "")


def test_the_package_has_what_it_names_and_importing_all_of_it_imports_torch_and_nothing_else():
    child = subprocess.run([sys.executable, "-c", IMPORT_COST], capture_output=True, text=True, cwd=ROOT, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == []


# The rules can fail --------------------------------------------------------------------------------------------------


def wrongs(rule, module: str, text: str, *, is_package: bool = False) -> list[str]:
    return rule(Source(f"{PACKAGE}.{module}" if module else PACKAGE, text, is_package))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("projection.subspace", "from galore_torch.optim import galore"),
        ("projection.subspace", "from ..optim.galore import GaLore"),
        ("projection.subspace", "from galore_torch import optim"),
        ("projection.subspace", "import galore_torch.lowbit"),  # a neighbour
        ("projection.subspace", "import galore_torch"),  # the face shows the floors above
        ("optim.galore", "def step():\n    from galore_torch.training import config"),  # inside a function too
        ("memory.plan", "from galore_torch.integrations import transformers"),
        ("training.pretrain", "from galore_torch import cli"),
        ("", "from galore_torch.training import config"),
        ("attic", "import torch"),  # on no floor
    ],
)
def test_a_climbing_import_is_found(module, text):
    assert len(wrongs(climbing_imports, module, text)) == 1


@pytest.mark.parametrize(
    ("module", "text", "is_package"),
    [
        ("optim.galore", "from galore_torch.projection import subspace", False),
        ("optim.galore", "from .state import rotate\nfrom ..projection import subspace", False),
        ("optim", "from .galore import GaLore", True),
        ("training.pretrain", "from galore_torch import GaLoreAdamW", False),
        ("cli", "from galore_torch.training.pretrain.run import pretrain", False),
        ("", "from galore_torch.gradients import attach\nfrom .optim import GaLore", True),
    ],
)
def test_an_import_from_below_is_allowed(module, text, is_package):
    assert wrongs(climbing_imports, module, text, is_package=is_package) == []


def test_a_climbing_room_is_found():
    assert len(wrongs(climbing_rooms, "training.run.folder", "from galore_torch.training.pretrain import config")) == 1
    assert len(wrongs(climbing_rooms, "training.attic.folder", "import torch")) == 1
    assert wrongs(climbing_rooms, "training.compare.plan", "from galore_torch.training.pretrain import config") == []


def test_benchmarks_that_import_each_other_are_found():
    common, step = "from benchmarks.common import bars", "from benchmarks.step import measure"
    found = {
        home: [len(climbing_benchmarks(Source(f"benchmarks.{home}.x", text))) for text in (common, step)]
        for home in ("common", "step", "device")
    }
    assert found == {"common": [0, 1], "step": [0, 0], "device": [0, 1]}


def test_a_circle_is_found():
    texts = {"a": "from galore_torch.b import x", "b": "from galore_torch.a import y", "c": "import galore_torch.a"}
    sources = {f"{PACKAGE}.{name}": Source(f"{PACKAGE}.{name}", text) for name, text in texts.items()}
    assert set(circles(sources)) == {"galore_torch.a", "galore_torch.b", "galore_torch.c"}
    assert circles({name: source for name, source in sources.items() if name != "galore_torch.b"}) == []


def test_a_library_beside_torch_is_found_unless_it_is_imported_in_use():
    text = "import math, torch\nfrom torch import nn\n"
    assert wrongs(costly_imports, "optim.galore", text + "def f():\n    import rich") == []
    assert wrongs(costly_imports, "training.pretrain", text + "import rich") == []
    assert len(wrongs(costly_imports, "optim.galore", text + "import rich")) == 1
    assert len(wrongs(costly_imports, "optim.galore", text + "class A:\n    from rich import table")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "if isinstance(inner, torch.optim.Muon): pass",
        "from torch.optim import AdamW",
        "def f():\n    import bitsandbytes as bnb",
        "eight_bit = type(inner).__name__ == 'AdamW8bit'",
    ],
)
def test_a_named_optimizer_is_found(text):
    assert wrongs(named_optimizers, "optim.galore", text)
    assert wrongs(named_optimizers, "optim.recipes", text) == []


@pytest.mark.parametrize(
    "text",
    ["from torch.nn import Module", "def f(model: torch.nn.Module): ...", "isinstance(params, nn.Module)"],
)
def test_a_named_module_is_found(text):
    assert wrongs(named_modules, "optim.recipes.adamw", text)
    assert wrongs(named_modules, "targets.param_groups", text) == []
    assert wrongs(named_modules, "optim.galore", "weight = torch.nn.Parameter(tensor)  # of an nn.Module") == []


def test_an_optimizer_may_be_named_in_prose_and_as_a_default():
    text = '"""Any optimizer, such as AdamW."""\ndef f(params, optimizer=torch.optim.AdamW): ...'
    assert wrongs(named_optimizers, "optim.galore", text) == []


def test_a_long_file_is_found():
    assert too_long(Source("a", "x\n" * MAX_LINES)) == []
    assert too_long(Source("a", "x\n" * (MAX_LINES + 1)))


@pytest.mark.parametrize("text", ["/" + "home/me/data", "see issue" + " #12", "https://" + "pypi" + ".org/simple"])
def test_forbidden_text_is_found(text):
    assert forbidden_text("a", "fine\n" + text)[0].startswith("a:2 ")
    assert forbidden_text("a", "https://example.org/work/ a ratio of left/right, see tests/home/x") == []
