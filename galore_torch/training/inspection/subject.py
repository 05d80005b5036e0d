"""What is looked at: a model that is about to train, by which recipe, and on what."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from galore_torch import param_groups
from galore_torch.training.run import optimizers
from galore_torch.training.settings.optimizer import OptimizerConfig

MakeTrainer = Callable[..., Trainer]
"""Takes the Trainer's ``args``, ``callbacks`` and ``optimizer_cls_and_kwargs``."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is about to train. Nothing of a run folder is changed by it.

    Attributes:
        title: what it is, in words.
        model: its weights are dropped after the steps.
        make_trainer: makes its Trainer, with the data in it.
        arguments: the Trainer's own settings: batch, schedule, length.
        optimizer: the recipe's optimizer; gradients are formed whole and applied at the step.
        targets: what it projects, by the rules of `galore_torch.param_groups`.
        seed: of random bases and of the order of the data.
        rank: the recipe's.
        facts: further settings, for the page.
        notes: what the reader must know, a sentence each.
        renewals: what a run recorded of its own renewals; see `galore_torch.training.run.subspaces`.
    """

    title: str
    model: Any
    make_trainer: MakeTrainer
    arguments: dict[str, Any]
    optimizer: OptimizerConfig
    targets: str | Sequence[str]
    seed: int
    rank: int
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    renewals: list[dict[str, Any]] = field(default_factory=list)

    def weights(self, targets: str | None) -> dict[str, Tensor]:
        """The weights that are looked at.

        Args:
            targets: parts of their modules' names by comma, or all-linear; None for those that the recipe projects.

        Raises:
            ValueError: when none is meant.
        """
        chosen = self.targets if targets is None else _patterns(targets)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is tied or no matrix is not asked for here
                groups = param_groups(self.model, 1, chosen)
        except ValueError as error:
            field = "model" if targets is None else f"target_modules = {targets!r}"
            raise ValueError(f"{field}: {error}.") from error
        return {
            name: weight
            for group in groups
            if "rank" in group
            for name, weight in zip(group["param_names"], group["params"], strict=True)
        }

    def trainer(self, folder: str, callbacks: Sequence[Any]) -> Trainer:
        """Make the Trainer.

        Args:
            folder: which it may write into.
            callbacks: of ours.
        """
        arguments = TrainingArguments(
            output_dir=folder,
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="no",
            save_strategy="no",
            seed=self.seed,
            data_seed=self.seed,
            report_to=[],
            disable_tqdm=True,
            bf16=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            **self.arguments,
        )
        arguments._n_gpu = min(1, arguments.n_gpu)
        optimizer = optimizers.build(self.model, self.optimizer, self.seed, self.targets)
        trainer = self.make_trainer(
            args=arguments,
            callbacks=list(callbacks),
            optimizer_cls_and_kwargs=(
                optimizers.TrainerOptimizer,
                {"optimizer": optimizer, "config": self.optimizer},
            ),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def _patterns(targets: str) -> str | list[str]:
    return "all-linear" if targets == "all-linear" else [part.strip() for part in targets.split(",")]


def whole(optimizer: OptimizerConfig, factor: float = 1.0) -> OptimizerConfig:
    """A recipe's optimizer on full gradients, which are applied at the step, and on weights in their own dtype.

    Args:
        optimizer: the recipe's.
        factor: on its learning rates.

    >>> whole(OptimizerConfig(gradients="fused", update="backward", lr=0.01), 0.5).lr
    0.005
    """
    others = optimizer.others_lr
    return dataclasses.replace(
        optimizer,
        gradients="full",
        update="step",
        grad_bits=16,
        weight_bits=16,
        weight_rounding="stochastic",
        lr=optimizer.lr * factor,
        others_lr=None if others is None else others * factor,
    )
