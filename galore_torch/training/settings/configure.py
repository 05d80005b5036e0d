"""How a configuration is put together: a preset, overridden by a file, by a method and by single flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from galore_torch.training.settings.config import TrainConfig, from_values, read_file
from galore_torch.training.settings.methods import over_file, refuse_without_effect
from galore_torch.training.settings.optimizer import is_of_fixed_size, is_projected, own_defaults

PROJECTED, FULL_RANK = "projected", "full rank"

C = TypeVar("C", bound=TrainConfig)


def what_trains(optim: str, adapter: str) -> str:
    """`PROJECTED`, `FULL_RANK` or the adapter's name: by this presets choose their learning rates."""
    return adapter if adapter != "none" else PROJECTED if is_projected(optim) else FULL_RANK


@dataclass(frozen=True, kw_only=True)
class PresetTable(Generic[C]):
    """The presets of a job.

    Attributes:
        config: what they are presets of.
        presets: settings of each by name; what one leaves out has the setting's own default.
        default: the preset of settings by name, where nobody names one.
        besides: what a preset sets besides, by the optimizer's name, the adapter's and all other settings.
        rates: peak learning rates of a preset, for what trains, and for optimizers of updates of fixed size by name.
    """

    config: type[C]
    presets: Mapping[str, Mapping[str, Any]]
    default: Callable[[Mapping[str, Any]], str]
    besides: Callable[[str, str, Mapping[str, Any]], Mapping[str, Any]]
    rates: Mapping[str, Mapping[str, Mapping[str, float]]]

    def configure(self, preset: str | None, file: Path | None, method: str | None, given: Mapping[str, Any]) -> C:
        """A preset, overridden by a TOML file, by a method and by settings by name; what is None is not given.

        A method brings the preset's learning rates for it: the file's were for what the file trains.

        Args:
            preset: a key of `presets`; if None, what the file names as ``preset``, or the default.
            file: a TOML file with sections, such as a run folder's ``config.toml``.
            method: a key of `galore_torch.training.settings.methods.METHODS`.
            given: settings by name, such as ``rank=256``.

        Returns:
            The whole configuration, with the learning rates that the preset has for what is trained.

        Raises:
            ValueError: when the preset, the method, a setting or a value is not known or not allowed.
        """
        flags = {name: value for name, value in given.items() if value is not None}
        named, values = (None, {}) if file is None else read_file(self.config, file)
        chosen = over_file(values, method, flags)
        preset = preset or named or self.default(chosen)
        if preset not in self.presets:
            raise ValueError(f"preset = {preset!r} is not known; choose one of {', '.join(self.presets)}.")
        start = {**self.presets[preset], **chosen}
        optim, adapter = str(start.get("optim", "galore-adamw")), str(start.get("adapter", "none"))
        trains = optim if adapter == "none" and is_of_fixed_size(optim) else what_trains(optim, adapter)
        rates = {} if "lr" in chosen else self.rates[preset].get(trains, {})
        config = from_values(
            self.config,
            {**self.presets[preset], **own_defaults(optim), **self.besides(preset, optim, start), **rates, **chosen},
        )
        if "lr" not in {**rates, **chosen}:
            raise ValueError(f"preset = {preset!r} has no learning rate for {trains}; give --lr.")
        refuse_without_effect(method, flags, config.optimizer, config.adapter)
        return config
