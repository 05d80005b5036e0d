"""Several processes: DDP's traffic in low rank, FSDP2's shards, renewals that are divided.

`import galore_torch` imports this much of it, so that the packages below can ask; the rest comes when they do.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from galore_torch.optim.processes import JOIN, SHARD, is_sharded

__all__ = ["shard_bases", "shard_placement"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _in("cut" if name == "shard_placement" else "sharded", name)


def _in(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def _join(model: Any, optimizer: Any, weights: Mapping[str, Any], dtype: Any, applies: bool, average_every: int) -> Any:
    if any(map(is_sharded, weights.values())):
        if average_every != 1:
            raise ValueError(f"average_every is {average_every}, and the model is sharded; use 1, or DDP")
        return _in("fsdp", "ShardTraffic")(model, optimizer, weights, applies)
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    return _in("ddp", "ReplicaTraffic")(model, optimizer, weights, dtype, applies, average_every)


def _shard(*given: Any) -> Any:
    return _in("sharded", "shard")(*given)


JOIN[:], SHARD[:] = [_join], [_shard]
