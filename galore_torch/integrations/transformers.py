"""GaLore with forms of gradients, through Transformers' Trainer and what is built on it.

`Trainer(optim="galore_adamw")` works without this file. It is for what Trainer's own names do not offer: any recipe and
all of its arguments, `attach` and so gradients that are projected or never formed, with accumulation, clipping,
schedules and checkpoints of one real optimizer.

    Trainer(..., optimizer_cls_and_kwargs=(GaLoreFactory, {"rank": 128, "gradients": "fused"}))

Trainers that do not hand that argument on (TRL's, but for SFTTrainer and RewardTrainer) take the mixin:

    class GaLoreDPOTrainer(GaLoreTrainerMixin, DPOTrainer):
        galore = {"rank": 128, "gradients": "fused"}

Both take the learning rate, decay, betas and epsilon from the training arguments where they are not given.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from galore_torch.gradients.attachment import attach, detach
from galore_torch.messages import did_you_mean, warn
from galore_torch.modes import DEFAULT_GRADIENTS, DEFAULT_UPDATE, Gradients, Update, check_modes
from galore_torch.optim import GaLore, GaLoreAdamW
from galore_torch.targets import param_groups

_OF_GROUPS = frozenset(inspect.signature(param_groups).parameters) - {"model", "rank", "weight_decay"}
_OF_ATTACH = frozenset(inspect.signature(attach).parameters) - {"model", "optimizer", "gradients", "update"}

_SEARCHED = {
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
}
"""Training arguments of an optimizer, and their names here."""


class GaLoreFactory:
    """Makes a GaLore optimizer for a model and attaches it: for `Trainer(optimizer_cls_and_kwargs=...)`.

    Trainer makes one without arguments and calls it with the model.

    Example:
        >>> model = nn.ModuleDict({"attn": nn.Linear(32, 32), "mlp": nn.Linear(32, 64)})
        >>> optimizer = GaLoreFactory()(model, rank=4, lr=0.01, gradients="projected", update_proj_gap=100)
        >>> optimizer.param_groups[0]["update_proj_gap"]
        100
    """

    def __new__(cls, *groups: Any, **arguments: Any) -> Any:
        """Makes one, or the optimizer itself for a Trainer that knows no factories: it calls it as an optimizer is.

        Args:
            *groups: what that Trainer (of Transformers 5.0) has put into groups of its own.
            **arguments: of `__call__`.

        Raises:
            ValueError: arguments that no trainer gave.
        """
        if not groups and not arguments:
            return super().__new__(cls)
        self = _calling_trainer()  # `__call__` looks for it by this name
        if self is None:
            raise ValueError("GaLoreFactory takes no arguments; call what it makes: GaLoreFactory()(model, rank=128)")
        return cls()(self.model, **arguments)

    def __call__(
        self,
        model: nn.Module,
        *,
        rank: int | None = None,
        optimizer: Callable[..., GaLore] = GaLoreAdamW,
        gradients: Gradients | None = None,
        update: Update = DEFAULT_UPDATE,
        group_weight_decay: float | None = None,
        **arguments: Any,
    ) -> GaLore:
        """Makes the optimizer.

        Called by a trainer, it takes from the training arguments what is not given here: `lr` (`learning_rate`),
        `weight_decay`, `betas` and `eps`, as far as the recipe has them; so a search over them reaches each trial. And
        it trains the parameters of a trainer's `loss` that the model does not have, without projection.

        Args:
            model: where it will be trained.
            rank: rank of the projection; needed.
            optimizer: a recipe, or `GaLore`, which takes `optimizer_class` among the arguments.
            gradients: how they are formed; see `attach`, which chooses when None.
            update: when they are applied; see `attach`.
            group_weight_decay: decay of matrices alone; see `param_groups`' `weight_decay`.
            **arguments: all others of `param_groups` (`target_modules`, `others_lr`, `summary` and the keys of the
                projected groups), of `attach`, and the recipe's own.

        Returns:
            The optimizer, attached to the model.

        Raises:
            ValueError: no `rank` or `lr`, an argument that nothing takes, or one that cannot be right.
        """
        trainer = _calling_trainer()
        if not callable(optimizer) or (isinstance(optimizer, type) and not issubclass(optimizer, GaLore)):
            what = optimizer.__name__ if callable(optimizer) else f"a {type(optimizer).__name__}"
            raise ValueError(
                f"optimizer is {what}; pass a recipe itself, such as GaLoreAdamW, or GaLore, which takes "
                "optimizer_class among the arguments"
            )
        known = _arguments_of(optimizer, arguments)
        taken = {*_OF_GROUPS, *_OF_ATTACH, *known, *inspect.signature(self.__call__).parameters}
        for name, value in arguments.items():
            if name not in taken and None not in known:
                names = sorted(str(one) for one in taken - {"model", "arguments"})
                raise ValueError(
                    f"{name}={value!r}: GaLoreFactory takes no argument named so; {did_you_mean(name, names)}"
                )
        if rank is None:
            raise ValueError('GaLoreFactory got no rank; give one, such as {"rank": 128}')
        if trainer is not None:
            _report_ignored(trainer, arguments)
            check_modes(
                gradients or DEFAULT_GRADIENTS,
                update,
                gradient_accumulation_steps=trainer.args.gradient_accumulation_steps,
                max_grad_norm=trainer.args.max_grad_norm or 0.0,
            )
            arguments = {**_from_training_arguments(trainer.args, known, group_weight_decay), **arguments}
        if "lr" not in arguments:
            raise ValueError(
                "GaLoreFactory got no lr, and there are no training arguments to take it from; give one, such as "
                '{"rank": 128, "lr": 0.01}'
            )
        of_groups = {name: arguments[name] for name in _OF_GROUPS & arguments.keys()}
        arguments = {name: value for name, value in arguments.items() if name not in _OF_GROUPS or name in known}
        of_attach = {name: arguments.pop(name) for name in _OF_ATTACH & arguments.keys()}
        groups = param_groups(model, rank, weight_decay=group_weight_decay, **of_groups)
        outside = {} if trainer is None else _outside(trainer, model)
        if outside:
            groups.append({"params": list(outside.values()), "param_names": list(outside)})
        made = optimizer(groups, **arguments)
        detach(model)  # from the optimizer of a trainer before, which nobody has a handle of
        attach(model, made, gradients, update, **of_attach)
        return made


class GaLoreTrainerMixin:
    """Gives any subclass of Transformers' Trainer a GaLore optimizer. Name it before the trainer among the bases.

    Attributes:
        galore: arguments of `GaLoreFactory`; what the training arguments say is taken where it is left out.
    """

    galore: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Raises an error for a class with its trainer before the mixin, which would train without GaLore."""
        super().__init_subclass__(**arguments)
        for base in cls.__mro__[: cls.__mro__.index(GaLoreTrainerMixin)]:
            if "create_optimizer" in vars(base) and not issubclass(base, GaLoreTrainerMixin):
                raise ValueError(
                    f"class {cls.__name__} names {base.__name__} before GaLoreTrainerMixin, so that its optimizer is "
                    f"not GaLore's; write class {cls.__name__}(GaLoreTrainerMixin, ...)"
                )

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Makes the optimizer, once; called by the trainer.

        Args:
            model: the model to optimize, where the trainer hands one on.

        Returns:
            The optimizer.

        Raises:
            ValueError: no `rank` in `galore`, or training arguments that exclude `update="backward"`.
        """
        trainer: Any = self
        if trainer.optimizer is None:
            if not isinstance(self.galore, Mapping) or "rank" not in self.galore:
                raise ValueError(
                    f"the trainer's `galore` is {self.galore!r} and has no rank; set galore = {{'rank': 128, ...}} on "
                    "the class"
                )
            trainer.optimizer = GaLoreFactory()(trainer.model if model is None else model, **self.galore)
        made: Optimizer = trainer.optimizer
        return made


def _calling_trainer() -> Any:
    """The trainer that called the factory, or None: Trainer hands a factory the model and its keywords alone."""
    caller = sys._getframe(2).f_locals.get("self")
    has_arguments = hasattr(getattr(caller, "args", None), "learning_rate")
    return caller if has_arguments and hasattr(caller, "create_optimizer") else None


def _arguments_of(optimizer: Callable[..., GaLore], given: Mapping[str, Any]) -> dict[str | None, Any]:
    """The arguments of a recipe by name, with their defaults; under None if it takes others that cannot be known."""
    signature = inspect.signature(optimizer).parameters
    known: dict[str | None, Any] = {name: one.default for name, one in signature.items() if name != "params"}
    if any(one.kind is one.VAR_KEYWORD for one in signature.values()):
        known[None] = None
        bound = optimizer.keywords if isinstance(optimizer, functools.partial) else {}
        for name in ("optimizer_class", "fallback_class"):
            inside = given.get(name, bound.get(name, known.get(name)))
            if isinstance(inside, type):
                further = inspect.signature(inside).parameters.items()
                known = {**{key: one.default for key, one in further if key not in ("self", "params")}, **known}
    return known


def _from_training_arguments(
    args: Any, known: Mapping[str | None, Any], matrices_decay: float | None
) -> dict[str, Any]:
    """The training arguments that a recipe has with the same meaning: an Adafactor's eps is another."""
    given = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay if matrices_decay is None else 0.0,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    return {
        name: value
        for name, value in given.items()
        if name in known and (name == "lr" or isinstance(known[name], tuple) == isinstance(value, tuple))
    }


def _report_ignored(trainer: Any, arguments: Mapping[str, Any]) -> None:
    """Warns of training arguments and searched values that have no effect, as others are given here."""
    trial = getattr(trainer, "_trial", None)
    searched = getattr(trial, "params", trial) if getattr(trainer, "hp_search_backend", None) is not None else None
    for name, ours in _SEARCHED.items():
        if isinstance(searched, Mapping) and name in searched and ours in arguments:
            warn(f"the search over {name} has no effect, for {ours}={arguments[ours]!r} is given; leave out {ours}")
    for name in ("optim_args", "optim_target_modules"):
        value = getattr(trainer.args, name, None)
        if value is not None:
            warn(f"{name}={value!r} of the training arguments has no effect here; give it to GaLore by keywords")


def _outside(trainer: Any, model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a trainer's loss that the model does not have, such as the heads of sentence-transformers."""
    loss = getattr(trainer, "loss", None)
    losses = loss if isinstance(loss, Mapping) else {"loss": loss}
    held = {id(weight) for weight in model.parameters()}
    return {
        f"{key}.{name}": weight
        for key, module in losses.items()
        if isinstance(module, nn.Module)
        for name, weight in module.named_parameters()
        if weight.requires_grad and id(weight) not in held
    }
