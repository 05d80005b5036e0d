"""Environments of their own for frameworks that ask for other versions than ours: one a framework, made once.

They lie in the folder that the environment variable GALORE_FRAMEWORKS names. `make frameworks` sets it.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHERE = "GALORE_FRAMEWORKS"
STAMP = ".installed"
ABSENT = "No matching distribution found for"


@dataclass(frozen=True, kw_only=True)
class Framework:
    """A published framework.

    `needs` is what its command imports and no more. Empty: whatever the distribution itself asks for. The newest
    version where none is named.
    """

    distribution: str
    command: str
    needs: tuple[str, ...] = ()
    needs_alone: tuple[str, ...] = ()  # installed without what they ask for in turn
    version: str | None = None

    @property
    def asked(self) -> str:
        """What pip is asked for."""
        return self.distribution + (f"=={self.version}" if self.version else "")

    def environment(self) -> Path:
        """Return the folder of the environment, which is made if it is not there.

        Its name tells what was asked for, so that other requirements make another. This package is there as it is in
        the checkout.
        """
        if WHERE not in os.environ:
            pytest.skip(f"{WHERE} names no folder for environments of frameworks: run `make frameworks`")
        asked = json.dumps([sys.version_info[:2], torch(), self.asked, self.needs, self.needs_alone])
        key = hashlib.sha256(asked.encode()).hexdigest()[:12]
        folder = Path(os.environ[WHERE]).resolve() / f"{self.distribution}-{key}"
        if not (folder / STAMP).exists():
            self._make(folder)
        return folder

    def tell(self, losses: Sequence[float]) -> None:
        """Print what the guide's table shows of a run: the version that is there, and the first and last loss."""
        (there,) = importlib.metadata.distributions(
            name=self.distribution, path=[str(folder) for folder in self.environment().glob("lib/*/site-packages")]
        )
        print(f"{self.distribution} {there.version}: loss {losses[0]:.3f}, {losses[-1]:.3f}")

    def _make(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--clear", str(folder))
        alone = (self.asked,) if self.needs else ()
        pip(folder, torch(), *(self.needs or (self.asked,)))
        pip(folder, "--no-deps", *alone, *self.needs_alone, "--editable", str(ROOT))
        if "+cpu" in torch():  # the registry has torchaudio for CUDA; without its compiled part it is of any torch
            for compiled in folder.glob("lib/*/site-packages/torchaudio/lib/*.so"):
                compiled.unlink()
        (folder / STAMP).touch()

    def run(self, *words: str, **variables: str) -> str:
        """Run the framework's own command, without network, and return what it said."""
        return self.run_beside(self.command, *words, **variables)

    def run_beside(self, command: str, *words: str, **variables: str) -> str:
        """Run another command of its environment."""
        return run(str(self.environment() / "bin" / command), *words, **variables)


def torch() -> str:
    """Return the requirement of the torch that is here."""
    return f"torch=={importlib.metadata.version('torch')}"


def pip(folder: Path, *words: str) -> None:
    """Install into an environment; skips a test where the registry lacks what is asked for."""
    try:
        run(str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *words)
    except AssertionError as failed:
        for line in str(failed).splitlines():
            if ABSENT in line:
                pytest.skip(f"the registry has none of what the framework needs: {line}")
        raise


def run(*words: str, **variables: str) -> str:
    """Run a command and return what it wrote; an AssertionError with all of it, where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_HUB_OFFLINE="1", **variables)
    ended = subprocess.run(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert ended.returncode == 0, f"{' '.join(words)}\n{ended.stdout}"
    return ended.stdout


def losses(folder: Path, last: int) -> dict[int, float]:
    """Return the training losses by step that a framework on Trainer wrote at its checkpoint of the last step."""
    state = json.loads((folder / f"checkpoint-{last}" / "trainer_state.json").read_text())
    return {record["step"]: record["loss"] for record in state["log_history"] if "loss" in record}
