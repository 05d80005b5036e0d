"""From torch 2.12 on, `fully_shard` marks each parameter that it takes over. Here earlier releases are made to do so.

Without the mark nothing tells that a parameter is not in the model any more: an optimizer would train it in silence.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

if torch.__version__ < "2.12" and torch.distributed.is_available():
    # They import this themselves when an optimizer is made.
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    _take_over = FSDPParam.__init__

    @functools.wraps(_take_over)
    def _mark_and_take_over(self: FSDPParam, param: torch.nn.Parameter, *args: Any, **kwargs: Any) -> None:
        if not hasattr(param, "_fsdp_orig_uid"):
            param._fsdp_orig_uid = id(param)  # type: ignore[attr-defined]
        _take_over(self, param, *args, **kwargs)

    FSDPParam.__init__ = _mark_and_take_over  # type: ignore[method-assign]
