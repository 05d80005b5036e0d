"""ReLoRA's restarts: the function stays, adapters begin again, most of the state is gone, the schedule is jagged."""

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainerState, TrainingArguments

from galore_torch.training.baselines.layers import adapt, lora_layers
from galore_torch.training.baselines.restarts import Restarts, callbacks_for, jagged, prune_state, restart
from galore_torch.training.pretrain.presets import configure
from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run import records
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.run import new_run
from galore_torch.training.settings.adapter import AdapterConfig
from galore_torch.training.settings.optimizer import MATRICES

RELORA = AdapterConfig(adapter="relora", adapter_rank=4, restart_every=3, restart_warmup=0.5)
TOKENS = torch.arange(64)[None]


@pytest.fixture
def model():
    torch.manual_seed(0)
    tiny = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, use_cache=False
    )
    return adapt(LlamaForCausalLM(tiny), RELORA, MATRICES)


def trained(model, **given):
    """The optimizer that has moved the model some steps."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.01, **given)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits


def test_a_restart_keeps_the_function_and_begins_the_adapters_again(model):
    optimizer = trained(model)
    layers = dict(lora_layers(model))
    before, parameters = logits(model), dict(model.named_parameters())
    matrices = {name: layer.base_layer.weight.clone() for name, layer in layers.items()}
    drawn = {name: layer.lora_A["default"].weight.clone() for name, layer in layers.items()}
    products = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    restart(model, optimizer, 0.9, 0)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    for name, layer in layers.items():
        assert torch.linalg.matrix_rank(products[name]) == 4
        assert torch.equal(layer.base_layer.weight, matrices[name] + products[name])
        assert not layer.base_layer.weight.requires_grad
        assert not layer.lora_B["default"].weight.any()
        assert not torch.equal(layer.lora_A["default"].weight, drawn[name])
    assert {name: id(one) for name, one in parameters.items()} == {
        name: id(one) for name, one in model.named_parameters()
    }


def test_restarts_add_up_to_more_than_the_rank(model):
    layer = dict(lora_layers(model))["model.layers.0.mlp.up_proj"]
    first = layer.base_layer.weight.clone()
    for seed in range(3):
        restart(model, trained(model), 1.0, seed)
    assert torch.linalg.matrix_rank(layer.base_layer.weight - first, rtol=1e-4) == 12


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99])
def test_the_smallest_numbers_of_the_adapters_state_are_gone_and_nothing_else(model, share):
    optimizer = trained(model)
    weights = [weight for _, layer in lora_layers(model) for weight in layer.parameters()]
    adapters = {id(weight) for weight in weights if weight.requires_grad}  # not the matrices, which are frozen
    before = {
        weight: {name: value.clone() for name, value in state.items()} for weight, state in optimizer.state.items()
    }
    restart(model, optimizer, share, 0)
    assert adapters < {id(weight) for weight in optimizer.state}
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            old = before[weight][name]
            if id(weight) not in adapters or name == "step":
                assert torch.equal(value, old)
                continue
            left = value != 0
            assert torch.equal(value[left], old[left])
            gone = int(share * value.numel())
            assert (~left).sum() == max(gone, (old == 0).sum())
            if gone:
                assert old[~left].abs().max() <= value[left].abs().min()


def test_all_of_the_state_is_begun_anew_at_one(model):
    optimizer = trained(model)
    weight = dict(lora_layers(model))["model.layers.0.self_attn.q_proj"].lora_A["default"].weight
    kept = model.lm_head.weight
    restart(model, optimizer, 1.0, 0)
    assert weight not in optimizer.state
    assert optimizer.state[kept]["step"] == 3
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert optimizer.state[weight]["step"] == 1


def test_state_of_another_shape_or_none_is_left_alone():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    prune_state(optimizer, [weight], 0.5)
    optimizer.state[weight] = {"row": torch.ones(4), "count": 3, "none": None}
    prune_state(optimizer, [weight], 0.5)
    assert optimizer.state[weight]["row"].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("every", "warmup", "expected"),
    [
        (4, 2, [1, 1, 1, 1, 0, 0.5, 1, 1, 0, 0.5]),
        (4, 0, [1] * 10),
        (3, 2, [1, 1, 1, 0, 0.5, 1, 0, 0.5, 1, 0]),
        (20, 5, [1] * 10),
    ],
)
def test_a_schedule_drops_at_restarts_and_rises_to_the_smooth_one(every, warmup, expected):
    assert [jagged(lambda step: 1.0, every, warmup)(step) for step in range(10)] == expected
    smooth = [jagged(lambda step: 10.0 - step, every, warmup)(step) for step in range(10)]
    assert smooth == [factor * (10 - step) for step, factor in enumerate(expected)]


class Norms(TrainerCallback):
    """The adapters' norm after each step, once all else has seen the step."""

    def __init__(self):
        self.norms = []

    def on_step_end(self, args, state, control, model=None, **_):
        self.norms.append(sum(layer.lora_B["default"].weight.norm().item() for _, layer in lora_layers(model)))


def test_a_run_restarts_when_it_is_time_but_not_after_its_last_step(texts, cache, tmp_path):
    config = configure(
        "llama-tiny", method="relora", data=str(texts), cache=str(cache), vocab=400, seq=32, eval_tokens=640, hidden=32,
        intermediate=64, layers=1, heads=2, rank=4, steps=12, batch=4, micro_batch=4, eval_every=0, warmup=0.25, lr=0.1,
        restart_every=4, restart_warmup=0.5, final_lr=1.0,
    )  # fmt: skip
    seen = Norms()
    new_run(Pretraining, config, tmp_path / "run", callbacks=[seen]).train()
    begun = [step for step, norm in enumerate(seen.norms, 1) if norm == 0]
    assert begun == [1, 4, 5, 8, 9]  # the first step of each rise has a learning rate of zero
    rates = [record["lr"] for record in records.read(RunFolder(tmp_path / "run").metrics) if "lr" in record]
    third = 0.1 / 3
    assert rates == pytest.approx([0, third, 2 * third, 0.1, 0, 0.05, 0.1, 0.1, 0, 0.05, 0.1, 0.1])


def test_only_relora_restarts_and_only_with_a_schedule_that_is_a_function_of_the_step(tmp_path):
    assert callbacks_for(AdapterConfig()) == callbacks_for(AdapterConfig(adapter="lora")) == []
    (callback,) = callbacks_for(RELORA)
    assert (callback.every, callback.warmup, callback.prune) == (3, 2, 0.99)
    with pytest.raises(ValueError, match="restart_every = None"):
        Restarts(AdapterConfig(adapter="relora"))
    plateau = ReduceLROnPlateau(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[])
    with pytest.raises(ValueError, match="is not a function of the step"):
        callback.on_train_begin(arguments, TrainerState(), None, lr_scheduler=plateau)
