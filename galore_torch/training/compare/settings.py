"""Settings of one method of a comparison, beside those that all runs have: ``--set METHOD:NAME=VALUE``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from galore_torch.training.compare.job import Job
from galore_torch.training.settings.adapter import heeded_by
from galore_torch.training.settings.fields import plain_type, typed_fields
from galore_torch.training.settings.methods import heeds
from galore_torch.training.settings.sections import suggest

WHAT_DIFFERS = ("optim", "adapter")
"""The methods' own settings; another value would make it another method."""

_OPTIONS = {"lr": "--lr METHOD=X", "others_lr": "--others-lr METHOD=X", "seed": "--seed N"}
_TRUTH = {"true": True, "false": False}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


def own_settings(job: Job, given: Sequence[str], methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What each method sets for itself.

    Args:
        job: what the runs are of.
        given: texts such as ``lora:adapter_rank=2``.
        methods: those that are compared.

    Returns:
        Settings by name for each method, whose ranges the method's configuration is still to judge.

    Raises:
        ValueError: when a text has another form, names a method that is not compared or a setting that there is not,
            or one that is no method's own, or when its value is of the wrong type.

    >>> from galore_torch.training.compare.job import PRETRAIN
    >>> own_settings(PRETRAIN, ["lora:adapter-rank=2"], ["galore", "lora"])
    {'galore': {}, 'lora': {'adapter_rank': 2}}
    """
    own: dict[str, dict[str, Any]] = {method: {} for method in methods}
    kinds = {field.name: plain_type(hint) for kind in job.sections.values() for field, hint in typed_fields(kind)}
    for text in given:
        target, equals, value = text.partition("=")
        method, colon, name = (part.strip() for part in target.partition(":"))
        name = name.replace("-", "_")
        if not (method and colon and name and equals and value):
            raise ValueError(f"set = {text!r} does not say METHOD:NAME=VALUE; give such as lora:adapter_rank=2.")
        if method not in own:
            raise ValueError(f"set = {text!r} is for a method that is not compared; add --method {method}.")
        if name not in kinds:
            raise ValueError(f"set = {text!r}: {name} is no setting of {job.doing}; {suggest(name, kinds)}")
        _refuse_common(job, text, name)
        if name in own[method]:
            raise ValueError(f"set = {text!r} sets {name} of {method} a second time; leave out one of them.")
        own[method][name] = _typed(text, value.strip(), kinds[name])
    return own


def _refuse_common(job: Job, text: str, name: str) -> None:
    if name in WHAT_DIFFERS:
        raise ValueError(f"set = {text!r}: {name} is what the methods differ in; choose them by --method.")
    if name in _OPTIONS:
        raise ValueError(f"set = {text!r}: {name} has an option of its own; give {_OPTIONS[name]}.")
    if name in job.shared:
        option = f"--{name.replace('_', '-')}"
        raise ValueError(f"set = {text!r}: runs with another {name} cannot be compared; give {option} for all.")


def _typed(text: str, value: str, kind: type) -> Any:
    if kind is str:
        return value
    try:
        return _TRUTH[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError) as error:
        raise ValueError(f"set = {text!r}: {value!r} is not {_WORDS[kind]}; give one.") from error


def apart_and_shared(configs: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What tells methods from one another, and what they have in common.

    Args:
        configs: a configuration of each method.

    Returns:
        Of each setting that differs or that not all methods heed, its value by method; and all others that are set.
        Learning rates and seeds are in neither: runs of one method differ in them.
    """
    flat = {method: _flat(config) for method, config in configs.items()}
    apart: dict[str, dict[str, Any]] = {}
    shared: dict[str, Any] = {}
    for name in dict.fromkeys(name for values in flat.values() for name in values):
        values = {method: of[name] for method, of in flat.items() if name in of}
        if set(values.values()) == {None}:
            continue
        if len(values) < len(flat) or len(set(values.values())) > 1:
            apart[name] = values
        else:
            shared[name] = next(iter(values.values()))
    return apart, shared


def _flat(config: Any) -> dict[str, Any]:
    """All settings that the configuration heeds, but for learning rates and the seed."""
    known = {name: value for section in dataclasses.asdict(config).values() for name, value in section.items()}
    return {
        name: value
        for name, value in known.items()
        if name not in _OPTIONS
        and heeds(name, config.optimizer, config.adapter)
        and heeded_by(config.adapter.adapter, name)
        and not (name == "rank" and config.adapter.adapter != "none")  # adapter_rank tells
    }
