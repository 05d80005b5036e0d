"""The LLaMA models whose weights are stepped and which are trained, and small ones to rehearse with."""

from dataclasses import replace

from benchmarks.common.sizes import LLAMA, REHEARSAL, Llama

TINY = Llama(hidden=64, intermediate=172, layers=24, heads=4, rank=8)
SIZES = {
    "tiny 168": TINY,
    "tiny 224": replace(TINY, layers=32),
    "350m": replace(LLAMA["350m"], sequence=1024),
    "1b": replace(LLAMA["1b"], sequence=1024),
    "7b": replace(LLAMA["7b"], sequence=2048, gap=200),
}
"""Tiny ones have as many weights as 350M and 7B, and nothing to compute: what they cost is the host's time."""

SMALL = {"350m": REHEARSAL, "7b": replace(REHEARSAL, hidden=48, intermediate=128, layers=2, rank=16)}
"""Two of the names for `--small`."""


def sizes(small: bool) -> dict[str, Llama]:
    """The models by name.

    >>> len(sizes(small=False)["7b"].weights)
    224
    """
    return SMALL if small else SIZES
