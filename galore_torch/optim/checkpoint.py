"""Loading an optimizer's state as it was saved.

`torch.optim.Optimizer.load_state_dict` casts all state to the parameter's dtype: 8-bit codes and fp32 moments of bf16
weights would be ruined. Here its state is kept out of that cast, and put in place untouched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from galore_torch.galore_projector import GaLoreProjector
from galore_torch.optim.groups import check_same_geometry


def load_uncast(optimizer: Optimizer, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
    """Loads groups and hooks as torch does, and the state with its own dtypes.

    Tensors move to their parameter's device; what torch keeps on the CPU (`step`) stays. As in torch, tensors that
    are in place already are used, not copied.

    Args:
        optimizer: to load into.
        state_dict: the checkpoint.
        load: torch's own `load_state_dict`, bound to the optimizer.

    Raises:
        ValueError: a checkpoint that does not fit, before anything is changed.
    """
    captured: dict[str, Any] = {}

    def take_state_out(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        _check(optimizer, given)
        captured.update(given)
        # What a checkpoint does not say, as one of an older version, stays as it is here.
        both = zip(optimizer.param_groups, given["param_groups"], strict=True)
        return {**given, "state": {}, "param_groups": [{**group, **saved} for group, saved in both]}

    def put_state_in(_: Optimizer) -> None:
        saved_ids = chain.from_iterable(group["params"] for group in captured["param_groups"])
        held = ((parameter, group) for group in optimizer.param_groups for parameter in group["params"])
        ours = dict(zip(saved_ids, held, strict=True))
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, value in captured["state"].items():
            if key not in ours:
                state[key] = value
                continue
            parameter, group = ours[key]
            # torch keeps step counters on the CPU, except for rules that run wholly on the device.
            steps_on_device = bool(group.get("fused") or group.get("capturable"))
            state[parameter] = _placed(value, parameter.device, before.get(parameter, {}), steps_on_device)
        optimizer.state = state

    before = optimizer.state
    handles = (
        optimizer.register_load_state_dict_pre_hook(take_state_out),  # after the user's own
        optimizer.register_load_state_dict_post_hook(put_state_in, prepend=True),  # before the user's own
    )
    try:
        load(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def _check(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    for state in state_dict["state"].values():
        if isinstance(state, dict) and isinstance(state.get("projector"), GaLoreProjector):
            raise ValueError(
                "this optimizer state was saved by galore-torch 1.0: it holds pickled projectors, which cannot be "
                "resumed. Load the model's weights and start the optimizer anew, with a short warm-up: its bases are "
                "found again in the first step, and its moments within some hundred"
            )
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
        ours, theirs = ([len(group["params"]) for group in some] for some in (groups, saved_groups))
        raise ValueError(
            f"the checkpoint has parameter groups of {theirs} parameters, the optimizer of {ours}; build the groups as "
            "they were when it was saved"
        )
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        check_same_geometry(group, saved, index)


def _placed(value: Any, device: torch.device, existing: Any, steps_on_device: bool, key: str = "") -> Any:
    """A saved value on its parameter's device, in the dtype of what it replaces if that holds codes."""
    if isinstance(value, dict):
        known = existing if isinstance(existing, dict) else {}
        return {name: _placed(one, device, known.get(name), steps_on_device, name) for name, one in value.items()}
    if not isinstance(value, Tensor):
        return value
    if isinstance(existing, Tensor) and not existing.is_floating_point():
        value = value.to(existing.dtype)  # distributed checkpoints give codes back as floats
    return value if key == "step" and not steps_on_device else value.to(device)
