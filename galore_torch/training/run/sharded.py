"""A run whose weights are divided among its processes (FSDP2): ``parallel = "fsdp"``.

Its checkpoints are those of one process, whole weights and whole state, so that any number of processes goes on from
them, sharded or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers import Trainer

from galore_torch.distributed import shard_bases, shard_placement
from galore_torch.training.run import processes
from galore_torch.training.settings.optimizer import KINDS

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def shard(model: Any, config: Any, target_modules: Any) -> None:
    """Divide a model among the processes of a run: its repeated layers one by one, and the rest.

    Args:
        model: a Transformers model, on the CPU.
        config: the job's settings.
        target_modules: which modules hold the matrices; they are cut where they are not projected, if that is even.
    """
    if not processes.divides_weights(config):
        return
    processes.connect()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(kind)
    given: dict[str, Any] = {"mesh": init_device_mesh(kind, (processes.count(),))}
    if KINDS[config.optimizer.optim].projected:
        keys = config.optimizer.group_keys
        given["shard_placement_fn"] = shard_placement(model, processes.count(), target_modules=target_modules, **keys)
    repeated = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in repeated:
            fully_shard(module, **given)
    fully_shard(model, **given)


def divide_bases(optimizer: Any, config: Any) -> None:
    """Let each process of a run with a sharded model keep its part of the bases alone, where the settings say so.

    Args:
        optimizer: made after `shard`.
        config: the job's settings.

    Raises:
        ValueError: there are no bases, or bases in few bits.
    """
    if processes.count() == 1 or not getattr(config.schedule, "shard_bases", False):
        return
    if not KINDS[config.optimizer.optim].projected:
        raise ValueError(f"shard_bases = True has no effect with optim = {config.optimizer.optim!r}; leave it out.")
    shard_bases(optimizer)


def is_sharded(model: Any) -> bool:
    """Whether a model is divided among processes."""
    return isinstance(model, FSDPModule)


def whole_weights(model: nn.Module) -> dict[str, Any] | None:
    """The weights of a sharded model, whole; None of one that is not. All processes must ask."""
    if not is_sharded(model):
        return None
    return get_model_state_dict(model, options=_WHOLE)


def put_together(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model its whole weights, in the place of this process' parts of them. It cannot be run any more.

    Args:
        model: that was sharded.
        weights: as `whole_weights` returns them. Those that were tied are tied.
    """
    whole: dict[Tensor, nn.Parameter] = {}
    for name, part in list(model.named_parameters(remove_duplicate=False)):
        if name in weights:
            holder, _, own = name.rpartition(".")
            made = whole.setdefault(part, nn.Parameter(weights[name], requires_grad=False))
            model.get_submodule(holder).register_parameter(own, made)


def adopt(trainer: Trainer) -> Trainer:
    """A Trainer that leaves a sharded model as it is; any other stays what it is."""
    if is_sharded(trainer.model):
        kind = type(trainer)
        trainer.__class__ = type(f"Sharded{kind.__name__}", (ShardedTraining, kind), {})
        trainer.is_distributed_loading_by_transformers = True  # it is placed, and reduces its gradients
        trainer.place_model_on_device = False
    return trainer


if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object


class ShardedTraining(Base):
    """What a Trainer does otherwise where the model is sharded."""

    model: nn.Module
    optimizer: Any

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return _whole(torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            grad_norm = _whole(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
        return grad_norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole weights, by the first process."""
        state = whole_weights(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        from safetensors.torch import load_file

        state: dict[str, Any] = {}
        for path in sorted(Path(resume_from_checkpoint).glob("*.safetensors")):
            state |= load_file(path)
        set_model_state_dict(model or self.model, state, options=_WHOLE)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = self.optimizer
        state = tree_map(_whole, optimizer.state_dict())  # by all processes, of which one saves
        self.optimizer = SimpleNamespace(state_dict=lambda: state)
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            self.optimizer = optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        for weight, state in self.optimizer.state.items():
            for name, value in state.items():  # GaLore's are cut already, and those of other optimizers whole
                if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.shape == weight.shape:
                    state[name] = distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value
