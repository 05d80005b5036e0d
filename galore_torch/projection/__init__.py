"""The mathematics of the projection, on tensors only.

It knows no optimizer, no module and no process group. Four questions: what a projection does to a tensor
(`geometry`), which subspace it uses (`decompositions`, `numerical_rank`, `subspace`), when that is renewed (`renewal`),
and how much of the old one is left in the new (`subspace_overlap`). `spectra` says how much of a gradient a subspace
holds.
"""

from galore_torch.projection.decompositions import DECOMPOSITIONS, Side, find_bases
from galore_torch.projection.geometry import LAYOUTS, PROJ_TYPES, Basis, Mode, Projection, multiply_mode
from galore_torch.projection.numerical_rank import count_lacking, lacking
from galore_torch.projection.renewal import adapt_gap, is_due, turn_offset
from galore_torch.projection.spectra import captured_energy
from galore_torch.projection.subspace import find_basis, find_unread, is_usable, sketch
from galore_torch.projection.subspace_overlap import overlap

__all__ = [
    "DECOMPOSITIONS",
    "LAYOUTS",
    "PROJ_TYPES",
    "Basis",
    "Mode",
    "Projection",
    "Side",
    "adapt_gap",
    "captured_energy",
    "count_lacking",
    "find_bases",
    "find_basis",
    "find_unread",
    "is_due",
    "is_usable",
    "lacking",
    "multiply_mode",
    "overlap",
    "sketch",
    "turn_offset",
]
