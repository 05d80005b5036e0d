"""constraints-oldest.txt has the lower bounds of pyproject.toml, so that what is tested is what is promised."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def versions(lines: list[str], operator: str) -> dict[str, Version]:
    found = {}
    for line in lines:
        requirement = Requirement(line)
        found[requirement.name] = next(
            Version(one.version) for one in requirement.specifier if one.operator == operator
        )
    return found


def test_the_oldest_versions_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = versions([*project["dependencies"], *extras["train"]], ">=")
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = versions([line for line in lines if not line.startswith("#")], "==")
    assert {name: pinned.get(name) for name in wanted} == wanted


def test_with_them_everything_in_several_processes_is_run():
    told = subprocess.run(["make", "-n", "test-oldest"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in told.splitlines() if "tests/distributed" in line)
    assert line.startswith(".oldest/bin/python -m pytest")
    assert "not slow" not in line
