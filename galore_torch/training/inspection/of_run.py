"""The subject of a run folder: its newest weights, or its first ones, by its own recipe on its own data."""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError
from transformers import LlamaForCausalLM, Trainer, set_seed

from galore_torch.training.finetune.config import SECTIONS, FinetuneConfig
from galore_torch.training.finetune.data import load
from galore_torch.training.finetune.presets import made
from galore_torch.training.inspection.config import LookConfig
from galore_torch.training.inspection.of_model import tuned
from galore_torch.training.inspection.subject import Subject, whole
from galore_torch.training.pretrain.config import PretrainConfig, recorded
from galore_torch.training.pretrain.model import build_model, recompute_activations
from galore_torch.training.run import optimizers, records
from galore_torch.training.run.checkpoints import step_of
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.manifest import require_whole
from galore_torch.training.run.progress import quiet
from galore_torch.training.run.units import sentence
from galore_torch.training.settings import sections
from galore_torch.training.settings.adapter import AdapterConfig
from galore_torch.training.settings.fields import read_toml
from galore_torch.training.settings.optimizer import is_projected
from galore_torch.training.text import packing
from galore_torch.training.text.prepare import prepare_text

_LEAST_RATE = 0.1
"""Of the peak: a schedule that has ended at 0 would move nothing, and gradients would differ by their batches alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where in a run the steps begin.

    Attributes:
        weights: folder of its weights; None for fresh ones.
        step: how many steps it had made.
    """

    weights: Path | None
    step: int


def require_run(run: Path, fresh: bool) -> Place:
    """Judge a run folder before anything is loaded.

    Args:
        run: the folder.
        fresh: whether the run's first weights are meant.

    Raises:
        ValueError: when it is no run folder, or none that can be inspected.
    """
    folder = RunFolder(run)
    if not run.is_dir():
        raise ValueError(f"run = {str(run)!r} is no folder; give the run folder of a galore pretrain or finetune.")
    if not folder.config.is_file():
        hint = f"give it as --model {run}" if (run / "config.json").is_file() else "give a run folder, or --model"
        raise ValueError(f"run = {str(run)!r} holds no config.toml, so it is no run folder; {hint}.")
    folder.require_settings()
    adapter = _adapter(folder)
    if adapter != "none":
        remedy = f"inspect what it merged into by --model {folder.model} --data ..."
        raise ValueError(
            f"run = {str(run)!r} trained adapter = {adapter!r}, and an adapter's gradients have its rank already; "
            f"{remedy}."
        )
    if fresh:
        return Place(weights=None, step=0)
    final, checkpoint = records.final(folder.metrics), folder.checkpoints.newest_whole(warnings.warn)
    if final is not None and folder.model.is_dir():
        require_whole("run", str(run), folder.model)
        return Place(weights=folder.model, step=final["step"])
    if checkpoint is not None:
        return Place(weights=checkpoint, step=step_of(checkpoint))
    raise ValueError(f"run = {str(run)!r} holds neither a finished model nor a checkpoint; give --fresh with it.")


def _adapter(folder: RunFolder) -> str:
    section = read_toml(folder.config).get("adapter", {})
    return str(section.get("adapter", AdapterConfig().adapter)) if isinstance(section, dict) else "none"


def subject_of_run(run: Path, place: Place, looks: LookConfig, console: Console) -> Subject:
    """Load a run's weights and data.

    Args:
        run: the run folder, as `require_run` accepts it.
        place: where in it the steps begin.
        looks: how many steps.
        console: where progress is shown.

    Raises:
        ValueError: when its settings, weights or data cannot be read.
    """
    quiet(console)
    folder = RunFolder(run)
    data = read_toml(folder.config).get("data", {})
    find = _tuned if isinstance(data, dict) and "task" in data else _pretrained
    found = find(folder, place, looks, console)
    return dataclasses.replace(found, renewals=records.read(folder.subspaces))


def _factor(folder: RunFolder, place: Place, lr: float | None, peak: float) -> float:
    """On the learning rate, from where the run had come: it is constant then."""
    if lr is not None:
        return lr / peak
    rates = [r["lr"] for r in records.read(folder.metrics) if "lr" in r and r["step"] <= place.step]
    return max(_LEAST_RATE, rates[-1] / peak) if rates else 1.0


