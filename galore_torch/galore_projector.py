"""The name under which galore-torch 1.0 pickled its projectors into optimizer states.

Such a state cannot be resumed. With this name in place it can be read, also with `torch.load(weights_only=True)`, so
that loading it into an optimizer says what to do instead of failing to unpickle.
"""

from __future__ import annotations

from typing import Any

import torch


class GaLoreProjector:
    """Stands for a projector of galore-torch 1.0. It can be unpickled and nothing else."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(
            "GaLoreProjector was a part of galore-torch 1.0; build optimizers with galore_torch.GaLoreAdamW and others"
        )


torch.serialization.add_safe_globals([GaLoreProjector])
