"""What ``galore plan`` plans: a preset's LLaMA, or any model of Transformers by its configuration, without weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from galore_torch.lowbit import quantize_weights
from galore_torch.memory import Job, MemoryPlan, plan
from galore_torch.memory.ranks import Sizes, of_a_rank
from galore_torch.training.baselines.layers import adapt
from galore_torch.training.finetune.config import PREFERENCES
from galore_torch.training.planning.cards import Cost, cost, refusal
from galore_torch.training.planning.config import LIKE, OF_A_STEP, RUN, Cards
from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.pretrain.model import llama_sizes
from galore_torch.training.pretrain.presets import PRESETS, configure
from galore_torch.training.run import optimizers
from galore_torch.training.run.base_model import recompute_activations
from galore_torch.training.run.model_files import require_length
from galore_torch.training.run.names import local_path, refused
from galore_torch.training.run.processes import divided
from galore_torch.training.settings.adapter import AdapterConfig
from galore_torch.training.settings.fields import field_names
from galore_torch.training.settings.methods import has_effect
from galore_torch.training.settings.optimizer import KINDS, MATRICES, OptimizerConfig, modules_named

_OF_TUNING = {"batch": 8, "micro_batch": 8, "seq": 512}
_MOVE_WHOLE = ("adafactor", "muon")  # optimizers whose state is whole in each process
_RANK_SHARE = 4  # of the width, as the paper has it for most of its models

Settings = Mapping[str, Any]
"""Settings by name."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model on the meta device, and how it would be trained."""

    name: str  # of a preset, or on the Hugging Face Hub, a folder or a ``config.json``
    model: Any  # without weights
    preset: str  # whose recipe it has
    given: Settings  # those that were given, and those that the model brings
    target_modules: Any  # which modules hold the matrices; see `galore_torch.param_groups`
    cards: Cards = field(default_factory=Cards)
    run: Settings = field(default_factory=dict)  # those of the run whose model it is, if it is one's
    task_type: str | None = None  # PEFT's name of what a model that was trained before is trained for

    def settings(self, method: str) -> PretrainConfig:
        """All settings under a method; those that have no effect with it are left out.

        Raises:
            ValueError: when the method or a value is not known or not allowed, or not in so many processes.
        """
        alone, world = self.alone(method), self.cards.world_size
        kept, of_run = (
            {name: one for name, one in values.items() if has_effect(name, alone.optimizer, alone.adapter)}
            for values in (self.given, self.run)
        )
        if alone.optimizer.update == "backward":  # which leaves nothing to accumulate
            known = {"micro_batch": 32, **PRESETS[self.preset], **of_run, **kept}
            kept |= dict.fromkeys(("micro_batch", "batch"), known["micro_batch"] * world)
        config = configure(self.preset, of_run, method=None if method == RUN else method, **kept)
        refused_for = refusal(self.cards, config)
        if refused_for is not None:
            raise ValueError(f"{refused_for}; choose another method, or leave out --world-size.")
        self.micro_batch(config)  # raises where the batch cannot be divided
        return config

    def micro_batch(self, config: PretrainConfig) -> int:
        """How many sequences a process takes at once, of a step that may have less for each."""
        return divided(config.schedule, self.cards.world_size)

    def refusal(self, method: str) -> str | None:
        """Why a method by itself is refused in so many processes; None if it is not."""
        return refusal(self.cards, self.alone(method))

    def alone(self, method: str) -> PretrainConfig:
        """A method's own settings, or the run's, whatever was given."""
        values, named = (self.run, None) if method == RUN else ({}, method)
        return configure(self.preset, values, method=named, micro_batch=1, batch=1)

    def planned(self, method: str) -> tuple[MemoryPlan, Cost | None]:
        """What a method needs of memory, in each process, and what a step costs, where that was asked for."""
        config, job, cards = self.settings(method), self.job(method), self.cards
        found = plan(job)
        if cards.world_size == 1 and cards.tokens_per_second is None:
            return found, None
        sizes = Sizes.of(job)
        optim = config.optimizer.optim
        divides = not any(name in optim for name in _MOVE_WHOLE)
        divided = {"divides_states": divides, "divides_bases": cards.shard_bases}
        found = of_a_rank(found, sizes, cards.world_size, cards.parallel, **divided)
        at_once = self.micro_batch(config) * config.data.seq
        return found, cost(cards, sizes, tokens_at_once=at_once, micro_batches=job.micro_batches)

    def job(self, method: str) -> Job:
        """What is to be rehearsed under a method."""
        config = self.settings(method)
        model, settings, rows = self.model, config.optimizer, (self.micro_batch(config), config.data.seq)
        if KINDS[settings.optim].projected:  # a rank beyond all matrices would be cut to theirs in each
            most = max(min(one.shape[-2:]) for one in optimizers.matrices(model, self.target_modules).values())
            if settings.rank > most:
                raise ValueError(
                    f"rank = {settings.rank} is beyond the matrices of {self.name!r}; give at most {most}."
                )
        labels = rows if "Classification" not in type(model).__name__ else rows[:1]

        def prepare(copied: nn.Module) -> None:
            task_type = None if config.adapter.adapter == "low-rank" else self.task_type  # that one trains from scratch
            adapt(copied, config.adapter, self.target_modules or MATRICES, task_type=task_type)
            if settings.weight_bits == 8:
                quantize_weights(copied, self.target_modules)
            if config.schedule.gradient_checkpointing:
                recompute_activations(copied)

        return optimizers.job(
            model,
            settings,
            config.schedule.seed,
            self.target_modules,
            batch={"input_ids": rows, "labels": labels},
            prepare=prepare,
            micro_batches=config.schedule.batch // (rows[0] * self.cards.world_size),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )


def subject(
    name: str, given: Settings, dtype: str | None, cards: Cards | None = None, run: Settings | None = None
) -> Subject:
    """The model of a name, without weights.

    Args:
        name: a preset, a folder or a ``config.json``, or a name on the Hugging Face Hub.
        given: settings by name.
        dtype: of the weights; None for the preset's or the run's, or bfloat16.
        cards: where it would be trained; one if None.
        run: settings of the run whose model it is, if it is one's.

    Raises:
        ValueError: when there is no such model, or it has no head that gives a loss.
    """
    cards = cards or Cards()
    if name in PRESETS:
        config = configure(name, **{**given, "dtype": dtype})
        sizes, kind = llama_sizes(config, vocab_size=config.data.vocab), transformers.LlamaForCausalLM
        built = _without_weights(kind, sizes, config.model.dtype)
        return Subject(name=name, model=built, preset=name, given=given, target_modules=MATRICES, cards=cards)
    if "vocab" in given:
        raise ValueError(
            f"vocab = {given['vocab']} has no effect with model = {name!r}, which has its own; leave it out."
        )
    path = local_path("model", name)
    with refused(f"model = {name!r} has no configuration that can be read", "Give another."):
        sizes = transformers.AutoConfig.from_pretrained(path if path.exists() else name)
    require_length("seq", given.get("seq", 0), name, getattr(sizes.get_text_config(), "max_position_embeddings", None))
    kind = _kind(name, sizes)
    with refused(f"model = {name!r} has a configuration of which no model can be made", "Mend it, or give another."):
        built = _without_weights(kind, sizes, dtype or (run or {}).get("dtype", "bfloat16"))
    tuned = "SEQ_CLS" if "Classification" in kind.__name__ else "CAUSAL_LM"
    if run:
        modules = modules_named(run["target_modules"]) if "target_modules" in run else MATRICES
        return Subject(
            name=name, model=built, preset=LIKE, given=given, target_modules=modules, cards=cards, run=_of_a_step(run),
            task_type=tuned if "model" in run else None,
        )  # fmt: skip
    width = int(getattr(sizes.get_text_config(), "hidden_size", 512))
    sides = [min(weight.shape[-2:]) for weight in optimizers.matrices(built, None).values()]
    rank = max(1, min(width // _RANK_SHARE, *sides))  # keys and values may have fewer rows than that
    of_tuning = {**_OF_TUNING, "rank": rank, **given}
    return Subject(
        name=name, model=built, preset=LIKE, given=of_tuning, target_modules=None, cards=cards,
        task_type=None if path.is_file() else tuned,  # a configuration alone is of a model that has learnt nothing
    )  # fmt: skip


def _of_a_step(run: Settings) -> dict[str, Any]:
    """The settings of a run that decide what a step needs, by the names that they have in a pre-training."""
    known = {"seq": run.get("max_length"), "micro_batch": run["batch"], **run}
    if run.get("adapter_rank") == run["rank"]:  # by default, as with another rank that one
        del known["adapter_rank"]
    if run.get("task") in PREFERENCES:  # of a row there are two sequences
        known |= {name: 2 * known[name] for name in ("batch", "micro_batch")}
    names = {*field_names(OptimizerConfig, AdapterConfig), *OF_A_STEP} - {"vocab"}
    return {name: value for name, value in known.items() if name in names}


def _kind(name: str, config: Any) -> Any:
    named = (config.architectures or [""])[0]
    kind = getattr(transformers, named, None)
    if kind is None or "labels" not in inspect.signature(kind.forward).parameters:
        raise ValueError(
            f"model = {name!r} has architectures = {config.architectures!r}, none of Transformers' with a head that "
            "gives a loss; name one in its config.json, such as LlamaForCausalLM."
        )
    return kind


def _without_weights(kind: Any, config: Any, dtype: str) -> Any:
    config.use_cache = False
    with torch.device("meta"):
        model = kind(config)
    model.tie_weights()  # as Transformers 5.0 does of real weights alone
    for parameter in model.parameters():
        parameter.data = parameter.to(getattr(torch, dtype))
    return model
