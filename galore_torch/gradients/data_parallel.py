"""What a model does inside DistributedDataParallel, which averages full gradients after our hooks have seen them.

`distributed/` answers here how projected gradients are averaged in its place. Where it has no answer, for `attach` knew
of no other processes, the model refuses to run inside DDP.
"""

from __future__ import annotations

from collections.abc import Callable, Container
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


_ATTACHED_TO: list[Container[nn.Module]] = []
"""Where the hook looks, which is a plain function, for models are pickled with their hooks."""


def refuse_data_parallel(model: nn.Module, attached: Container[nn.Module]) -> RemovableHandle:
    """Makes a model refuse to run inside DDP.

    Args:
        model: the model.
        attached: the modules for which this holds; copies of a model take its hooks along, and are not among them.

    Returns:
        A handle to take the refusal off again.
    """
    _ATTACHED_TO[:] = [attached]
    return model.register_forward_pre_hook(_check)


def _check(module: nn.Module, _: Any) -> None:
    active = DistributedDataParallel._active_ddp_module
    if active is not None and any(module in attached for attached in _ATTACHED_TO):
        raise ValueError(
            "the model runs inside DistributedDataParallel, and attach(...) was called without a process "
            "group: its projected gradients would not be averaged. Call torch.distributed.init_process_group before "
            "attach(...), and attach(...) before DistributedDataParallel(model)"
        )
