"""Whether what a function was given is a GaLore optimizer at all."""

from __future__ import annotations

from typing import Any

from galore_torch.optim.galore import GaLore


def require_galore(optimizer: Any) -> None:
    """Checks that an argument is a GaLore optimizer.

    Args:
        optimizer: what was given.

    Raises:
        ValueError: it is something else, or an optimizer inside a wrapper.
    """
    if not isinstance(optimizer, GaLore):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}; pass the GaLore optimizer itself (inside a wrapper, such as "
            "Accelerate's, it is called .optimizer)"
        )
