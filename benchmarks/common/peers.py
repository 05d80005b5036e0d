"""The published optimizers that ours is measured against, each installed in a folder of its own.

galore-torch 1.0 is imported under the name of this package, so a peer never goes into the environment: pip puts it
under `.peers/<name>`, and a child process that has that folder first on its path imports it in place of ours.

    python -m benchmarks.common.peers galore-torch-1.0     # install one by hand
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAMP = ".installed"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A published distribution at one version."""

    name: str  # what the peer is called in folders and by `Method.optimizer`
    requirement: str  # what pip is asked for. Its dependencies are ours already and are not installed again

    @property
    def folder(self) -> Path:
        """The entry of the path that a child process imports the peer from; a stamp in it says that it is complete."""
        return ROOT / ".peers" / self.name


GALORE_1 = Peer(name="galore-torch-1.0", requirement="galore-torch==1.0")
APOLLO = Peer(name="apollo-torch-1.0.3", requirement="apollo-torch==1.0.3")
PEERS = {peer.name: peer for peer in (GALORE_1, APOLLO)}


def install(peer: Peer) -> None:
    """Install `peer` in its folder unless it is there already.

    Raises:
        RuntimeError: pip could not; nothing half-installed stays behind.
    """
    if (peer.folder / STAMP).exists():
        return
    shutil.rmtree(peer.folder, ignore_errors=True)
    try:
        pip("install", peer.requirement, "--target", str(peer.folder))
    except RuntimeError:
        shutil.rmtree(peer.folder, ignore_errors=True)
        raise
    (peer.folder / STAMP).touch()


def pip(command: str, requirement: str, *options: str) -> None:
    """Let pip install or download a distribution without its dependencies.

    Raises:
        RuntimeError: it could not.
    """
    words = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *options, requirement]
    outcome = subprocess.run(words, capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        reason = (outcome.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise RuntimeError(f"{requirement} could not be fetched (it needs the network once): {reason}")


def installed(peer: Peer) -> Path:
    """Return the folder that `peer` lies in.

    Raises:
        RuntimeError: the peer is not installed.
    """
    if not (peer.folder / STAMP).exists():
        raise RuntimeError(f"{peer.name} is not installed in {peer.folder}: run `make setup`")
    return peer.folder


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if name not in PEERS:
            raise SystemExit(f"unknown peer {name!r}: choose from {', '.join(PEERS)}")
        install(PEERS[name])
