"""A model of many blocks that are all alike is planned from two of them, as if all of it were rehearsed."""

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from galore_torch import GaLoreAdamW, param_groups
from galore_torch.memory import Job, known, plan
from galore_torch.memory.recorder import FIRST_STEP, Recorder
from galore_torch.optim.state_size import stored_in
from galore_torch.training.planning.subject import subject
from galore_torch.training.settings.methods import METHODS

FEW_ROWS = {"layers": 5, "batch": 4, "micro_batch": 2, "seq": 64}


def without_work(kinds):
    """What grows with blocks: work is one operation's, of chunks that many small weights fill more than few."""
    return {kind: count for kind, count in kinds.items() if kind != "work"}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "relora"])
@pytest.mark.broad("galore", "galore-8bit-per-layer")
def test_each_phase_is_that_of_all_blocks(method):
    job = subject("llama-tiny", FEW_ROWS, None).job(method)
    few, whole = plan(job), plan(job, exact=True)
    assert (few.parameters, few.trained) == (whole.parameters, whole.trained)
    assert without_work(few.held) == without_work(whole.held)
    for phase, kinds in few.phases.items():
        if phase == FIRST_STEP:  # whose highest moment is where most work is, which more blocks may put elsewhere
            continue
        assert without_work(kinds) == without_work(whole.phases[phase]), phase


@pytest.mark.slow
def test_so_it_is_where_activations_are_computed_again():
    job = subject("llama-tiny", {**FEW_ROWS, "batch": 2, "gradient_checkpointing": True}, None).job("full")
    few, whole = plan(job), plan(job, exact=True)
    assert few.phase == whole.phase
    assert without_work(few.peak) == without_work(whole.peak)


def test_blocks_that_are_trained_in_different_ways_are_all_rehearsed():
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=4, use_cache=False)
    job = Job(
        model=transformers.LlamaForCausalLM(config),
        optimizer=lambda model: GaLoreAdamW(param_groups(model, rank=4, target_modules=r".*layers\.1\.mlp.*")),
        batch={"input_ids": (2, 8), "labels": (2, 8)},
    )
    assert plan(job) == plan(job, exact=True)


@pytest.mark.parametrize(
    "operation",
    [
        lambda one: one + 1,
        lambda one: one.t(),
        lambda one: one.t() @ one,
        lambda one: one.mul_(2),
        lambda one: one[1:].to(torch.bfloat16),
        lambda one: one.split(3)[1],
        lambda one: one.max(dim=0)[1],
        lambda one: torch.cat([one, one]),
        lambda one: torch.linalg.qr(one)[0],
        lambda one: torch.zeros(3, 4, device=one.device),
    ],
)
def test_what_an_operation_returns_is_known_from_the_first_time(operation, monkeypatch):
    monkeypatch.setattr(known, "_KNOWN", {})
    mode = FakeTensorMode()
    with mode:
        given = torch.empty(8, 4)
    with mode, Recorder():
        first, second = operation(given), operation(given)
    form = [
        (one.shape, one.stride(), one.storage_offset(), one.dtype, one.device, one.untyped_storage().nbytes())
        for one in (first, second)
    ]
    assert form[0] == form[1]
    assert stored_in(second)[0] is second
    shares = [one.untyped_storage()._cdata == given.untyped_storage()._cdata for one in (first, second)]
    assert shares[0] == shares[1]
    assert second.fake_mode is mode
