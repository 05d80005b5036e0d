"""Floor 4: several processes. DDP's traffic in low rank, renewals that are divided among processes.

`import galore_torch` imports this much of it, so that the floors below can ask; the rest comes when they do.
"""

from __future__ import annotations

from typing import Any

from galore_torch.optim.processes import JOIN

__all__: list[str] = []


def _join(*given: Any) -> Any:
    from galore_torch.distributed.ddp import join

    return join(*given)


JOIN[:] = [_join]
