"""Frameworks that keep weights flattened or in pieces, of which no matrix can be projected."""

from __future__ import annotations

from torch import nn


def require_matrices(model: nn.Module) -> None:
    """Checks that a model's weights are there as matrices.

    Args:
        model: the model.

    Raises:
        ValueError: it is wrapped in FSDP1, or DeepSpeed ZeRO 3 has taken its weights apart.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":  # not imported for its sake
            raise ValueError(
                f"{name or 'the model'} is wrapped in FullyShardedDataParallel (FSDP1), which flattens weights; use "
                "fully_shard (FSDP2; fsdp_version: 2 in Accelerate), or DistributedDataParallel"
            )
    apart = next((name for name, weight in model.named_parameters() if hasattr(weight, "ds_id")), None)
    if apart is not None:
        raise ValueError(
            f"DeepSpeed ZeRO 3 has taken {apart} apart; use FSDP2 (fully_shard), DistributedDataParallel, or DeepSpeed "
            "with stage 0"
        )
