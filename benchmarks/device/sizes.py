"""The LLaMA models of the paper whose weights are stepped and which are trained, and small ones to rehearse with."""

from dataclasses import dataclass

from benchmarks.shapes import LlamaShapes


@dataclass(frozen=True, kw_only=True)
class Size:
    """One LLaMA.

    Attributes:
        shapes: The weights that are projected, and their rank.
        heads: Attention heads.
        vocabulary: Tokens that there are.
        tokens: Tokens of a training step.
        sequence: Of them, how many make a sequence.
    """

    shapes: LlamaShapes
    heads: int
    vocabulary: int = 32_000
    tokens: int = 8192
    sequence: int = 1024


def _size(hidden: int, intermediate: int, layers: int, heads: int, rank: int, **more: int) -> Size:
    return Size(
        shapes=LlamaShapes(hidden=hidden, intermediate=intermediate, layers=layers, rank=rank), heads=heads, **more
    )


SIZES = {
    "tiny 168": _size(64, 172, 24, 4, 8),
    "tiny 224": _size(64, 172, 32, 4, 8),
    "350m": _size(1024, 2736, 24, 16, 256),
    "1b": _size(2048, 5461, 24, 32, 512),
    "7b": _size(4096, 11008, 32, 32, 1024, tokens=2048, sequence=2048),
}
"""Tiny ones have as many weights as 350M and 7B, and nothing to compute: what they cost is the host's time."""

SMALL = {
    "350m": _size(32, 80, 1, 4, 8, vocabulary=64, tokens=32, sequence=16),
    "7b": _size(48, 128, 2, 4, 16, vocabulary=64, tokens=32, sequence=16),
}
"""Two of the names for `--small`."""


def sizes(small: bool) -> dict[str, Size]:
    """The models by name.

    >>> len(sizes(small=False)["7b"].shapes.weights)
    224
    """
    return SMALL if small else SIZES
