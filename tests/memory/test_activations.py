"""What is planned of activations is what a real forward keeps for its backward."""

import pytest
import torch
import transformers
from torch import nn

from galore_torch import GaLoreAdamW, attach, devices, param_groups
from galore_torch.memory import Job, plan
from galore_torch.optim.state_keys import RENEWED_STEP

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
ROWS = (2, 64)


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, use_cache=False))


def optimizer(model: nn.Module) -> GaLoreAdamW:
    return GaLoreAdamW(param_groups(model, rank=8))


def job(gradients: str, save_inputs: str = "projected") -> Job:
    modes = {"gradients": gradients, "save_inputs": save_inputs}
    return Job(model=llama(), optimizer=optimizer, batch={"input_ids": ROWS, "labels": ROWS}, **modes)


def kept(gradients: str, save_inputs: str) -> int:
    """Bytes that a real forward, of a later step, keeps and that are neither weights, inputs nor logits."""
    model = llama()
    batch = {name: torch.randint(128, ROWS) for name in ("input_ids", "labels")}
    made = optimizer(model)
    attach(model, made, gradients, save_inputs=save_inputs)
    for _ in range(2):
        model(**batch).loss.backward()
        made.step()
        made.zero_grad()
    # One layer renews, as in a plan; of those that are as large it is the last.
    made.state[model.model.layers[-1].mlp.down_proj.weight][RENEWED_STEP] = -1
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1:] != (128,):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = model(**batch).loss
    for known in (*model.parameters(), *model.buffers(), *batch.values(), loss):
        saved.pop(known.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize(
    ("gradients", "save_inputs"),
    [("full", "projected"), ("fused", "projected"), ("fused", "sampled"), ("fused", "full")],
)
@pytest.mark.broad("fused-projected", "fused-sampled")
def test_they_are_what_a_real_forward_keeps(gradients, save_inputs):
    planned = plan(job(gradients, save_inputs)).held["activations"]
    assert planned == pytest.approx(kept(gradients, save_inputs), rel=0.01)


def test_what_is_saved_of_inputs_is_planned():
    ways = ("full", "projected", "sampled")
    assert sorted(ways, key=lambda way: -plan(job("fused", way)).held["activations"]) == [*ways]


@pytest.mark.slow
def test_fused_layers_save_as_little_where_the_device_is_not_asked_about_a_renewal(monkeypatch):
    asked = plan(job("fused")).held
    monkeypatch.setattr(devices, "runs_ahead", lambda _: True)
    assert plan(job("fused")).held == asked
