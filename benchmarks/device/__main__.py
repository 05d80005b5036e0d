"""One command for a rented GPU: is all of it right there, where does a step's time go, how fast, in how much memory.

    python -m benchmarks.device [--only PART,...] [--out FOLDER] [--budget SECONDS] [--small]

Every part has a share of the time. It prints each figure as soon as it has it, and keeps it in PART.json, so that a run
which is cut short has printed what it knows; tables come last. With `--small` all of it runs on a CPU, in seconds.
"""

import gc
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.common.command import described, some_of
from benchmarks.common.peers import ROOT
from benchmarks.device import correctness, speed
from benchmarks.device.session import Row, Session

PARTS: dict[str, tuple[Callable[[Session], Iterator[Row]], float]] = {
    "ceilings": (speed.ceilings, 0.04),
    "correctness": (correctness.correctness, 0.12),
    "waiting": (correctness.waiting, 0.06),
    "factorizations": (speed.factorizations, 0.08),
    "training": (speed.training, 0.40),
    "steps": (speed.steps, 0.40),
    "staggered": (speed.staggered, 0.10),
}
"""In this order: its rows, and the share of all the time that it may take at most.

Together they may take more than all the time: what one does not need, the next ones have.
"""


def main(arguments: list[str] | None = None) -> dict[str, dict[str, dict[str, object]]]:
    """Run the parts that the command line asks for, each in its share of the time.

    Returns:
        The figures by part and row.
    """
    start = time.monotonic()
    command = described(__doc__, "benchmarks.device")
    add = command.add_argument
    add("--only", default="", help=f"parts, with commas between: {', '.join(PARTS)}")
    add("--out", type=Path, default=None, help="folder of the JSON files ($OUT, or runs/device)")
    add("--budget", type=float, default=540.0, help="seconds for all of it (540)")
    add("--peers", type=Path, default=ROOT / ".peers", help="folder of published optimizers (.peers)")
    add("--device", choices=["cuda", "cpu"], default=None, help="cuda if there is one")
    add("--small", action="store_true", help="everything in seconds, to rehearse on a CPU")
    given = command.parse_args(arguments)
    wanted = some_of(PARTS, given.only, command) or PARTS
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = given.out or Path(os.environ.get("OUT") or ROOT / "runs" / "device")
    out.mkdir(parents=True, exist_ok=True)
    session = Session(device=device, small=given.small, out=out, peers=given.peers)
    warnings.filterwarnings("ignore")  # those of libraries
    warnings.filterwarnings("default", module=r"(benchmarks|galore_torch)\.")
    gc.freeze()  # collecting garbage before each row would go through all that the libraries have made
    for name in (name for name in PARTS if name in wanted):
        begin, (rows, share) = time.monotonic(), PARTS[name]
        session.part = name
        session.deadline = min(start + given.budget, begin + share * given.budget)
        print(f"== {name} ({session.left_s:.0f} s)", flush=True)
        try:
            for row in rows(session):
                session.try_row(*row)
        except Exception:
            session.report("all of it", {"failed": traceback.format_exc()[-1500:]})
        print(f"== {name} took {time.monotonic() - begin:.0f} s", flush=True)
    session.print_tables()
    return dict(session.rows)


if __name__ == "__main__":
    main()
