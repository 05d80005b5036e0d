"""Which runs a comparison consists of: methods by learning rates by seeds under one recipe, at equal data."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galore_torch.training.finetune.command import FINETUNE
from galore_torch.training.pretrain.command import PRETRAIN
from galore_torch.training.run.files import Lock, require_empty, write_whole
from galore_torch.training.run.job_command import Amount, JobCommand
from galore_torch.training.settings.config import sections_of
from galore_torch.training.settings.fields import field_names, require_once
from galore_torch.training.settings.methods import method_settings, refuse_without_any_effect, refuse_without_effect

JOBS = {job.name: job for job in (PRETRAIN, FINETUNE)}
"""What can be compared, by name; the first is meant where none is named."""

PLAN = "plan.json"
"""The plan's name in a comparison's folder."""

OF_RUNS = {"lr": "--lr METHOD=X", "others_lr": "--others-lr METHOD=X", "seed": "--seed N"}
"""Settings in which the runs of one method differ, and how they are given."""

_SHARED = ("model", "data")  # sections that all runs have in common, but for
_NOT_SHARED = {"dtype", "target_modules"}
_NOT_COMPARED = {
    **dict.fromkeys(("optim", "adapter"), "it is what the methods differ in; choose them by --method"),
    "early_stopping_patience": "methods are compared at equal length; leave it out",
    "push_to_hub": "the runs of a comparison stay here; push one of them by hf upload",
}


def lock_of(out: Path) -> Lock:
    """The lock of a comparison's folder."""
    return Lock(out / "compare.lock")


@dataclass(frozen=True)
class PlannedRun:
    """One run: what tells it from the others, its whole configuration, and how much it sees by that."""

    method: str
    lr: float
    others_lr: float
    seed: int
    config: Any
    amount: Amount

    @property
    def folder(self) -> Path:
        """The run folder, below the comparison's."""
        others = "" if self.others_lr == self.lr else f"-others-{self.others_lr:g}"
        return Path(self.method, f"lr-{self.lr:g}{others}", f"seed-{self.seed}")

    @property
    def label(self) -> str:
        """The run in words."""
        return " ".join(self.folder.parts).replace("seed-", "seed ")


def rates_by_method(option: str, given: Sequence[str], methods: Sequence[str]) -> dict[str, list[float | None]]:
    """Learning rates for each method from what was given: ``0.01`` for all, ``galore=0.01`` for one alone.

    >>> rates_by_method("lr", ["0.01", "galore=0.02"], ["full", "galore"])
    {'full': [0.01], 'galore': [0.02]}
    """
    rates: dict[str, list[float | None]] = {method: [] for method in ("", *methods)}
    for text in given:
        method, _, number = text.rpartition("=")
        _require_compared(f"{option} = {text!r}", method, rates)
        try:
            rates[method].append(float(number))
        except ValueError as error:
            raise ValueError(f"{option} = {text!r} is no number; give one, or METHOD=NUMBER.") from error
    for of_method in rates.values():
        require_once(option, of_method)
    return {method: rates[method] or rates[""] or [None] for method in methods}


