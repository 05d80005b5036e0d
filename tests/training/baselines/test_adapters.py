"""Adapters: which weights they stand for, how they start, what they freeze, and that merging takes them out again."""

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
)

from galore_torch.training.baselines.layers import LowRankLinear, adapt, lora_layers, merged
from galore_torch.training.settings.adapter import AdapterConfig, resolved
from galore_torch.training.settings.optimizer import MATRICES

TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
}  # fmt: skip
KINDS = ("low-rank", "lora", "relora")
TOKENS = torch.arange(64)[None]


@pytest.fixture
def model():
    torch.manual_seed(0)
    # torch's own attention in bfloat16 fails where ATEN_CPU_CAPABILITY says less than the processor can.
    return LlamaForCausalLM(LlamaConfig(**TINY, use_cache=False, attn_implementation="eager"))


def config(kind, rank=4, **given):
    return AdapterConfig(adapter=kind, adapter_rank=rank, **given)


def stir(model):
    """As if trained: every trainable weight is moved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits


def test_none_leaves_the_model_alone(model):
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert adapt(model, AdapterConfig(), MATRICES) is model
    assert merged(model) is model
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_from_scratch_is_adapters_and_all_but_the_matrices(model, kind):
    before = dict(model.named_parameters())
    matrices = {name for name in before if "attn" in name or "mlp" in name}
    adapted = adapt(model, config(kind), MATRICES)
    assert type(adapted) is LlamaForCausalLM
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert before.keys() - matrices < trained
    adapters = trained - before.keys()
    assert len(adapters) == 2 * len(matrices) == 2 * 14
    shapes = {(32, 32): 8, (64, 32): 4, (32, 64): 2}
    assert sum(adapted.get_parameter(name).numel() for name in adapters) == sum(
        4 * (m + n) * count for (m, n), count in shapes.items()
    )
    frozen = {name for name, parameter in adapted.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == (0 if kind == "low-rank" else 14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_a_plain_model_that_computes_the_same(model, kind, dtype):
    names = [name for name, _ in model.named_parameters()]
    given = {} if kind == "low-rank" else {"adapter_dropout": 0.5, "adapter_alpha": 4.0}
    adapted = adapt(model.to(dtype), config(kind, **given), MATRICES)
    stir(adapted)
    before = logits(adapted).float()
    plain = merged(adapted)
    assert [name for name, _ in plain.named_parameters()] == names
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert all(type(module) is nn.Linear for name, module in plain.named_modules() if name.endswith("proj"))
    error = (logits(plain).float() - before).norm() / before.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("kind", ["lora", "relora"])
def test_lora_begins_as_the_model_itself(model, kind):
    before = logits(model)
    adapted = adapt(model, config(kind, adapter_alpha=16.0, adapter_dropout=0.1), MATRICES)
    assert torch.equal(logits(adapted), before)
    for _, layer in lora_layers(adapted):
        assert layer.scaling["default"] == 16.0 / 4
        assert layer.lora_dropout["default"].p == 0.1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(128, 512), (512, 128)])
def test_a_product_spreads_as_the_matrix_did_and_keeps_the_bias(shape, bias):
    torch.manual_seed(0)
    linear = nn.Linear(*shape, bias=bias)
    nn.init.normal_(linear.weight, std=0.02)
    low_rank = LowRankLinear(linear, 32)
    product = low_rank.B.weight @ low_rank.A.weight
    assert product.shape == linear.weight.shape
    assert product.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.linalg.matrix_rank(product) == 32
    assert low_rank.B.bias is linear.bias
    x = torch.randn(8, shape[0])
    torch.testing.assert_close(low_rank(x), low_rank.merged()(x))


def test_a_trained_model_is_frozen_but_for_adapters_and_the_head_of_its_task():
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**TINY, num_labels=3))
    adapted = adapt(model, config("lora"), ["query", "value"], task_type="SEQ_CLS")
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        f"classifier.{layer}.{attribute}" for layer in ("dense", "out_proj") for attribute in ("weight", "bias")
    }
    assert len(trained) == 4 + 2 * 2 * 2
    model = RobertaForQuestionAnswering(RobertaConfig(**TINY))
    adapted = adapt(model, config("lora"), ["query"], task_type="QUESTION_ANS")
    assert sum(one.requires_grad for one in adapted.parameters()) == 2 + 2 * 2
    causal = adapt(LlamaForCausalLM(LlamaConfig(**TINY)), config("lora"), MATRICES, task_type="CAUSAL_LM")
    assert all("lora_" in name for name, parameter in causal.named_parameters() if parameter.requires_grad)


@pytest.mark.filterwarnings("error")
def test_gpt2_whose_matrices_lie_the_other_way_round_is_adapted_too():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    adapted = adapt(model, config("lora"), MATRICES)
    stir(adapted)
    before = logits(adapted)
    torch.testing.assert_close(logits(merged(adapted)), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("lora", {"rank": None}, ["adapter_rank = None"]),
        ("lora", {"rank": 33}, ["adapter_rank = 33", "32 x 32", "at most 32"]),
        ("low-rank", {"rank": 64}, ["adapter_rank = 64", "at most 32"]),
    ],
)
def test_a_rank_that_no_matrix_has_is_told_and_changes_nothing(model, kind, given, words):
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"\S") as caught:
        adapt(model, config(kind, **given), MATRICES)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert [name for name, _ in model.named_parameters()] == before


def test_modules_that_do_not_exist_and_trained_models_without_their_matrices_are_told(model):
    with pytest.raises(ValueError, match="match no linear layer"):
        adapt(model, config("lora"), ["query"])
    with pytest.raises(ValueError, match="discards the pretrained weights"):
        adapt(model, config("low-rank"), MATRICES, task_type="CAUSAL_LM")
    assert all(type(module) is not LowRankLinear for module in model.modules())


def test_a_missing_library_is_told_with_the_line_that_installs_it(model, monkeypatch):
    monkeypatch.setattr("galore_torch.training.baselines.layers.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        adapt(model, config("lora"), MATRICES)


def test_settings_that_others_decide_are_filled_in_once():
    given = AdapterConfig(adapter="relora")
    assert resolved(AdapterConfig(), rank=8, steps=100) == AdapterConfig()
    known = resolved(given, rank=8, steps=100)
    assert (known.adapter_rank, known.restart_every) == (8, 25)
    assert resolved(known, rank=4, steps=400) == known
    assert resolved(given, rank=8, steps=2).restart_every == 1
