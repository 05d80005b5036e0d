"""The configuration of a job: sections of settings, from a preset, a file, a method and single flags; and its file."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import tomli_w

from galore_torch.training.settings.adapter import AdapterConfig, resolved
from galore_torch.training.settings.fields import Purpose, field_names, settings, suggest
from galore_torch.training.settings.methods import over_file, refuse_without_effect
from galore_torch.training.settings.optimizer import KINDS, UNKNOWN, OptimizerConfig, missing_library
from galore_torch.values import largest_divisor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECTED, FULL_RANK = "projected", "full rank"

T = TypeVar("T")
C = TypeVar("C", bound="TrainConfig")


@settings
class TrainConfig:
    """All that decides a training's outcome: `model`, `data` and `schedule` are the job's own sections."""

    model: Any
    data: Any
    optimizer: OptimizerConfig
    adapter: AdapterConfig
    schedule: Any

    doing: ClassVar[str]  # what it is the configuration of, for messages

    def __post_init__(self) -> None:
        adapter = resolved(self.adapter, rank=self.optimizer.rank, steps=self.schedule.steps or 1)
        object.__setattr__(self, "adapter", adapter)
        _check_adapter(self.adapter, self.optimizer)
        if self.schedule.batch % self.micro_batch:
            raise ValueError(
                f"micro_batch = {self.micro_batch} does not divide batch = {self.schedule.batch}; choose a divisor."
            )
        _check_modes(self.optimizer, self.schedule.batch, self.micro_batch)

    def require_there(self, to: Purpose = "train") -> None:
        """Refuse, with an ImportError, to train by an optimizer whose library is missing."""
        missing = missing_library(self.optimizer.optim, self.optimizer.others_bits)
        if to == "train" and missing is not None:
            raise ImportError(missing)

    @property
    def micro_batch(self) -> int:
        """Sequences or rows at once."""
        return int(self.schedule.micro_batch or self.schedule.batch)

    @property
    def title(self) -> str:
        """What is trained in a word or two: the optimizer's name, after the adapter's if there is one."""
        adapter, optim = self.adapter.adapter, self.optimizer.optim
        return optim if adapter == "none" else f"{adapter}-{optim}"

    def to_toml(self) -> str:
        """The whole configuration as TOML, which `read_file` reads back. A setting that is None is left out."""
        plain = {
            section: {name: value for name, value in values.items() if value is not None}
            for section, values in dataclasses.asdict(self).items()
        }
        return tomli_w.dumps(plain)


def _check_modes(optimizer: OptimizerConfig, batch: int, micro_batch: int) -> None:
    """Refuse forms of gradients that exclude each other; the rules are those of `galore_torch.attach`."""
    from galore_torch.modes import check_modes

    modes = (optimizer.gradients, optimizer.update)
    check_modes(
        *modes, grad_bits=optimizer.grad_bits, save_inputs=optimizer.save_inputs, max_grad_norm=optimizer.max_grad_norm
    )
    try:
        check_modes(*modes, gradient_accumulation_steps=batch // micro_batch)
    except ValueError as error:
        raise ValueError(
            f"micro_batch = {micro_batch} is a part of batch = {batch}: {error}. Or give both the same value."
        ) from error


def _check_adapter(adapter: AdapterConfig, optimizer: OptimizerConfig) -> None:
    """Refuse an optimizer's settings that train the whole matrices or move weights where an adapter cannot follow."""
    if adapter.adapter == "none":
        return
    if KINDS[optimizer.optim].projected:
        full_rank = ", ".join(name for name, kind in KINDS.items() if not kind.projected)
        raise ValueError(
            f"adapter = {adapter.adapter!r} and optim = {optimizer.optim!r}, which projects what has a low rank "
            f"already; choose one of {full_rank} (method = {adapter.adapter!r} does), or adapter = 'none'."
        )
    if optimizer.update == "backward":
        raise ValueError(
            f"update = 'backward' and adapter = {adapter.adapter!r}, whose few gradients wait for the step; leave out "
            "one of them."
        )
    if adapter.adapter == "relora" and 0 < adapter.restart_prune < 1 and not KINDS[optimizer.optim].prunable:
        raise ValueError(
            f"restart_prune = {adapter.restart_prune} would pick numbers from the state of optim = "
            f"{optimizer.optim!r}, which does not keep them one by one; give restart_prune = 1."
        )


def sections_of(config: type) -> dict[str, type]:
    """The dataclass of each section of a configuration, by its name in TOML. No two share a setting's name."""
    hints = typing.get_type_hints(config)
    return {name: hints[name] for name in field_names(config)}


def from_values(config: type[T], values: Mapping[str, Any]) -> T:
    """Make a configuration from settings by name, whatever their section.

    Raises:
        ValueError: when a name is unknown or a value is not allowed.
    """
    sections = sections_of(config)
    home = {name: section for section, kind in sections.items() for name in field_names(kind)}
    given: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for name, value in values.items():
        if name not in home:
            doing = config.doing  # type: ignore[attr-defined]
            raise ValueError(f"{name} = {value!r} is no setting of {doing}; {suggest(name, home)}")
        given[home[name]][name] = value
    return config(**{section: kind(**given[section]) for section, kind in sections.items()})


