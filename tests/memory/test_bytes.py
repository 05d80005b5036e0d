"""What is planned of weights, gradients, states and bases is what is allocated, to the byte."""

import warnings

import pytest
import torch
import transformers

from galore_torch import GaLore, attach
from galore_torch.memory import Job, plan, stored_bytes
from galore_torch.optim import state_bytes
from galore_torch.training.planning.subject import Subject, subject
from galore_torch.training.settings.methods import METHODS

HELD = ("weights", "gradients", "states", "bases")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
SMALL = {
    "llama": ("LlamaForCausalLM", {**SIZES, "intermediate_size": 96}),
    "encoder": ("BertForMaskedLM", {**SIZES, "intermediate_size": 64, "max_position_embeddings": 32}),
    "classifier": ("RobertaForSequenceClassification", {**SIZES, "intermediate_size": 64, "num_labels": 3}),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128,
         "decoder_start_token_id": 0},
    ),
    "experts": (
        "MixtralForCausalLM",
        {**SIZES, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 32}),
}  # fmt: skip
"""An architecture of each kind, with few sizes."""


def of(name: str, tmp_path, **given) -> Subject:
    kind, sizes = SMALL[name]
    config = getattr(transformers, kind).config_class(**sizes)
    config.architectures = [kind]
    config.save_pretrained(tmp_path)
    return subject(
        str(tmp_path / "config.json"), {"rank": 8, "batch": 2, "micro_batch": 2, "seq": 8, **given}, "float32"
    )


def allocated(planned: Subject, job: Job, method: str) -> dict[str, int]:
    """What two real steps hold."""
    torch.manual_seed(0)
    dtype = planned.model.dtype
    model = type(planned.model)(planned.model.config)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job.prepare(model.train())
        optimizer = job.optimizer(model)
        if isinstance(optimizer, GaLore):
            attach(model, optimizer, job.gradients, job.update, grad_bits=job.grad_bits)
        for _ in range(2):
            batch = {name: torch.randint(1, 3, shape) for name, shape in job.batch.items()}
            model(**batch).loss.backward()
            gradients = stored_bytes(weight.grad for weight in model.parameters() if weight.requires_grad)
            optimizer.step()
            optimizer.zero_grad()
    bases = stored_bytes(one for state in optimizer.state.values() for one in _tensors(state.get("basis", {})))
    weights = stored_bytes([*model.parameters(), *model.buffers()])
    return {"weights": weights, "gradients": gradients, "states": state_bytes(optimizer) - bases, "bases": bases}


def _tensors(tree):
    return [one for value in tree.values() for one in (_tensors(value) if isinstance(value, dict) else [value])]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.broad("full", "galore")
def test_of_every_method(method, tmp_path):
    planned = of("llama", tmp_path)
    job = planned.job(method)
    held = plan(job).held
    assert {kind: held[kind] for kind in HELD} == allocated(planned, job, method)


@pytest.mark.parametrize("gradients", ["full", "projected", "fused"])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.broad("16-fused")
def test_of_every_form_of_gradients(gradients, bits, tmp_path):
    given = {} if gradients == "full" else {"grad_bits": bits}
    planned = of("llama", tmp_path, gradients=gradients, **given)
    job = planned.job("galore")
    held = plan(job).held
    assert {kind: held[kind] for kind in HELD} == allocated(planned, job, "galore")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["galore", "galore-muon"])
@pytest.mark.parametrize("bits", [8, 4])
def test_of_embeddings_and_head_in_few_bits(bits, method, tmp_path):
    planned = of("llama", tmp_path, others_bits=bits)
    job = planned.job(method)
    held = plan(job).held
    assert {kind: held[kind] for kind in HELD} == allocated(planned, job, method)
    whole = plan(of("llama", tmp_path).job(method)).held
    assert whole["states"] - held["states"] > 2 * 128 * 32 * 2 * (4 - bits / 8 - 0.1) - 4 * 4 * 2**bits


PRESETS = [
    *(("llama-tiny", method, {}) for method in ("full", "galore", "qgalore")),
    *(("llama-60m", method, {}) for method in ("full", "galore")),
    ("llama-60m", "qgalore", {"layers": 2}),
    *((preset, method, {"layers": 2}) for preset in ("llama-130m", "llama-350m") for method in ("full", "galore")),
]
"""Of the larger ones two layers of their width, for all are alike; in few bits a real step of all takes minutes."""


@pytest.mark.parametrize("method", ["full", "galore"])
@pytest.mark.parametrize("architecture", [name for name in SMALL if name != "llama"])
@pytest.mark.broad("gpt2-full")
def test_of_every_architecture(architecture, method, tmp_path):
    planned = of(architecture, tmp_path)
    job = planned.job(method)
    held = plan(job).held
    assert {kind: held[kind] for kind in HELD} == allocated(planned, job, method)


@pytest.mark.slow
@pytest.mark.usefixtures("bfloat16_in_float32")
@pytest.mark.parametrize(("preset", "method", "given"), PRESETS)
def test_of_presets(preset, method, given):
    planned = subject(preset, {"micro_batch": 1, "batch": 1, "seq": 8, **given}, None)
    job = planned.job(method)
    held = plan(job).held
    assert {kind: held[kind] for kind in HELD} == allocated(planned, job, method)