def _notes(config: PretrainConfig | FinetuneConfig, changed: bool) -> list[str]:
    notes = []
    if changed:
        notes.append("The data have changed since the run was started; gradients are of the data as they are now.")
    if config.optimizer.weight_bits != 16:
        notes.append("The run kept INT8 weights; they are inspected as they were saved, in its own dtype.")
    if is_projected(config.optimizer.optim) and config.optimizer.proj_type != "std":
        notes.append(
            f"The run projects by proj_type = {config.optimizer.proj_type!r}; bases here are those of std, on the "
            "shorter side."
        )
    return notes


def _digest_differs(folder: RunFolder, digest: str) -> bool:
    return folder.text_digest() != digest


def _pretrained(folder: RunFolder, place: Place, looks: LookConfig, console: Console) -> Subject:
    config = recorded(folder)
    factor = _factor(folder, place, looks.lr, config.optimizer.lr) if place.weights else 1.0
    seed = config.schedule.seed + (place.weights is not None)  # from its end, on an order of its own
    recipe = dataclasses.replace(
        config,
        optimizer=whole(config.optimizer, factor),
        schedule=dataclasses.replace(config.schedule, seed=seed),
        data=config.data if place.weights is None else dataclasses.replace(config.data, tokenizer=str(place.weights)),
    )
    text = prepare_text(recipe.data, console, batch=recipe.schedule.batch, seed=seed)
    set_seed(seed)
    model = build_model(recipe, text.tokenizer) if place.weights is None else _loaded(place.weights, config)
    schedule = config.schedule
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": schedule.micro_batch,
        "gradient_accumulation_steps": schedule.batch // schedule.micro_batch,
        "max_grad_norm": config.optimizer.max_grad_norm,
        "learning_rate": recipe.optimizer.lr,
        "lr_scheduler_type": "constant",
        "max_steps": looks.steps,
    }
    if place.weights is None:
        arguments |= {
            "max_steps": schedule.steps,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": schedule.final_lr},
            "warmup_steps": round(schedule.warmup * schedule.steps),
        }
    return Subject(
        title=_title(folder, place, config.title),
        model=model,
        make_trainer=partial(
            Trainer,
            model=model,
            train_dataset=text.train,
            data_collator=packing.collate,
            processing_class=text.tokenizer,
        ),
        arguments=arguments,
        optimizer=recipe.optimizer,
        targets=optimizers.MATRICES,
        seed=seed,
        rank=config.optimizer.rank,
        facts=_facts(folder, place, config, recipe.optimizer.lr)
        | {"tokens a step": config.tokens_per_step, "sequence": config.data.seq},
        notes=_notes(config, _digest_differs(folder, text.digest)),
    )


def _loaded(weights: Path, config: PretrainConfig) -> LlamaForCausalLM:
    import torch

    try:
        model = LlamaForCausalLM.from_pretrained(weights, dtype=getattr(torch, config.model.dtype))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:  # whatever files can be wrong in
        raise ValueError(f"run: {str(weights)!r} cannot be loaded: {sentence(error)}") from error
    model.config.use_cache = False
    if config.schedule.gradient_checkpointing:
        recompute_activations(model)
    return model


def _tuned(folder: RunFolder, place: Place, looks: LookConfig, console: Console) -> Subject:
    config = made(sections.read_values(folder.config, SECTIONS)[1])
    rows = load(config.data)
    notes = _notes(config, _digest_differs(folder, rows.digest))
    peak, recipe, seed = config.optimizer.lr, config, config.schedule.seed
    if place.weights is not None:
        seed += 1
        recipe = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, model=str(place.weights), gguf_file=None),
            schedule=dataclasses.replace(config.schedule, seed=seed, steps=looks.steps, warmup=0.0, decay="constant"),
        )
    factor = _factor(folder, place, looks.lr, peak) if place.weights else 1.0
    found = tuned(dataclasses.replace(recipe, optimizer=whole(config.optimizer, factor)), rows, console)
    return dataclasses.replace(
        found,
        title=_title(folder, place, config.title),
        facts=_facts(folder, place, config, found.optimizer.lr) | {"rows a step": config.schedule.batch},
        notes=notes,
    )


def _title(folder: RunFolder, place: Place, recipe: str) -> str:
    where = "its first steps" if place.weights is None else f"after its step {place.step:,}"
    return f"{recipe} in {folder.root}, {where}"


def _facts(folder: RunFolder, place: Place, config: Any, rate: float) -> dict[str, Any]:
    peak = "peak " if place.weights is None else "constant "
    return {
        "run": folder.root,
        "weights": place.weights or "fresh",
        "data": config.data.data or config.data.task,
        "optimizer": config.optimizer.optim,
        "rank and gap of the run": f"{config.optimizer.rank}, {config.optimizer.update_proj_gap}",
        "learning rate": f"{peak}{rate:g}",
    }
