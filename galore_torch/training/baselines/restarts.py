"""ReLoRA's restarts: what was learnt is merged into the frozen matrices, and the adapters begin again.

From "ReLoRA: High-Rank Training Through Low-Rank Updates" (arXiv 2307.05695): every so many steps W += (alpha / r) B A,
A is drawn anew and B is zero, so that the function stays what it was; most of the adapters' optimizer state is set to
zero; and the learning rate rises again from zero to where its schedule has come, which makes the schedule jagged.
"""

# ruff: noqa: ARG002 - a callback takes whatever the Trainer hands to every callback

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from galore_torch.training.baselines.layers import NAME, lora_layers, merge
from galore_torch.training.settings.adapter import AdapterConfig


def callbacks_for(config: AdapterConfig) -> list[TrainerCallback]:
    """What the Trainer must call for these adapters: restarts for ReLoRA, else nothing."""
    return [Restarts(config)] if config.adapter == "relora" else []


class Restarts(TrainerCallback):
    """Restarts a model's adapters every `restart_every` steps, and makes the learning rate's schedule jagged.

    It keeps nothing itself: a checkpoint of model, optimizer, schedule and random state is all that resuming needs.
    """

    def __init__(self, config: AdapterConfig) -> None:
        if config.restart_every is None:
            raise ValueError("restart_every = None: ReLoRA needs restarts; give a number of steps.")
        self.every = config.restart_every
        self.warmup = round(config.restart_warmup * config.restart_every)
        self.prune = config.restart_prune

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Make the schedule jagged; a ValueError says that it is no function of the step."""
        schedule = kw["lr_scheduler"]
        if not isinstance(schedule, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type = {args.lr_scheduler_type!r} is not a function of the step, so that ReLoRA cannot "
                "warm up again after a restart; choose another, such as 'cosine_with_min_lr'."
            )
        schedule.lr_lambdas = [jagged(smooth, self.every, self.warmup) for smooth in schedule.lr_lambdas]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Restart when it is time, before a checkpoint is written. After the last step there is nothing to begin."""
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            optimizer = kw["optimizer"]
            seed = args.seed + state.global_step
            restart(kw["model"], getattr(optimizer, "optimizer", optimizer), self.prune, seed)


def jagged(smooth: Callable[[int], float], every: int, warmup: int) -> Callable[[int], float]:
    """A schedule that drops to zero at every restart and rises again to where the smooth one has come.

    Args:
        smooth: the learning rate's factor at a step, from 0.
        every: steps between two restarts.
        warmup: steps of the rise.

    >>> list(map(jagged(lambda step: 1.0, every=4, warmup=2), range(9)))
    [1.0, 1.0, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 0.0]
    """

    def factor(step: int) -> float:
        since = step % every
        return smooth(step) * since / warmup if step >= every and since < warmup else smooth(step)

    return factor


@torch.no_grad()
def restart(model: nn.Module, optimizer: Optimizer, prune: float, seed: int) -> None:
    """Merge a model's LoRA layers and begin them again; what the model computes stays the same.

    A is drawn anew, from the seed alone, so that several processes draw the same; B is zero; a share of their state
    is, see `prune_state`.
    """
    with torch.random.fork_rng({one.device for one in model.parameters() if one.is_cuda}):
        torch.manual_seed(seed)
        for _, layer in lora_layers(model):
            merge(layer)
            layer.reset_lora_parameters(NAME, True)  # type: ignore[no-untyped-call]
            prune_state(optimizer, [*layer.lora_A.parameters(), *layer.lora_B.parameters()], prune)


@torch.no_grad()
def prune_state(optimizer: Optimizer, weights: Iterable[Tensor], share: float) -> None:
    """Set the smallest numbers of what an optimizer keeps for some weights to zero: a share of each, from 0 to 1.

    What has another shape than the weight, such as the count of steps, stays. At 1 the state is dropped, so that the
    optimizer begins anew with all of it.
    """
    for weight in weights:
        if share == 1:
            optimizer.state.pop(weight, None)
            continue
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                size = value.float().abs().flatten()
                smallest = size.topk(int(share * len(size)), largest=False).indices
                value.view(-1)[smallest] = 0
