"""Methods: the paper's and its baselines, each a named set of settings, so that one word chooses a row of its tables.

A method stands between a preset or a file and single flags: it overrides the first, and they override it. It says what
is trained and how gradients are formed and applied; the model, the text, the length and the rank are the preset's, and
so are the learning rates that it has for the method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from galore_torch.training.settings import optimizer as of_optimizer
from galore_torch.training.settings.adapter import ADAPTERS_WITH, Adapter, AdapterConfig
from galore_torch.training.settings.fields import field_names, suggest
from galore_torch.training.settings.optimizer import KINDS, UNKNOWN, OptimizerConfig

# Said by every method, for a file may say otherwise.
_AS_USUAL: dict[str, Any] = {"adapter": "none", "gradients": "full", "update": "step", "weight_bits": 16}

# Of each the optimizer, whose own defaults it has; what it is, in a line, and where it comes from.
_AT_THE_STEP = {
    "full": ("adamw", "every weight by AdamW (GaLore, arXiv 2403.03507, table 2)"),
    "adam8bit": ("adamw8bit", "full, with AdamW's state in 8 bits (arXiv 2403.03507, table 3; 2110.02861)"),
    "adafactor": ("adafactor", "full, by Adafactor (arXiv 2403.03507, figure 3; 1804.04235)"),
    "low-rank": ("adamw", "matrices W = B A of low rank, by AdamW (arXiv 2403.03507, table 2)"),
    "lora": ("adamw", "frozen matrices plus trained B A (arXiv 2106.09685; 2403.03507, table 2)"),
    "relora": ("adamw", "lora that is merged and begun again (arXiv 2307.05695; 2403.03507, table 2)"),
    "galore": ("galore-adamw", "every weight by AdamW, in subspaces of low rank (arXiv 2403.03507, table 2)"),
    "galore-8bit": ("galore-adamw8bit", "galore, with its state in 8 bits (arXiv 2403.03507, table 3)"),
    "galore-adafactor": ("galore-adafactor", "galore, by Adafactor (arXiv 2403.03507, figure 3)"),
    "galore-muon": ("galore-muon", "galore with one momentum, orthogonalized with the whole gradient (docs: study)"),
    "qgalore": ("qgalore-adamw8bit", "galore-8bit with INT8 weights, INT4 bases and lazy renewal (arXiv 2407.08296)"),
}
_FURTHER = {name: {"adapter": name} for name in get_args(Adapter)} | {"qgalore": {"weight_bits": 8}}
# Which are also done inside the backward, and where that comes from.
_PER_LAYER = dict.fromkeys(("full", "adam8bit", "galore", "galore-8bit", "qgalore"), "")
_PER_LAYER |= {"full": " (arXiv 2306.09782)", "galore": " (arXiv 2403.03507, section 4.3)"}

METHODS: dict[str, dict[str, Any]] = {
    name: {**_AS_USUAL, "optim": optim, **KINDS[optim].defaults, **_FURTHER.get(name, {})}
    for name, (optim, _) in _AT_THE_STEP.items()
}
"""Settings of each method by its name."""

HELP: dict[str, str] = {name: line for name, (_, line) in _AT_THE_STEP.items()}
"""What each method is, in a line, and where it comes from."""

for _name, _source in _PER_LAYER.items():
    # Nothing is left to clip.
    METHODS[f"{_name}-per-layer"] = {**METHODS[_name], "update": "backward", "max_grad_norm": 0.0}
    HELP[f"{_name}-per-layer"] = f"{_name}, each weight moved inside the backward{_source}"

TUNING = tuple(name for name, settings in METHODS.items() if settings["adapter"] != "low-rank")
"""Those that keep what a model has learnt, so that it can be fine-tuned by them."""


def method_settings(method: str | None) -> dict[str, Any]:
    """The settings of a method; none for None.

    Raises:
        ValueError: when there is no such method.

    >>> method_settings("lora")["adapter"]
    'lora'
    """
    if method is None:
        return {}
    if method not in METHODS:
        raise ValueError(f"method = {method!r} is not known; {suggest(method, METHODS, repr)}")
    return METHODS[method]


def over_file(values: Mapping[str, Any], method: str | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """A file's settings, overridden by a method and by single flags.

    Args:
        values: the file's settings by name. Its learning rates and its optimizer's own defaults give way to a method:
            they suited what the file trains.
        method: a key of `METHODS`, or None.
        flags: single settings by name.

    Raises:
        ValueError: when there is no such method.

    >>> over_file({"lr": 0.1, "optim": "sgd"}, "full", {"rank": 8})["optim"]
    'adamw'
    """
    chosen = method_settings(method)
    if flags.get("optim", chosen.get("optim")) != chosen.get("optim"):  # whose own defaults it does not have
        chosen = {name: value for name, value in chosen.items() if name not in KINDS[chosen["optim"]].defaults}
    own = KINDS.get(str(values.get("optim")), UNKNOWN).defaults
    suited = {"lr", "others_lr", *(name for name, value in own.items() if values.get(name) == value)}
    kept = {name: value for name, value in values.items() if not (chosen and name in suited)}
    return {**kept, **chosen, **flags}


def has_effect(name: str, optimizer: OptimizerConfig, adapter: AdapterConfig) -> bool:
    """Whether a setting, such as ``update_proj_gap``, has an effect on what is trained in this way.

    >>> has_effect("update_proj_gap", OptimizerConfig(optim="adamw"), AdapterConfig())
    False
    """
    if name in field_names(AdapterConfig):
        return adapter.adapter in ADAPTERS_WITH.get(name, (adapter.adapter,))
    by_adapter = name == "rank" and adapter.adapter != "none"  # whose rank it is by default
    return by_adapter or of_optimizer.has_effect(name, optimizer.optim)


def refuse_without_effect(
    method: str | None, given: Mapping[str, Any], optimizer: OptimizerConfig, adapter: AdapterConfig
) -> None:
    """Refuse single flags that have no effect with a named method.

    Args:
        method: its name; None refuses nothing, for flags may then be shared by runs that are compared.
        given: the single flags by name.
        optimizer: the optimizer's settings, as resolved.
        adapter: the adapter's settings, as resolved.

    Raises:
        ValueError: with the setting, its value and the optimizers that it has an effect on.
    """
    for name, value in given.items() if method is not None else ():
        if not has_effect(name, optimizer, adapter):
            also = ", or a method with an adapter" if name == "rank" else ""
            raise ValueError(
                f"{name} = {value!r} has no effect with method = {method!r} (optim = {optimizer.optim!r}); leave it "
                f"out, or use it with {', '.join(of_optimizer.optimizers_with(name))}{also}."
            )


def refuse_without_any_effect(given: Mapping[str, Any], configs: Mapping[str, Any]) -> None:
    """Refuse single flags that have an effect on none of the methods that share them.

    Args:
        given: the flags by name.
        configs: of each method by its name, with ``optimizer`` and ``adapter``.

    Raises:
        ValueError: as `refuse_without_effect` has it, of the first method.
    """
    method, first = next(iter(configs.items()))
    for name, value in given.items():
        if not any(has_effect(name, one.optimizer, one.adapter) for one in configs.values()):
            refuse_without_effect(method, {name: value}, first.optimizer, first.adapter)


def help_text(names: Iterable[str] = METHODS) -> str:
    """Methods with their lines of help, as the end of a command's ``--help``."""
    lines = [f"{name}  [dim]{HELP[name]}[/]" for name in names]
    return "\n\n".join(["[bold]Methods[/]", *lines]) + "\n"
