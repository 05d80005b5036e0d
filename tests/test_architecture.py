"""The house, held up by a test: who may import whom, what an import costs, who names an optimizer, how long a file is.

Each rule is a function from one source file to the list of what is wrong with it, so each is also shown a file that
breaks it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "galore_torch"
FLOORS = {
    "projection": 1,
    "lowbit": 1,
    "galore_projector": 1,
    "extras": 1,
    "optim": 2,
    "gradients": 3,
    "distributed": 4,
    "memory": 4,
    "integrations": 4,
    "training": 5,
    "cli": 6,
    "__main__": 7,
}
FACE_FLOOR = 3  # galore_torch/__init__.py shows floors 1 to 3: it may import them, and the floors above may import it
TORCH_ALONE_FLOOR = 3  # up to here torch is the only library
MAX_LINES = 350
SOURCE_FOLDERS = (PACKAGE, "reference", "benchmarks", "examples", "tests")
TEXT_PATTERNS = ("*.py", "*.md", "*.toml", "*.txt", "*.yml", "*.yaml", "Makefile", "run")
FORBIDDEN_TEXT = {
    "a path of one machine": re.compile(r"(?<![\w.~-])/(work|root|home|tmp|opt|Users)/\w"),
    "a number of an issue": re.compile(r"\bissue\s*#?\s*\d", re.IGNORECASE),
    "the host of a registry": re.compile(r"\b(pypi|pythonhosted)\.org"),
}


# What only recipes/ may name: torch's optimizers, and the libraries that bring others.
OPTIMIZER_NAMES = {
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
} | {"Lion", "Lion8bit", "AdamW8bit", "AdamW4bit", "PagedAdamW8bit", "bitsandbytes", "torchao"}


@dataclass(frozen=True)
class Import:
    """One imported module, and whether importing the file imports it too (not so inside a function)."""

    module: str
    line: int
    at_once: bool


@dataclass(frozen=True)
class Source:
    """A Python file under its dotted module name."""

    module: str
    text: str
    is_package: bool = False

    @classmethod
    def read(cls, path: Path) -> "Source":
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        return cls(".".join(parts[:-1] if is_package else parts), path.read_text(), is_package)

    @property
    def home(self) -> str:
        """The package on a floor that the file belongs to, such as "optim"; empty for galore_torch/__init__.py."""
        return home_of(self.module)

    def imports(self) -> Iterator[Import]:
        """Yield what the file imports, relative names resolved."""
        tree = ast.parse(self.text)
        inside = {id(node) for scope in ast.walk(tree) if is_function(scope) for node in ast.walk(scope)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = self.resolve(node)
            else:
                continue
            for name in names:
                yield Import(name, node.lineno, at_once=id(node) not in inside)

    def resolve(self, node: ast.ImportFrom) -> list[str]:
        """Name the modules of `from a import b`: a.b where b may be a package of ours, else a."""
        base = node.module or ""
        if node.level:
            parts = self.module.split(".")
            parts = parts[: len(parts) - node.level + self.is_package]
            base = ".".join([*parts, base] if base else parts)
        if base != PACKAGE:
            return [base]
        return [f"{PACKAGE}.{alias.name}" if alias.name in FLOORS else PACKAGE for alias in node.names]


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def home_of(module: str) -> str:
    return [*module.split("."), ""][1]


def floor_of(home: str) -> int | None:
    """The floor of a package, of galore_torch itself for the empty name, None for a package without a floor."""
    return FACE_FLOOR if not home else FLOORS.get(home)


# Rules ---------------------------------------------------------------------------------------------------------------


def climbing_imports(source: Source) -> list[str]:
    """A floor imports only floors below it: none above, and no neighbour."""
    floor = floor_of(source.home)
    if floor is None:
        return [f"{source.module} is on no floor of the house: {', '.join(FLOORS)}"]
    wrong = []
    for imported in source.imports():
        if imported.module.split(".")[0] != PACKAGE or home_of(imported.module) == source.home:
            continue
        other = floor_of(home_of(imported.module))
        from_the_face = not source.home
        if other is None or other > floor or (other == floor and not from_the_face):
            wrong.append(f"{source.module}:{imported.line} (floor {floor}) imports {imported.module} (floor {other})")
    return wrong


def costly_imports(source: Source) -> list[str]:
    """Up to floor 3, importing a file imports the standard library, torch and the package, and nothing else."""
    floor = floor_of(source.home)
    if floor is None or floor > TORCH_ALONE_FLOOR:
        return []
    free = {*sys.stdlib_module_names, "torch", PACKAGE}
    return [
        f"{source.module}:{imported.line} imports {imported.module} when it is itself imported"
        for imported in source.imports()
        if imported.at_once and imported.module.split(".")[0] not in free
    ]


def named_optimizers(source: Source) -> list[str]:
    """No file of optim/ but those in recipes/ name an optimizer, except as the default of a function's argument."""
    if source.home != "optim" or ".recipes." in f"{source.module}.":
        return []
    tree = ast.parse(source.text)
    defaults = [
        default
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef)
        for default in [*scope.args.defaults, *scope.args.kw_defaults]
        if default is not None
    ]
    allowed = {id(node) for default in defaults for node in ast.walk(default)}
    return [
        f"{source.module}:{getattr(node, 'lineno', 0)} names {name}"
        for node in ast.walk(tree)
        if id(node) not in allowed
        for name in sorted(names_in(node) & OPTIMIZER_NAMES)
    ]


