"""The rules of the house: who may import whom, what an import costs, who names an optimizer, how long a file is.

Each rule is a function from one source file to the list of what is wrong with it.
"""

import ast
import functools
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "galore_torch"
LEVELS = (  # from the ground up: a package or module imports those of the levels before its own
    ("extras", "galore_projector", "values", "units", "interrupts"),
    ("messages",),
    ("modules", "group_keys", "random_bits", "devices"),
    ("modes", "projection", "lowbit"),
    ("optim",),
    ("targets",),
    ("gradients",),
    ("distributed",),
    ("memory", "integrations"),
    ("training",),
    ("cli",),
    ("__main__",),
)
FLOORS = {home: level for level, homes in enumerate(LEVELS) for home in homes}
ROOMS = (
    "settings",
    "baselines",
    "run",
    "text",
    "page",
    "pretrain",
    "finetune",
    "planning",
    "evaluation",
    "inspection",
    "compare",
)
FACE_FLOOR = FLOORS["gradients"]  # galore_torch/__init__.py may import these, and those above may import it
TORCH_ALONE_FLOOR = FLOORS["gradients"]  # up to here torch is the only library
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
    @functools.cache
    def read(cls, path: Path) -> "Source":
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        return cls(".".join(parts[:-1] if is_package else parts), path.read_text(), is_package)

    @property
    def home(self) -> str:
        """The package on a floor that the file belongs to, such as "optim"; empty for galore_torch/__init__.py."""
        return home_of(self.module)

    @functools.cached_property
    def imports(self) -> "list[Import]":
        """What the file imports, relative names resolved."""
        tree = ast.parse(self.text)
        found = []
        inside = {id(node) for scope in ast.walk(tree) if is_function(scope) for node in ast.walk(scope)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = self.resolve(node)
            else:
                continue
            found += [Import(name, node.lineno, at_once=id(node) not in inside) for name in names]
        return found

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
    for imported in source.imports:
        if imported.module.split(".")[0] != PACKAGE or home_of(imported.module) == source.home:
            continue
        other = floor_of(home_of(imported.module))
        from_the_face = not source.home
        if other is None or other > floor or (other == floor and not from_the_face):
            wrong.append(f"{source.module}:{imported.line} (floor {floor}) imports {imported.module} (floor {other})")
    return wrong


def costly_imports(source: Source) -> list[str]:
    """Up to gradients/, importing a file imports the standard library, torch and the package, and nothing else."""
    floor = floor_of(source.home)
    if floor is None or floor > TORCH_ALONE_FLOOR:
        return []
    free = {*sys.stdlib_module_names, "torch", PACKAGE}
    return [
        f"{source.module}:{imported.line} imports {imported.module} when it is itself imported"
        for imported in source.imports
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


def named_modules(source: Source) -> list[str]:
    """No file of optim/ names `torch.nn.Module`: what of a model is projected is decided in targets/."""
    if source.home != "optim":
        return []
    tree = ast.parse(source.text)
    named = ((node, names_in(node) & {"Module"}) for node in ast.walk(tree) if not isinstance(node, ast.Constant))
    return [f"{source.module}:{getattr(node, 'lineno', 0)} names nn.Module" for node, names in named if names]


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


def climbing_rooms(source: Source) -> list[str]:
    """A room of training/ imports only rooms named before it."""
    room = room_of(source.module)
    if not source.module.startswith(f"{PACKAGE}.training.") or source.module == f"{PACKAGE}.training":
        return []
    if room not in ROOMS:
        return [f"{source.module} is in no room of training/: {', '.join(ROOMS)}"]
    return [
        f"{source.module}:{imported.line} (room {room}) imports {imported.module}"
        for imported in source.imports
        if imported.module.startswith(f"{PACKAGE}.training.")
        and room_of(imported.module) != room
        and room_of(imported.module) not in ROOMS[: ROOMS.index(room)]
    ]


def climbing_benchmarks(source: Source) -> list[str]:
    """Rooms of benchmarks/, and the files beside them, import of it common/ and themselves; common/ itself alone."""
    home = home_of(source.module)
    return [
        f"{source.module}:{imported.line} imports {imported.module}"
        for imported in source.imports
        if imported.module.split(".")[0] == "benchmarks" and home_of(imported.module) not in (home, "common")
    ]


def room_of(module: str) -> str:
    return [*module.split("."), "", ""][2]


def circles(sources: Mapping[str, Source]) -> list[str]:
    """The modules that import themselves by way of others."""
    graph = {name: modules_in(source) & sources.keys() - {name} for name, source in sources.items()}
    while leaves := {name for name, imports in graph.items() if not imports}:
        graph = {name: imports - leaves for name, imports in graph.items() if name not in leaves}
    return sorted(graph)


def modules_in(source: Source) -> set[str]:
    """Every module that the file imports, `from package import module` resolved."""
    named = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(source.text))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return named | {imported.module for imported in source.imports}
