"""Loading an optimizer's state: matched by name, compared with what is there, and cast to what is asked for now.

`torch.optim.Optimizer.load_state_dict` matches by order, compares counts alone and casts all state to the parameter's
dtype: 8-bit codes and fp32 moments of bf16 weights would be ruined. Here its state is kept out of that cast, and put
in place once every tensor of it fits; every error is raised before anything changes.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NoReturn

from torch import Tensor
from torch.optim import Optimizer

from galore_torch.galore_projector import GaLoreProjector
from galore_torch.optim.groups import check_group, check_same_geometry, parameter_name
from galore_torch.optim.state_layout import REMEDY, LayoutCache, TrialError, fit
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.units import first_of

WRAPPERS = re.compile(r"(?:^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.)")
"""What DDP, `torch.compile` and the like put into parameters' names."""

Groups = list[dict[str, Any]]


def load_uncast(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    load: Callable[[dict[str, Any]], None],
    trained_in: Callable[[Groups], list[TrainedWeight]],
) -> None:
    """Loads groups and hooks as torch does, and the state in the dtypes that the optimizer asks for.

    Where both sides name all their parameters, these are matched by name, in whatever order; else by order. Tensors
    move to their parameter's device; what torch keeps on the CPU (`step`) stays. As in torch, tensors that are in place
    already are used, not copied.

    Args:
        optimizer: to load into.
        state_dict: the checkpoint.
        load: torch's own `load_state_dict`, bound to the optimizer.
        trained_in: the optimizer's weights, in order, as a step would see them in other groups.

    Raises:
        ValueError: a checkpoint that does not fit, before anything is changed; the message names the weight.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict is a {type(state_dict).__name__}; pass what state_dict() or torch.load returned")
    matched: dict[str, Any] = {}

    def take_state_out(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        _check_form(given)
        saved_groups = _in_our_order(optimizer.param_groups, given["param_groups"])
        # What a checkpoint does not say, as one of an older version, stays as it is here.
        both = zip(optimizer.param_groups, saved_groups, strict=True)
        groups = [{**group, **saved} for group, saved in both]
        matched["state"] = _fitting_state(optimizer.param_groups, saved_groups, given["state"], trained_in)
        return {**given, "state": {}, "param_groups": groups}

    def put_state_in(_: Optimizer) -> None:
        optimizer.state = defaultdict(dict, matched["state"])

    handles = (
        optimizer.register_load_state_dict_pre_hook(take_state_out),  # after the user's own
        optimizer.register_load_state_dict_post_hook(put_state_in, prepend=True),  # before the user's own
    )
    try:
        load(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def require_held(state: Mapping[Any, Any], groups: Groups, known: Callable[[Tensor], TrainedWeight | None]) -> None:
    """Checks that all weights which have a state have a place in the groups, by which it is saved.

    Args:
        state: of an optimizer.
        groups: its groups.
        known: what was known of a weight when it had a place.

    Raises:
        ValueError: one has none any more.
    """
    held = {id(weight) for group in groups for weight in group["params"]}
    lost = [weight for weight in state if isinstance(weight, Tensor) and id(weight) not in held]
    if lost:
        found = known(lost[0])
        name = found.name if found is not None else f"a weight of shape {tuple(lost[0].shape)}"
        raise ValueError(
            f"the optimizer has state of {name}, which is in no parameter group any more, so that it has no place in a "
            f"checkpoint ({len(lost)} such weights). Take their state away with them, "
            "optimizer.state.pop(weight), or put them back into a group"
        )


def _check_form(state_dict: Mapping[str, Any]) -> None:
    """Checks what must hold before anything else can be looked at."""
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, Sequence) or not all("params" in one for one in groups):
        raise ValueError("this is no optimizer's state: it needs 'state', and 'param_groups' with 'params'")
    for one in state.values():
        if isinstance(one, Mapping) and isinstance(one.get("projector"), GaLoreProjector):
            raise ValueError(
                "this optimizer state was saved by galore-torch 1.0: it holds pickled projectors, which cannot be "
                "resumed. Load the model's weights and start the optimizer anew, with a short warm-up: its bases are "
                "found again in the first step, and its moments within some hundred"
            )
    ids = Counter(chain.from_iterable(group["params"] for group in groups))
    twice = [str(one) for one, count in ids.items() if count > 1]
    lost = [str(one) for one in state if isinstance(one, int) and one not in ids]
    if twice or lost:
        wrong = (
            f"parameter {twice[0]} in two places" if twice else f"state of parameter {lost[0]}, which is in no group"
        )
        raise ValueError(f"the checkpoint is damaged: it has {wrong}. {REMEDY}")


def _in_our_order(groups: Groups, saved_groups: Groups) -> Groups:
    """The saved groups and their parameters in the order of ours: by name where both have names, else as they are."""
    ours, theirs = _named(groups), _named(saved_groups)
    if ours is None or theirs is None:
        _check_counts(groups, saved_groups)
        return saved_groups
    all_ours, all_theirs = set(chain.from_iterable(ours)), set(chain.from_iterable(theirs))
    if all_ours != all_theirs:
        lacking, foreign = first_of(sorted(all_ours - all_theirs)), first_of(sorted(all_theirs - all_ours))
        differences = [f"has no {lacking}"] * bool(lacking) + [
            f"has {foreign}, which the optimizer does not hold"
        ] * bool(foreign)
        raise ValueError(
            f"the checkpoint {' and '.join(differences)}. {REMEDY}; or, if the weights were only renamed, take "
            "'param_names' out of the checkpoint's groups: weights are then matched by their order"
        )
    left = list(zip(theirs, saved_groups, strict=True))
    found = []
    for index, names in enumerate(ours):
        place = next((at for at, (theirs_, _) in enumerate(left) if set(theirs_) == set(names)), None)
        if place is None:
            return _refuse_split(index, names, theirs)
        names_there, saved = left.pop(place)
        ids = dict(zip(names_there, saved["params"], strict=True))
        there = {"params": [ids[name] for name in names], "param_names": groups[index]["param_names"]}
        found.append({**saved, **there})
    return found


def _refuse_split(index: int, names: Sequence[str], theirs: Sequence[Sequence[str]]) -> NoReturn:
    nearest = max(theirs, key=lambda there: len(set(there) & set(names)))
    moved = first_of(sorted(set(names) - set(nearest)) or sorted(set(nearest) - set(names)))
    raise ValueError(
        f"parameter group {index} holds other weights than any group of the checkpoint: {moved} moved between groups "
        f"(other targets, perhaps, or another split for weight decay). {REMEDY}"
    )


def _named(groups: Groups) -> list[list[str]] | None:
    """The names in each group, as a model has them that nobody has wrapped; None unless all have one of their own."""
    named = []
    for group in groups:
        names = group.get("param_names", [] if not group["params"] else None)
        if not isinstance(names, (list, tuple)) or len(names) != len(group["params"]):
            return None
        named.append([WRAPPERS.sub("", str(name)) for name in names])
    everything = list(chain.from_iterable(named))
    return named if len(set(everything)) == len(everything) else None


def _check_counts(groups: Groups, saved_groups: Groups) -> None:
    ours, theirs = ([len(group["params"]) for group in some] for some in (groups, saved_groups))
    if ours != theirs:
        index = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
        index = min(len(theirs), len(ours) - 1) if index < 0 else index
        first = f", with {parameter_name(groups[index], 0)}" if groups[index]["params"] else ""
        raise ValueError(
            f"the checkpoint has parameter groups of {theirs} parameters, the optimizer of {ours} (they differ "
            f"first in group {index}{first}); build the groups as they were when it was saved"
        )


def _fitting_state(
    ours: Groups, saved_groups: Groups, saved: Mapping[Any, Any], trained_in: Callable[[Groups], list[TrainedWeight]]
) -> dict[Any, Any]:
    """The saved state under our parameters, each as its next step can use it."""
    for index, pair in enumerate(zip(ours, saved_groups, strict=True)):
        check_same_geometry(*pair, index)
    as_it_is = trained_in(ours)
    of_weights, others = {}, dict(saved)
    for key, trained in zip(chain.from_iterable(group["params"] for group in saved_groups), as_it_is, strict=True):
        if key in others:
            of_weights[id(trained.weight)] = state = others.pop(key)
            if not isinstance(state, Mapping):
                raise ValueError(f"the optimizer's state of {trained.name} is {state!r}, not a dictionary. {REMEDY}")
    held = [{**group, **there, "params": group["params"]} for group, there in zip(ours, saved_groups, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # given when the optimizer was made
        for group in held:
            check_group(group)
    try:
        return {**others, **_fit_all(of_weights, trained_in(held))}
    except (TrialError, TypeError, KeyError, IndexError) as error:  # values that nobody expected in a group
        _fit_all(of_weights, as_it_is)  # another optimizer's state is the first error
        raise ValueError(
            f"the values in the checkpoint's groups cannot be used, from {as_it_is[0].name} on: {error}. {REMEDY}"
        ) from error


def _fit_all(saved: Mapping[int, Any], trained: Sequence[TrainedWeight]) -> dict[Any, Any]:
    known: LayoutCache = {}
    return {one.weight: fit(saved[id(one.weight)], one, known) for one in trained if id(one.weight) in saved}
