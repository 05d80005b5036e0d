"""That the processes of a job were given the same optimizer: asked once, when all of them first come together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import galore_torch
from galore_torch.group_keys import KEYS
from galore_torch.optim.galore import GaLore
from galore_torch.optim.groups import parameter_name

Said = list[tuple[str, str]]


def require_agreement(optimizer: GaLore, choices: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Checks that all processes say the same of weights, groups, settings and versions.

    Args:
        optimizer: of this process.
        choices: of `attach`, by name.
        group: the processes.

    Raises:
        ValueError: they do not; every process is told the first thing that differs, and what each one says.
    """
    mine = _said(optimizer, choices)
    all_said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(all_said, mine, group=group)
    if all(said == mine for said in all_said):
        return
    for place in range(max(map(len, all_said))):
        entries = [said[place] if place < len(said) else ("nothing more", "") for said in all_said]
        if len(set(entries)) > 1:
            told = "; ".join(f"rank {rank}: {' '.join(entry).strip()}" for rank, entry in enumerate(entries))
            raise ValueError(
                f"the processes of this job were given different optimizers ({told}): their bases and weights would "
                "drift apart. Build model and optimizer alike in all of them, from the same settings and not their rank"
            )


def _said(optimizer: GaLore, choices: dict[str, Any]) -> Said:
    said = [("torch", torch.__version__), ("galore_torch", galore_torch.__version__)]
    said += [("seed", str(optimizer._settings["seed"]))]
    said += [(name, str(value)) for name, value in choices.items()]
    for number, group in enumerate(optimizer.param_groups):
        said += [(f"{key} of group {number}", str(group[key])) for key in KEYS if key in group]
        said += [
            (f"weight {parameter_name(group, index)}", f"{tuple(weight.shape)} {weight.dtype}")
            for index, weight in enumerate(group["params"])
        ]
    return said