def own_settings(job: JobCommand, given: Sequence[str], methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What each method sets for itself, from texts such as ``lora:adapter_rank=2``; its configuration judges them.

    >>> own_settings(PRETRAIN, ["lora:adapter-rank=2"], ["galore", "lora"])
    {'galore': {}, 'lora': {'adapter_rank': 2}}
    """
    own: dict[str, dict[str, Any]] = {method: {} for method in methods}
    sections = sections_of(job.presets.config)
    shared = {*field_names(*(sections[section] for section in _SHARED))} - _NOT_SHARED
    refused = {name: f"runs with another {name} cannot be compared; give it for all" for name in shared}
    refused |= {name: f"{name} has an option of its own; give {option}" for name, option in OF_RUNS.items()}
    refused |= _NOT_COMPARED
    for text in given:
        target, _, value = text.partition("=")
        method, _, name = target.partition(":")
        method, name, value, wrong = method.strip(), name.strip().replace("-", "_"), value.strip(), f"set = {text!r}"
        if not (method and name and value):
            raise ValueError(f"{wrong} is not METHOD:NAME=VALUE; give such as lora:adapter_rank=2.")
        _require_compared(wrong, method, own)
        if name in refused:
            raise ValueError(f"{wrong}: {refused[name]}.")
        if name in own[method]:
            raise ValueError(f"{wrong} sets {name} of {method} a second time; leave out one of them.")
        with suppress(ValueError):  # a word
            value = json.loads(value)
        own[method][name] = value
    return own


def _require_compared(given: str, method: str, methods: Iterable[str]) -> None:
    if method not in methods:
        raise ValueError(f"{given} is for a method that is not compared; add --method {method}.")


def make_plan(
    job: JobCommand,
    preset: str | None,
    methods: Sequence[str],
    lrs: Sequence[str],
    others_lrs: Sequence[str],
    seeds: Sequence[int],
    given: Mapping[str, Any],
    sets: Sequence[str] = (),
) -> list[PlannedRun]:
    """All runs, in the order in which they are made; a setting that does not fit is a ValueError.

    Args:
        job: what the runs are of.
        preset: what they start from.
        methods: keys of `galore_torch.training.settings.methods.METHODS`.
        lrs: see `rates_by_method`; without any, the preset's.
        others_lrs: the same for what is never projected.
        seeds: of the runs.
        given: further settings by name, for all runs.
        sets: further settings for one method each, see `own_settings`.
    """
    for name, why in _NOT_COMPARED.items():
        if given.get(name) is not None:
            raise ValueError(f"{name} = {given[name]!r}: {why}.")
    require_once("method", methods)
    require_once("seed", seeds)
    by_method = {method: method_settings(method) for method in methods}
    by_lr, by_others = rates_by_method("lr", lrs, methods), rates_by_method("others_lr", others_lrs, methods)
    own = own_settings(job, sets, methods)
    runs = []
    for method in methods:
        for lr, others, seed in itertools.product(by_lr[method], by_others[method], seeds):
            # As settings, not by the method's name: a flag for all, such as a rank, may have no effect on one of them.
            settings = {**by_method[method], **given, **own[method], "seed": seed, "lr": lr, "others_lr": others}
            try:
                config = job.presets.configure(preset, **settings)
            except ValueError as error:
                raise ValueError(f"{error}{_hint(job, preset, str(error), given, by_method)}") from error
            refuse_without_effect(method, own[method], config.optimizer, config.adapter)
            lr, others = config.optimizer.lr, config.optimizer.others_lr or config.optimizer.lr
            runs.append(PlannedRun(method, lr, others, seed, config, job.amount(config)))
    refuse_without_any_effect(given, {run.method: run.config for run in runs})
    first = runs[0]
    for run in runs:
        if run.amount != first.amount:
            raise ValueError(
                f"set: {first.method} would see {first.amount} and {run.method} {run.amount}, and what saw more would "
                "look better; give both the same length and batch, or leave them out of --set."
            )
    return runs


def _hint(job: JobCommand, preset: str | None, error: str, given: Mapping[str, Any], methods: Mapping[str, Any]) -> str:
    """What to add to an error about a setting for all runs that suits another method: that it can be that one's own."""
    name = error.partition(" ")[0]
    for method, settings in methods.items() if name in given else ():
        with suppress(ValueError):
            job.presets.configure(preset, **{**settings, **given})
            return f" For one method alone, give it by --set {method}:{name}={given[name]}."
    return ""


def require_same_plan(path: Path, job: JobCommand, runs: Sequence[PlannedRun], *, needed: bool = False) -> None:
    """Refuse a folder that was begun with other runs or settings, which the ValueError names.

    Args:
        path: where the plan is kept.
        job: what the runs are of.
        runs: those that are asked for.
        needed: whether there must be a plan.
    """
    out = f"out = {str(path.parent)!r}"
    if path.exists():
        found = _differences(read_plan(path), _described(job, runs))
        if found:
            given = "Give the same options, or choose another --out."
            raise ValueError(f"{out} was begun with another plan: {'; '.join(found[:6])}. {given}")
    elif needed:
        raise ValueError(f"{out} holds no comparison to report on; leave out --report-only.")
    else:
        require_empty(path.parent, (path, *lock_of(path.parent).files))


def keep_plan(path: Path, job: JobCommand, runs: Sequence[PlannedRun], command: str) -> bool:
    """Write the plan, with the command by which it is begun; False if there is the same already, which stays."""
    require_same_plan(path, job, runs)
    new = not path.exists()
    if new:
        write_whole(path, json.dumps({**_described(job, runs), "command": command}, indent=1) + "\n")
    return new


def read_plan(path: Path) -> dict[str, Any]:
    """A comparison's plan, with the command by which it was begun; a damaged one is a ValueError."""
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _differences(plan, plan)
        shlex.split(plan["command"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged, and it says what is compared. Restore it from a copy, or choose another --out; "
            "finished runs in the folder stay as they are."
        ) from error
    return plan


def _described(job: JobCommand, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    return {"job": job.name, "runs": {str(run.folder): dataclasses.asdict(run.config) for run in runs}}


def _differences(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if kept["job"] != now["job"]:
        return [f"{kept['job']} instead of {now['job']}"]
    found = [f"{name} was planned" for name in kept["runs"] if name not in now["runs"]]
    found += [f"{name} was not planned" for name in now["runs"] if name not in kept["runs"]]
    for run in kept["runs"].keys() & now["runs"].keys():
        for section, values in now["runs"][run].items():
            before = dict(kept["runs"][run].get(section, {}))
            found += [f"{name} was {before.get(name)!r}" for name in values if values[name] != before.get(name)]
    return list(dict.fromkeys(found))
