"""What moves embeddings, head and norms where their moments are to take few bits."""

from __future__ import annotations

from typing import Literal

from torch.optim import Optimizer

from galore_torch.extras import install

OthersBits = Literal[8, 4]


def adamw_of_bits(bits: OthersBits | None) -> type[Optimizer] | None:
    """Torchao's AdamW of so many bits, which keeps tensors of 4,096 numbers or more in blocks that share a scale.

    Args:
        bits: 8 or 4; None for no such class.

    Returns:
        The class, for `fallback_class`.

    Raises:
        ValueError: other bits.
        ImportError: torchao is missing.

    >>> adamw_of_bits(4).__name__
    'AdamW4bit'
    """
    if bits is None:
        return None
    if isinstance(bits, bool) or bits not in (8, 4):
        raise ValueError(f"others_bits is {bits!r}; use 8, 4, or None to keep moments as the projected weights'")
    try:
        from torchao import optim
    except ImportError as error:
        raise ImportError(f"others_bits={bits} needs torchao. {install('torchao')}") from error
    found: type[Optimizer] = {8: optim.AdamW8bit, 4: optim.AdamW4bit}[bits]
    return found
