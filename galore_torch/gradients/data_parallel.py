"""DistributedDataParallel averages full gradients, after our hooks have seen them: refused before one is formed."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

_ATTACHED_TO: list[Container[nn.Module]] = []
"""Where the hook looks, which is a plain function, for models are pickled with their hooks."""


def refuse_data_parallel(model: nn.Module, attached: Container[nn.Module]) -> RemovableHandle:
    """Makes a model refuse to run inside DDP, wrapped before or after.

    Args:
        model: the model.
        attached: the modules for which this holds; copies of a model take its hooks along, and are not among them.

    Returns:
        A handle to take the refusal off again.

    Raises:
        ValueError: the model is, or contains, a DDP wrapper.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        _refuse()
    _ATTACHED_TO[:] = [attached]
    return model.register_forward_pre_hook(_check)


def _check(module: nn.Module, _: Any) -> None:
    active = DistributedDataParallel._active_ddp_module
    if active is not None and any(module in attached for attached in _ATTACHED_TO):
        _refuse()


def _refuse() -> None:
    raise ValueError(
        "the model runs inside DistributedDataParallel, which averages the processes' full gradients, and with this "
        'attach(...) there are none: the processes would drift apart. Use attach(..., gradients="full", '
        'update="step"), or no attach at all: the optimizer\'s state is as small'
    )
