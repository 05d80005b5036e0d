"""Floor 4: several processes. DDP's traffic in low rank, renewals that are divided among processes."""

from galore_torch.distributed.ddp import join
from galore_torch.gradients.data_parallel import JOIN

JOIN[:] = [join]

__all__: list[str] = []
