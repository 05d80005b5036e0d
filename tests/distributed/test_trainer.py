"""Transformers' Trainer and Accelerate, unchanged, in several processes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_torch import attach
from tests.distributed.pool import assert_every_process_raises
from tests.distributed.sharded import clip_norm
from tests.distributed.trained import BAR, batch, distance, llama, loss_of, optimizer_of, weights_of

pytestmark = pytest.mark.slow  # Trainer and those that are built on it take seconds to make ready
STEPS = 10


def as_started_by_torchrun(rank: int, world: int) -> None:
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29511}
    os.environ.update({name: str(value) for name, value in given.items()}, ACCELERATE_USE_CPU="1")


def arguments_of(folder: str, world: int) -> dict[str, Any]:
    """What every Trainer is given here."""
    return {
        "output_dir": folder, "use_cpu": True, "ddp_backend": "gloo", "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "max_steps": STEPS, "learning_rate": 0.01, "per_device_train_batch_size": 4 // world,
    }  # fmt: skip


def by_trainer(rank: int, world: int, folder: str, gradients: str, accumulation: int) -> tuple[Tensor, str]:
    from accelerate.state import AcceleratorState, PartialState
    from transformers import Trainer, TrainingArguments

    from galore_torch.integrations.transformers import GaLoreFactory
    from tests.integrations.small_mistral import blocks, mistral

    as_started_by_torchrun(rank, world)
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = TrainingArguments(
        **arguments_of(folder, world),
        max_grad_norm=0.5,
        gradient_accumulation_steps=accumulation,
    )
    given = {"rank": 8, "update_proj_gap": 4, "gradients": gradients}
    trainer = Trainer(
        model=mistral().double(),
        args=arguments,
        train_dataset=blocks(),
        optimizer_cls_and_kwargs=(GaLoreFactory, given),
    )
    trainer.train()
    wrapped = type(trainer.model_wrapped).__name__
    PartialState._reset_state()
    AcceleratorState._reset_state()
    return weights_of(trainer.model), wrapped


@pytest.mark.parametrize(("gradients", "accumulation"), [("fused", 1), ("projected", 2), ("full", 1)])
def test_trainer_trains_in_two_processes_as_in_one(training_pool, tmp_path, gradients, accumulation):
    given = {"folder": str(tmp_path), "gradients": gradients, "accumulation": accumulation}
    (ours, wrapped), (theirs, _) = training_pool.run(by_trainer, 2, **given)
    assert wrapped == "DistributedDataParallel"
    assert torch.equal(ours, theirs)
    assert distance(ours, training_pool.run(by_trainer, 1, **given)[0][0]) <= BAR


def by_sft(rank: int, world: int, folder: str, is_reversed: bool = False) -> Tensor:
    import warnings

    from accelerate.state import AcceleratorState, PartialState
    from trl import SFTConfig, SFTTrainer

    from galore_torch.integrations.transformers import GaLoreFactory
    from tests.integrations.small_mistral import SEQUENCE, mistral, text, tokenizer

    as_started_by_torchrun(rank, world)
    AcceleratorState._reset_state(reset_partial_state=True)
    warnings.simplefilter("ignore")
    arguments = SFTConfig(
        **arguments_of(folder, world),
        bf16=False,
        max_length=SEQUENCE,
    )
    trainer = SFTTrainer(
        model=mistral().double(),
        args=arguments,
        train_dataset=text(),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=(GaLoreFactory, {"rank": 8, "update_proj_gap": 4}),
    )
    if is_reversed:
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: collate(rows[::-1])
    trainer.train()
    PartialState._reset_state()
    AcceleratorState._reset_state()
    return weights_of(trainer.model)


def test_sft_trains_in_two_processes_as_in_one(training_pool, tmp_path):
    """Transformers forms the loss in float32, whatever the model's dtype, of as many tokens as a process has."""
    ours, theirs = training_pool.run(by_sft, 2, folder=str(tmp_path))
    alone, in_reverse = (
        training_pool.run(by_sft, 1, folder=str(tmp_path), is_reversed=is_reversed)[0] for is_reversed in (False, True)
    )
    assert torch.equal(ours, theirs)
    assert distance(ours, alone) <= 3 * distance(in_reverse, alone) < 1e-6  # what rounding makes


def by_accelerate(rank: int, world: int) -> Tensor:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    as_started_by_torchrun(rank, world)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = llama()
    optimizer = optimizer_of(model)
    attach(model, optimizer)
    net, prepared = accelerator.prepare(model, optimizer)
    for step in range(2 * STEPS):
        with accelerator.accumulate(net):
            accelerator.backward(loss_of(net, batch(step).tensor_split(world)[rank]))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 0.5)
            prepared.step()
            prepared.zero_grad()
    PartialState._reset_state()
    AcceleratorState._reset_state()
    return weights_of(model)


def test_accelerate_trains_in_two_processes_as_in_one(training_pool: Any):
    ours, theirs = training_pool.run(by_accelerate, 2)
    assert torch.equal(ours, theirs)
    assert distance(ours, training_pool.run(by_accelerate, 1)[0]) <= BAR


