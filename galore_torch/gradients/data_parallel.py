"""What a model does inside DistributedDataParallel, which averages full gradients after our hooks have seen them.

`distributed/` answers here how projected gradients are averaged in its place. Where it has no answer, for `attach` knew
of no other processes, the model refuses to run inside DDP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

Hook = Callable[[Tensor], None]


class Traffic(Protocol):
    """What averages the gradients of projected weights over the processes of a job, while it runs inside DDP."""

    def takes(self, weight: Tensor) -> bool:
        """Whether it averages this one of them."""

    def arrives(self, local: Hook) -> Hook:
        """What is done before a gradient is added to a weight's; `local` outside DDP."""
        return local

    def completes(self, form: Hook, apply: Hook | None) -> Hook:
        """What is done when a weight's gradient is complete: it is formed, averaged, and applied if it is not None."""

    def leaves(self, apply: Hook) -> Hook:
        """The same for a weight that DDP averages: nothing, or `apply` outside DDP."""
        return apply

    def remove(self) -> None:
        """Ends it."""


ATTACHMENT = "_galore_attachment"
"""The attribute of each module under an attachment that holds it; None in copies of the module."""


def attachments(model: nn.Module) -> set[Any]:
    """The attachments that a model, its parts, or what it is a part of, are under.

    Args:
        model: the model.
    """
    return {held for module in model.modules() if (held := module.__dict__.get(ATTACHMENT)) is not None}


def refuse_data_parallel(model: nn.Module) -> RemovableHandle:
    """Makes a model refuse to run inside DDP while it is attached; copies of it take the hook along, and are not.

    Args:
        model: the model.

    Returns:
        A handle to take the refusal off again.
    """
    return model.register_forward_pre_hook(_check)


def _check(module: nn.Module, _: Any) -> None:
    if DistributedDataParallel._active_ddp_module is not None and module.__dict__.get(ATTACHMENT) is not None:
        raise ValueError(
            "the model runs inside DistributedDataParallel, and attach(...) was called without a process "
            "group: its projected gradients would not be averaged. Call torch.distributed.init_process_group before "
            "attach(...), and attach(...) before DistributedDataParallel(model)"
        )
