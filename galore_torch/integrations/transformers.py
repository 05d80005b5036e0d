"""GaLore with forms of gradients, through Transformers' Trainer and what is built on it.

`Trainer(optim="galore_adamw")` works without this file. It is for what Trainer's own names do not offer: any recipe and
all of its arguments, `attach` and so gradients that are projected or never formed, with accumulation, clipping,
schedules and checkpoints of one real optimizer.

    Trainer(..., optimizer_cls_and_kwargs=(GaLoreFactory, {"rank": 128, "lr": 0.01, "gradients": "fused"}))

Trainers that do not hand that argument on (TRL's, but for SFTTrainer and RewardTrainer) take the mixin:

    class GaLoreDPOTrainer(GaLoreTrainerMixin, DPOTrainer):
        galore = {"rank": 128, "lr": 0.01, "gradients": "fused"}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from galore_torch.gradients.attach import Gradients, Update, attach
from galore_torch.optim import GaLore, GaLoreAdamW, param_groups
from galore_torch.optim.keys import PROJECTED_DEFAULTS


class GaLoreFactory:
    """Makes a GaLore optimizer for a model and attaches it: for `Trainer(optimizer_cls_and_kwargs=...)`.

    Trainer makes one without arguments and calls it with the model.

    Example:
        >>> model = nn.ModuleDict({"mlp": nn.Linear(32, 64)})
        >>> optimizer = GaLoreFactory()(model, rank=4, lr=0.01, gradients="projected", update_proj_gap=100)
        >>> optimizer.param_groups[0]["update_proj_gap"]
        100
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        rank: int,
        optimizer: Callable[..., GaLore] = GaLoreAdamW,
        target_modules: str | Sequence[str] = ("attn", "mlp"),
        gradients: Gradients = "full",
        update: Update = "step",
        group_weight_decay: float | None = None,
        **arguments: Any,
    ) -> GaLore:
        """Makes the optimizer.

        Args:
            model: where it will be trained.
            rank: rank of the projection.
            optimizer: a recipe, or `GaLore` with `optimizer=` bound.
            target_modules: which modules are projected; see `param_groups`.
            gradients: how they are formed; see `attach`.
            update: when they are applied; see `attach`.
            group_weight_decay: decay of matrices alone; see `param_groups`' `weight_decay`.
            **arguments: keys of the projected groups (`update_proj_gap`, `scale`, ...), and the recipe's own arguments.

        Returns:
            The optimizer, attached to the model.

        Raises:
            ValueError: as `param_groups`, the recipe and `attach` say.
        """
        of_groups = {key: arguments.pop(key) for key in PROJECTED_DEFAULTS if key in arguments and key != "layout"}
        groups = param_groups(model, rank, target_modules, weight_decay=group_weight_decay, **of_groups)
        made = optimizer(groups, **arguments)
        attach(model, made, gradients, update)
        return made


class GaLoreTrainerMixin:
    """Gives any subclass of Transformers' Trainer a GaLore optimizer. Name it before the trainer among the bases.

    Attributes:
        galore: arguments of `GaLoreFactory`; `lr` is the training arguments' `learning_rate` when left out.
    """

    galore: ClassVar[Mapping[str, Any]] = {}

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
            arguments = {"lr": trainer.args.learning_rate, **self.galore}
            if "rank" not in arguments:
                raise ValueError("the trainer's `galore` has no rank; set galore = {'rank': 128, ...} on the class")
            if arguments.get("update") == "backward":
                _check_applicable(trainer.args)
            trainer.optimizer = GaLoreFactory()(trainer.model if model is None else model, **arguments)
        made: Optimizer = trainer.optimizer
        return made


def _check_applicable(args: Any) -> None:
    """What cannot be done to gradients that are applied inside the backward pass is told before training starts."""
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps is {args.gradient_accumulation_steps} and update is 'backward', which "
            "applies each gradient at once; use update='step', with gradients='projected' or 'fused' to save memory"
        )
    if args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm is {args.max_grad_norm} and update is 'backward', which leaves nothing to clip; set "
            "max_grad_norm=0, or use update='step'"
        )
