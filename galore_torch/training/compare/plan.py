"""Which runs a comparison consists of: methods by learning rates by seeds under one recipe, at equal data."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galore_torch.training.compare.job import Amount, Job
from galore_torch.training.compare.settings import WHAT_DIFFERS, own_settings
from galore_torch.training.run.files import Lock, being_written, write_whole
from galore_torch.training.settings.methods import method_settings, refuse_unheeded

PLAN = "plan.json"
"""The plan's name in a comparison's folder."""


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
    def rates(self) -> str:
        """The learning rates as the folder has them."""
        others = "" if self.others_lr == self.lr else f"-others-{self.others_lr:g}"
        return f"lr-{self.lr:g}{others}"

    @property
    def folder(self) -> Path:
        """The run folder, below the comparison's."""
        return Path(self.method) / self.rates / f"seed-{self.seed}"

    @property
    def label(self) -> str:
        """The run in words."""
        return f"{self.method} {self.rates} seed {self.seed}"


def rates_by_method(option: str, given: Sequence[str], methods: Sequence[str]) -> dict[str, list[float | None]]:
    """Learning rates for each method from what was given: ``0.01`` for all, ``galore=0.01`` for one alone.

    Raises:
        ValueError: when a rate is no number above 0 or names a method that is not compared.

    >>> rates_by_method("lr", ["0.01", "galore=0.02"], ["full", "galore"])
    {'full': [0.01], 'galore': [0.02]}
    """
    own: dict[str, list[float | None]] = {method: [] for method in methods}
    shared: list[float | None] = []
    for text in given:
        method, found, number = text.rpartition("=")
        if found and method not in own:
            raise ValueError(f"{option} = {text!r} is for a method that is not compared; add --method {method}.")
        try:
            rate = float(number)
        except ValueError as error:
            raise ValueError(f"{option} = {text!r} is no number; give one, or METHOD=NUMBER.") from error
        (own[method] if found else shared).append(rate)
    return {method: list(dict.fromkeys(rates or shared or [None])) for method, rates in own.items()}


def make_plan(
    job: Job,
    preset: str | None,
    methods: Sequence[str],
    lrs: Sequence[str],
    others_lrs: Sequence[str],
    seeds: Sequence[int],
    given: Mapping[str, Any],
    sets: Sequence[str] = (),
) -> list[PlannedRun]:
    """All runs, in the order in which they are made; every setting is judged.

    Args:
        job: what the runs are of.
        preset: what they start from.
        methods: keys of `galore_torch.training.settings.methods.METHODS`.
        lrs: see `rates_by_method`; without any, the preset's.
        others_lrs: the same for what is never projected.
        seeds: of the runs.
        given: further settings by name, for all runs.
        sets: further settings for one method each, see `galore_torch.training.compare.settings.own_settings`.

    Raises:
        ValueError: when a setting does not fit.
    """
    for name in WHAT_DIFFERS:
        if given.get(name) is not None:
            raise ValueError(f"{name} = {given[name]!r} is what the methods differ in; choose them by --method.")
    methods = list(dict.fromkeys(methods))
    by_method = {method: method_settings(method) for method in methods}
    by_lr, by_others = rates_by_method("lr", lrs, methods), rates_by_method("others_lr", others_lrs, methods)
    own = own_settings(job, sets, methods)
    runs = []
    for method in methods:
        for lr, others, seed in itertools.product(by_lr[method], by_others[method], dict.fromkeys(seeds)):
            # As settings, not by the method's name: a flag for all, such as a rank, may say nothing to one of them.
            settings = {**by_method[method], **given, **own[method], "seed": seed, "lr": lr, "others_lr": others}
            try:
                config = job.configure(preset, **settings)
            except ValueError as error:
                raise ValueError(f"{error}{_hint(job, preset, str(error), given, by_method)}") from error
            optimizer = config.optimizer
            refuse_unheeded(method, own[method], optimizer, config.adapter)
            others_lr = optimizer.others_lr or optimizer.lr
            runs.append(PlannedRun(method, optimizer.lr, others_lr, seed, config, job.amount(config)))
    _require_equal_amounts(runs)
    return runs


def _hint(job: Job, preset: str | None, error: str, given: Mapping[str, Any], methods: Mapping[str, Any]) -> str:
    """What to add to an error about a setting for all runs that suits another method: that it can be that one's own."""
    name = error.partition(" ")[0]
    if name not in given:
        return ""
    for method, settings in methods.items():
        try:
            job.configure(preset, **{**settings, **given})
        except ValueError:
            continue
        return f" For one method alone, give it by --set {method}:{name}={given[name]}."
    return ""


def _require_equal_amounts(runs: Sequence[PlannedRun]) -> None:
    first = runs[0]
    for run in runs:
        if run.amount != first.amount:
            raise ValueError(
                f"set: {first.method} would see {first.amount} and {run.method} {run.amount}, and what saw more would "
                "look better; give both the same length and batch, or leave them out of --set."
            )


def _described(job: Job, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    return {
        "job": job.subcommand,
        "runs": {str(run.folder): dataclasses.asdict(run.config) for run in runs},
    }


def require_same_plan(path: Path, job: Job, runs: Sequence[PlannedRun], *, needed: bool = False) -> None:
    """Refuse a folder that was begun with other runs or other settings.

    Args:
        path: where the plan is kept.
        job: what the runs are of.
        runs: those that are asked for.
        needed: whether there must be a plan.

    Raises:
        ValueError: with what differs.
    """
    if not path.exists():
        folder = path.parent
        if needed:
            raise ValueError(f"out = {str(folder)!r} holds no comparison to report on; leave out --report-only.")
        begun = {*lock_of(folder).files, path, being_written(path), *map(being_written, lock_of(folder).files)}
        if folder.exists() and not begun.issuperset(folder.iterdir()):
            raise ValueError(f"out = {str(folder)!r} holds something else; choose another --out.")
        return
    kept, now = read_plan(path), _described(job, runs)
    differences = _differences(kept, now)
    if differences:
        raise ValueError(
            f"out = {str(path.parent)!r} was begun with another plan: {'; '.join(differences[:6])}. Give the same "
            "options, or choose another --out."
        )


def read_plan(path: Path) -> dict[str, Any]:
    """A comparison's plan, with the command by which it was begun.

    Raises:
        ValueError: when it is damaged.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        sections = [section for run in kept["runs"].values() for section in run.values()]
        whole = isinstance(kept["job"], str) and isinstance(kept["command"], str)
        whole = whole and all(isinstance(section, dict) for section in sections)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path} is damaged, and it says what is compared. Restore it from a copy, or choose another --out; "
            "finished runs in the folder stay as they are."
        )
    plan: dict[str, Any] = kept
    return plan


def _differences(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if kept["job"] != now["job"]:
        return [f"{kept['job']} instead of {now['job']}"]
    found = [f"{name} was planned" for name in kept["runs"] if name not in now["runs"]]
    found += [f"{name} was not planned" for name in now["runs"] if name not in kept["runs"]]
    for run in kept["runs"].keys() & now["runs"].keys():
        for section, values in now["runs"][run].items():
            before = kept["runs"][run].get(section, {})
            found += [f"{name} was {before.get(name)!r}" for name in values if values[name] != before.get(name)]
    return list(dict.fromkeys(found))


def write_plan(path: Path, job: Job, runs: Sequence[PlannedRun], command: str) -> bool:
    """Keep the plan, and by which command it was begun; False if there is one, which stays."""
    if path.exists():
        return False
    write_whole(path, json.dumps({**_described(job, runs), "command": command}, indent=1) + "\n")
    return True