def names_in(node: ast.AST) -> set[str]:
    """The names that one node of the tree says: identifiers, imported names and whole string constants."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
            return {name}
        case ast.ImportFrom(module=module, names=aliases):
            return {(module or "").split(".")[0], *(alias.name for alias in aliases)}
        case ast.Import(names=aliases):
            return {alias.name.split(".")[0] for alias in aliases}
        case _:
            return set()


def too_long(source: Source) -> list[str]:
    """A file holds one idea, and one idea fits in 350 lines."""
    lines = len(source.text.splitlines())
    return [f"{source.module} has {lines} lines: which two ideas are in it?"] if lines > MAX_LINES else []


def forbidden_text(name: str, text: str) -> list[str]:
    """The project speaks of itself: no machine, no registry, no tracker."""
    return [
        f"{name}:{number} says {what}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        for what, pattern in FORBIDDEN_TEXT.items()
        if pattern.search(line)
    ]


# The project keeps them ----------------------------------------------------------------------------------------------

PACKAGE_FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
SOURCE_FILES = sorted(path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def text_files() -> Iterator[Path]:
    """Every text that readers see: the root's own files, and all below the folders that the project keeps."""
    for folder in (*SOURCE_FOLDERS, "docs", ".ci"):
        for pattern in TEXT_PATTERNS:
            yield from (ROOT / folder).rglob(pattern)
    for pattern in TEXT_PATTERNS:
        yield from ROOT.glob(pattern)


@pytest.mark.parametrize("rule", [climbing_imports, costly_imports, named_optimizers], ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    assert PACKAGE_FILES
    assert [wrong for path in PACKAGE_FILES for wrong in rule(Source.read(path))] == []


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
from galore_torch import *
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
# torch imports these of its own when parts of it are first used
through_torch = {"torch", "numpy", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec"}
print(*sorted(loaded - {"galore_torch"} - through_torch - set(sys.stdlib_module_names)))
"""


def test_the_command_line_answers_before_torch_is_imported():
    code = "import sys, galore_torch.cli as cli; cli.build_app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_face_has_what_it_names_and_no_more():
    code = "import galore_torch as g; all(getattr(g, name) for name in g.__all__); g.optim.GaLore; g.nothing"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert child.stderr.strip().endswith("module 'galore_torch' has no attribute 'nothing'")


def test_importing_all_of_the_package_imports_torch_and_nothing_else():
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
        ("cli", "from galore_torch.training.pretrain import pretrain", False),
        ("", "from galore_torch.gradients import attach\nfrom .optim import GaLore", True),
    ],
)
def test_an_import_from_below_is_allowed(module, text, is_package):
    assert wrongs(climbing_imports, module, text, is_package=is_package) == []


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