def shard_by_accelerate(accelerator: Any, layer: str) -> None:
    """Accelerate shards on a GPU alone: here it is told to."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[layer]
    )


def by_fsdp2_of_accelerate(rank: int, world: int, gradients: str) -> Tensor:
    """`prepare` puts shards in the place of weights."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    as_started_by_torchrun(rank, world)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model: Any = llama()
    model._no_split_modules = None  # Accelerate 1.6 reads it, as models of Transformers have it
    optimizer = optimizer_of(model)
    if gradients != "full":
        attach(model, optimizer, gradients)  # type: ignore[arg-type]
    if world > 1:
        shard_by_accelerate(accelerator, "Layer")
    try:
        net, prepared = accelerator.prepare(model, optimizer)
        for step in range(2 * STEPS):
            with accelerator.accumulate(net):
                accelerator.backward(loss_of(net, batch(step).tensor_split(world)[rank]))
                if accelerator.sync_gradients:
                    clip_norm(net, 0.5, accelerator.clip_grad_norm_)
                prepared.step()
                prepared.zero_grad()
        assert world == 1 or type(next(net.parameters())).__name__ == "DTensor"
        return weights_of(net)
    finally:
        PartialState._reset_state()
        AcceleratorState._reset_state()


def test_accelerate_shards_as_one_process_trains(training_pool: Any):
    ours, theirs = training_pool.run(by_fsdp2_of_accelerate, 2, gradients="full")
    assert torch.equal(ours, theirs)
    assert distance(ours, training_pool.run(by_fsdp2_of_accelerate, 1, gradients="full")[0]) <= BAR


def test_attached_before_accelerate_shards_is_refused(training_pool: Any):
    assert_every_process_raises(training_pool.ask(by_fsdp2_of_accelerate, 2, gradients="fused"), 'gradients="full"')


def by_dpo(rank: int, world: int, folder: str, shards: bool) -> Tensor:
    """By Accelerate's FSDP2, or under DDP."""
    import warnings
    from typing import ClassVar

    from accelerate.state import AcceleratorState, PartialState
    from trl import DPOConfig, DPOTrainer

    from galore_torch.integrations.transformers import GaLoreTrainerMixin
    from tests.integrations.small_mistral import SEQUENCE, mistral, preferences, tokenizer

    class Preferring(GaLoreTrainerMixin, DPOTrainer):
        galore: ClassVar = {"rank": 8, "update_proj_gap": 4, "gradients": "full"}

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if shards:
                shard_by_accelerate(self.accelerator, "MistralDecoderLayer")
                self.is_fsdp_enabled = True

    as_started_by_torchrun(rank, world)
    AcceleratorState._reset_state(reset_partial_state=True)
    warnings.simplefilter("ignore")
    trainer = Preferring(
        model=mistral().double(),
        ref_model=mistral().double(),
        args=DPOConfig(**arguments_of(folder, world), bf16=False, max_length=SEQUENCE),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )
    try:
        trainer.train()
        assert type(next(trainer.model_wrapped.parameters())).__name__ == ("DTensor" if shards else "Parameter")
        return weights_of(trainer.model_wrapped)
    finally:
        PartialState._reset_state()
        AcceleratorState._reset_state()


def test_dpo_trains_in_shards_as_under_ddp(training_pool, tmp_path):
    """Where an epoch ends with less than a batch for each process, these see other rows than one process does."""
    ours, theirs = training_pool.run(by_dpo, 2, folder=str(tmp_path), shards=True)
    assert torch.equal(ours, theirs)
    assert distance(ours, training_pool.run(by_dpo, 2, folder=str(tmp_path), shards=False)[0]) <= BAR


def by_lightning(rank: int, world: int, folder: str, gradients: str) -> Tensor:
    """In one process as it is, in several by ModelParallelStrategy, where the module shards its model itself."""
    import warnings

    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.utils.data import DataLoader

    class Learner(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def configure_model(self) -> None:
            if world > 1:
                for layer in self.model.layers:
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

        def training_step(self, ids: Tensor) -> Tensor:
            return loss_of(self.model, ids)

        def configure_optimizers(self) -> Any:
            return optimizer_of(self.model)

        def on_fit_start(self) -> None:
            if gradients != "full":
                attach(self.model, self.optimizers().optimizer, gradients)

    as_started_by_torchrun(rank, world)
    os.environ.update(TORCHELASTIC_RUN_ID="none", GROUP_RANK="0", LOCAL_WORLD_SIZE=str(world))
    warnings.simplefilter("ignore")
    learner = Learner()
    batches = [batch(step).tensor_split(world)[rank] for step in range(STEPS)]
    Trainer(
        accelerator="cpu",
        devices=world,
        strategy=ModelParallelStrategy(world, 1, process_group_backend="gloo") if world > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(learner, DataLoader(batches, batch_size=None))
    assert world == 1 or type(next(learner.model.parameters())).__name__ == "DTensor"
    return weights_of(learner.model)


@pytest.mark.parametrize("gradients", ["full", "fused"])
def test_lightning_shards_as_one_process_trains(training_pool, tmp_path, gradients):
    given = {"folder": str(tmp_path), "gradients": gradients}
    ours, theirs = training_pool.run(by_lightning, 2, **given)
    assert torch.equal(ours, theirs)
    assert distance(ours, training_pool.run(by_lightning, 1, **given)[0]) <= BAR