def read_file(config: type, path: Path) -> tuple[str | None, dict[str, Any]]:
    """What a TOML file gives: the ``preset`` that it names before its sections, if any, and the settings by name.

    Raises:
        ValueError: when the file cannot be read or a setting stands in the wrong section.
    """
    kinds, sections = sections_of(config), read_toml(path)
    preset = sections.pop("preset", None)
    values: dict[str, Any] = {}
    for section, given in sections.items():
        if section not in kinds or not isinstance(given, dict):
            known = ", ".join(f"[{name}]" for name in kinds)
            raise ValueError(f"{section} = {given!r} in {path} is no section; settings stand under {known}.")
        known_names = field_names(kinds[section])
        for name, value in given.items():
            if name not in known_names:
                raise ValueError(
                    f"{name} = {value!r} in {path} is no setting of [{section}]; {suggest(name, known_names)}"
                )
        values |= given
    return preset, values


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ValueError: when it cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file by a mark
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(
            f"config = {str(path)!r} cannot be read as TOML: {error}. Give a readable TOML file."
        ) from error


def what_trains(optim: str, adapter: str) -> str:
    """`PROJECTED`, `FULL_RANK` or the adapter's name: by this presets choose their learning rates."""
    return adapter if adapter != "none" else PROJECTED if KINDS.get(optim, UNKNOWN).projected else FULL_RANK


@dataclass(frozen=True, kw_only=True)
class PresetTable(Generic[C]):
    """The presets of a job, by name."""

    config: type[C]  # what they are presets of
    presets: Mapping[str, Mapping[str, Any]]  # settings of each; what one leaves out has the setting's own default
    default: Callable[[Mapping[str, Any]], str]  # the preset of settings by name, where nobody names one
    # What a preset sets besides, by its name, the optimizer's and all settings; and its peak learning rates, for what
    # trains, and for optimizers of updates of fixed size by name.
    besides: Callable[[str, str, Mapping[str, Any]], Mapping[str, Any]]
    rates: Mapping[str, Mapping[str, Mapping[str, float]]]

    def configure(
        self,
        preset: str | None = None,
        file: Path | Mapping[str, Any] | None = None,
        *,
        method: str | None = None,
        **given: Any,
    ) -> C:
        """A preset, overridden by a TOML file, by a method and by settings by name.

        A method brings the preset's learning rates for it: the file's were for what the file trains.

        Args:
            preset: a key of `presets`; if None, what the file names as ``preset``, or the default.
            file: a TOML file with sections, such as a run folder's ``config.toml``, or its settings by name.
            method: a key of `galore_torch.training.settings.methods.METHODS`.
            given: settings by name, such as ``rank=256``; those that are None are not given.

        Returns:
            The whole configuration, with the learning rates that the preset has for what is trained.

        Raises:
            ValueError: when the preset, the method, a setting or a value is not known or not allowed.

        Example:
            >>> from galore_torch.training.finetune import presets as finetune
            >>> from galore_torch.training.pretrain import presets as pretrain
            >>> pretrain.configure("llama-60m", steps=500).optimizer.lr
            0.01
            >>> pretrain.configure("llama-60m", method="full").optimizer.lr
            0.001
            >>> config = finetune.configure(task="cola", method="lora")
            >>> config.schedule.batch, config.optimizer.lr, config.adapter.adapter_rank
            (32, 0.0005, 4)
        """
        flags = {name: value for name, value in given.items() if value is not None}
        named, values = read_file(self.config, file) if isinstance(file, Path) else (None, file or {})
        chosen = over_file(values, method, flags)
        preset = named if preset is None else preset
        preset = self.default(chosen) if preset is None else preset
        if preset not in self.presets:
            raise ValueError(f"preset = {preset!r} is not known; choose one of {', '.join(self.presets)}.")
        start = {**self.presets[preset], **chosen}
        optim, adapter = str(start.get("optim", "galore-adamw")), str(start.get("adapter", "none"))
        kind = KINDS.get(optim, UNKNOWN)
        trains = optim if adapter == "none" and kind.fixed_size else what_trains(optim, adapter)
        rates = {} if "lr" in chosen else self.rates[preset].get(trains, {})
        values = {**self.presets[preset], **kind.defaults, **self.besides(preset, optim, start), **rates, **chosen}
        at_once = values.get("micro_batch", sections_of(self.config)["schedule"].micro_batch)  # type: ignore[attr-defined]
        if isinstance(chosen.get("batch"), int) and "micro_batch" not in chosen and at_once:  # a bound of memory
            values["micro_batch"] = largest_divisor(chosen["batch"], at_once)
        config = from_values(self.config, values)
        if "lr" not in {**rates, **chosen}:
            raise ValueError(f"preset = {preset!r} has no learning rate for {trains}; give --lr.")
        refuse_without_effect(method, flags, config.optimizer, config.adapter)
        return config
