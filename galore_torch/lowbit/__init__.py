"""Bases, projected gradients and weights in few bits, and `quantize_weights`. It knows no optimizer."""

from galore_torch.lowbit import (
    operations,  # noqa: F401 (implements torch's operations on a QuantizedWeight)
    taken_over,  # noqa: F401 (has fully_shard mark what it takes over)
)
from galore_torch.lowbit.bases import Storage, StoredBasis, is_same_basis, orthonormality_loss
from galore_torch.lowbit.codes import BITS, Codes, check_bits, has_numbers
from galore_torch.lowbit.quantize import dequantize_weights, quantize_weights
from galore_torch.lowbit.quantized_linear import linear
from galore_torch.lowbit.rounding import ROUNDINGS, Rounding, add_rounded
from galore_torch.lowbit.weights import QuantizedWeight
from galore_torch.lowbit.without_memory import WithoutMemory

__all__ = [
    "BITS",
    "ROUNDINGS",
    "Codes",
    "QuantizedWeight",
    "Rounding",
    "Storage",
    "StoredBasis",
    "WithoutMemory",
    "add_rounded",
    "check_bits",
    "dequantize_weights",
    "has_numbers",
    "is_same_basis",
    "linear",
    "orthonormality_loss",
    "quantize_weights",
]
