"""Runs the parts, each in its share of the time, and prints the tables."""

import argparse
import os
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.device import ceilings, correctness, factorizations, staggered, steps, training, waiting
from benchmarks.device.session import Session
from benchmarks.device.tables import table

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One question that is put to the device."""

    measure: Callable[[Session], None]  # tells what it finds
    share: float  # of all the time, how much it may take at most


PARTS: dict[str, Part] = {
    "ceilings": Part(measure=ceilings.measure, share=0.04),
    "correctness": Part(measure=correctness.measure, share=0.12),
    "waiting": Part(measure=waiting.measure, share=0.06),
    "factorizations": Part(measure=factorizations.measure, share=0.08),
    "training": Part(measure=training.measure, share=0.40),
    "steps": Part(measure=steps.measure, share=0.40),
    "staggered": Part(measure=staggered.measure, share=0.10),
}
"""In this order. Together they may take more than all the time: what one does not need, the next ones have."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    made.add_argument("--only", default="", help=f"parts, with commas between: {', '.join(PARTS)}")
    made.add_argument("--out", type=Path, default=None, help="folder of the JSON files ($OUT, or runs/device)")
    made.add_argument("--budget", type=float, default=540.0, help="seconds for all of it (540)")
    made.add_argument("--peers", type=Path, default=ROOT / ".peers", help="folder of published optimizers (.peers)")
    made.add_argument("--device", choices=["cuda", "cpu"], default=None, help="cuda if there is one")
    made.add_argument("--small", action="store_true", help="everything in seconds, to rehearse on a CPU")
    return made


def main(arguments: list[str] | None = None) -> dict[str, dict[str, dict[str, object]]]:
    """Run what the command line asks for.

    Returns:
        The figures by part and row.
    """
    start, command = time.monotonic(), parser()
    given = command.parse_args(arguments)
    wanted = [name for name in given.only.split(",") if name] or list(PARTS)
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        command.error(f"--only names {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = given.out or Path(os.environ.get("OUT") or ROOT / "runs" / "device")
    out.mkdir(parents=True, exist_ok=True)
    session = Session(device=device, small=given.small, out=out, peers=given.peers)
    warnings.filterwarnings("ignore")
    for name in (name for name in PARTS if name in wanted):
        begin = time.monotonic()
        session.part = name
        session.deadline = min(start + given.budget, begin + PARTS[name].share * given.budget)
        print(f"== {name} ({session.left_s:.0f} s)", flush=True)
        try:
            PARTS[name].measure(session)
        except Exception:
            session.tell("all of it", {"failed": traceback.format_exc()[-1500:]})
        print(f"== {name} took {time.monotonic() - begin:.0f} s", flush=True)
    print("", *(table(part, rows) + "\n" for part, rows in session.rows.items()), sep="\n")
    return dict(session.rows)


if __name__ == "__main__":
    main()
