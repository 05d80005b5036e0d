"""The processes of a run: one, or as many as `torchrun` has started, each with a part of every batch (DDP).

The first one has the run folder to itself; the others read its checkpoints and keep what else they write in a folder
that goes with them. What ends a run is one decision: a signal that one process hears, all obey. Elastic restarts
(``--max-restarts``, ``--nnodes 1:4``) go on from the newest checkpoint; the global batch is that of the settings,
whatever the number of processes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from galore_torch.training.run.checkpoints import Checkpoints
from galore_torch.training.run.folder import LAUNCH, RunFolder

if TYPE_CHECKING:
    import torch

MEETING = 300
"""Seconds that processes wait for each other at their start."""

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells each process, torchrun as well as Accelerate's."""

_PART = "GALORE_PART"
"""Where a process finds in which part of a job it is one, if the job has several, see `begin_part`."""

T = TypeVar("T")


def count() -> int:
    """How many processes the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes, and shows."""
    return os.environ.get("RANK", "0") == "0" or count() == 1


def goes_on(folder: RunFolder) -> bool:
    """Whether the launcher has started the processes anew, after one was lost or another number is to go on.

    A process that has joined does not know, nor do others where no process has failed: the first one tells all.

    Args:
        folder: of the run, which this launch has begun if so.
    """
    launch = os.environ.get(LAUNCH, "none")
    began = launch != "none" and folder.launch.exists() and folder.launch.read_text(encoding="utf-8") == launch
    return gathered(folder.config.exists() and (began or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0))[0]


def require_one() -> None:
    """Refuse a launcher of many processes with a ValueError."""
    if count() > 1:
        raise ValueError(f"WORLD_SIZE = {count()}: this job runs in one process; start it without a launcher.")


def divides_weights(config: Any) -> bool:
    """Whether each of several processes is to keep a part of every weight.

    Args:
        config: of the job.
    """
    return count() > 1 and getattr(config.schedule, "parallel", "ddp") == "fsdp"


def require_served(config: Any) -> int:
    """Check that a job can run in as many processes as there are.

    Args:
        config: the job's settings.

    Returns:
        How many sequences of a step one process takes at a time.

    Raises:
        ValueError: it cannot, or its batch cannot be divided.
    """
    adapter = config.adapter.adapter
    if adapter == "relora" and divides_weights(config):
        raise ValueError("parallel = 'fsdp' and adapter = 'relora', whose restarts need whole matrices; use ddp.")
    return divided(config.schedule, count())


def divided(schedule: Any, world: int) -> int:
    """How many sequences of a step each of so many processes takes at a time.

    Args:
        schedule: with `batch` and `micro_batch`.
        world: how many processes there are.

    Raises:
        ValueError: the batch cannot be divided among them.
    """
    micro_batch: int = min(schedule.micro_batch or schedule.batch, max(1, schedule.batch // world))
    if world > 1 and schedule.batch % (micro_batch * world):
        raise ValueError(
            f"batch = {schedule.batch} cannot be divided among {world} processes by micro-batches of {micro_batch}; "
            "choose a batch that is a multiple of both, or another number of processes."
        )
    return micro_batch


def begin_part(number: int) -> None:
    """Let processes that this one starts from now on meet those that the others start, at a place of their own.

    Args:
        number: of the part of the job that they are to do, the same in all processes, which all must call.
    """
    start = gathered(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))[0]  # each node counts for itself
    serves_us = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": start}
    os.environ |= {_PART: str(number), **serves_us}


def connect(*, trains: bool = True) -> None:
    """Let the processes find each other: by addresses of this start, since the launcher keeps those of the last.

    Args:
        trains: whether they train, and do not only wait, however long, for processes that they start and that do.

    Raises:
        ValueError: not all of them have come in `MEETING` seconds, in those that have; or no launcher has set the
            variables of one.
    """
    missing = [name for name in _LAUNCHED if name not in os.environ]
    if missing and (count() > 1 or "LOCAL_RANK" in os.environ):
        left = {name: value for name in ("LOCAL_RANK", *_LAUNCHED) if (value := os.environ.get(name)) is not None}
        raise ValueError(
            f"{', '.join(f'{name} = {value}' for name, value in left.items())} in the environment, and no "
            f"{' or '.join(missing)}: no launcher leaves it so. Start the processes by torchrun or accelerate launch; "
            f"for one process, unset {' '.join(left)}."
        )
    if count() == 1:
        return
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        return
    on_gpu = trains and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    limit = timedelta(seconds=MEETING)
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=limit)))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # one for all starts
            start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = PrefixStore(f"start-{start}-{os.environ.get(_PART, '')}", store)
        store.set(f"here-{rank}", "")  # a group would wait as long as a collective may take
        store.wait([f"here-{one}" for one in range(world)], limit)
        backend, lasts = None if on_gpu else "gloo", None if trains else timedelta(days=365)
        dist.init_process_group(backend, timeout=lasts, store=store, rank=rank, world_size=world)
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"WORLD_SIZE = {count()}, and not all processes have met at {place} in {MEETING} s: one was lost or "
            f"never started, or none can be reached there ({str(error).splitlines()[0]}). Start all of them anew; "
            "torchrun --max-restarts does so by itself."
        ) from error


def gathered(value: T) -> list[T]:
    """What each process says, the first one first. All must ask.

    Args:
        value: what this one says.
    """
    if count() == 1:
        return [value]
    import torch.distributed as dist  # the command line answers before torch is there

    connect()
    said: list[Any] = [None] * count()
    dist.all_gather_object(said, value)
    return said


def wait_for_all() -> None:
    """Return once all processes are here."""
    if count() > 1:
        import torch.distributed as dist  # the command line answers before torch is there

        dist.barrier()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set in any process.

    Args:
        flag: of this one.
        device: of what it trains.
    """
    if count() == 1:
        return flag
    import torch
    import torch.distributed as dist

    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def require_same_text(digest: str) -> None:
    """Refuse processes that have read different data, in all of them with a ValueError."""
    if len(set(gathered(digest))) > 1:
        raise ValueError("the processes have read different data; give all of them the same files.")


def run_folder(root: Path | RunFolder) -> RunFolder:
    """The run folder as this process uses it; one that was made by this stays as it is."""
    if isinstance(root, RunFolder):
        return root
    return RunFolder(root) if is_first() else _Followed(root)


class _Followed(RunFolder):
    """A run folder that another process has: its checkpoints are read, and all else is kept elsewhere."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._elsewhere = tempfile.TemporaryDirectory(prefix="galore-")
        elsewhere = Path(self._elsewhere.name)
        for name in ("metrics", "subspaces", "predictions", "plot", "model"):
            path: Path = getattr(self, name)
            if path.is_file():
                shutil.copy(path, elsewhere)  # a resumed run looks back at its records
            setattr(self, name, elsewhere / path.name)
        self.checkpoints = _FollowedCheckpoints(self.checkpoints.root)

    def _left(self, *_: Any, **__: Any) -> None:
        """Nothing: the first process does it, and may have begun."""

    hold = release = wait_until_free = require_new = create = abandon = _left


class _FollowedCheckpoints(Checkpoints):
    """Checkpoints that another process completes."""

    def complete(self, step: int, before: Path | None, stream: str | None = None) -> Path:  # noqa: ARG002
        """Nothing: the first process does."""
        return self.of(step)

    def clear(self) -> None:
        """Nothing."""
