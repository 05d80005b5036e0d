"""The public interface is as `public_api.txt` has it: it changes on purpose, by ``python -m tests.test_public_api``."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import galore_torch
from galore_torch import memory

KNOWN = Path(__file__).with_name("public_api.txt")
SCOPES = {"galore_torch": galore_torch, "galore_torch.memory": memory}


def public() -> Iterator[str]:
    """A line for each public name: functions and classes with types and defaults, and what classes have."""
    for scope, module in SCOPES.items():
        for name in sorted(module.__all__):
            value = getattr(module, name)
            if not callable(value):
                yield f"{scope}.{name}: {value!r}"
                continue
            yield f"{scope}.{name}{signature(value)}"
            for member, own in sorted(vars(value).items() if inspect.isclass(value) else ()):
                if member.startswith("_") or not defined_in(value, own):
                    continue
                if isinstance(own, property):
                    yield f"{scope}.{name}.{member}: {own.fget.__annotations__['return']}"
                elif isinstance(own, (classmethod, staticmethod)) or inspect.isfunction(own):
                    yield f"{scope}.{name}.{member}{signature(getattr(value, member))}"


def defined_in(owner, member) -> bool:
    """Whether a class has a member of its own: torch puts a wrapper of the inherited `step` into each class in use."""
    return getattr(member, "__qualname__", owner.__qualname__).startswith(owner.__qualname__)


def signature(of) -> str:
    """Arguments, their types and defaults, without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(of)))


def test_nothing_public_has_changed_by_accident():
    assert list(public()) == KNOWN.read_text().splitlines(), "if it is meant: python -m tests.test_public_api"


def test_everything_public_is_typed():
    for module in SCOPES.values():
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                assert {"return", *inspect.getfullargspec(value).args} <= value.__annotations__.keys()


if __name__ == "__main__":
    KNOWN.write_text("\n".join(public()) + "\n")
