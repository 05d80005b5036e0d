"""`param_groups`: what is projected, what is not, and that this is what Transformers would do."""

import re
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)
from transformers.trainer_utils import check_target_module_exists

from galore_torch import GaLoreAdamW, param_groups
from galore_torch.optim import state_bytes
from galore_torch.targets import summarize

SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def llama(**config):
    return LlamaForCausalLM(LlamaConfig(**SMALL, **config))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=48, bos_token_id=0, eos_token_id=1))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2))


def gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=3, head_dim=8))


def train_one_step(model, groups):
    optimizer = GaLoreAdamW(groups, lr=1e-3)
    ids = torch.randint(0, 48, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return optimizer


def projected(groups):
    return {name for group in groups if "rank" in group for name in group["param_names"]}


def claimed(groups):
    return sorted(name for group in groups for name in group["param_names"])


# The same matching as Transformers ------------------------------------------------------------------------------------

TARGETS = {
    "parts": ["attn", "mlp"],
    "one part": ["q_proj"],
    "whole name": ["model.layers.1.mlp.up_proj"],
    "patterns": [r".*layers\.0\..*(q|k)_proj", r"model\.layers\.\d\.mlp\.down_proj"],
    "part and pattern": ["gate_proj", r".*\.[ov]_proj"],
    "pattern of a parent": [r"model\.layers\.0\.mlp", "k_proj"],
    "string": r".*\.(q_proj|up_proj)",
    "string of a whole name": r"model\.layers\.0\.self_attn\.q_proj",
    "all-linear": "all-linear",
    "all_linear": "all_linear",
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.filterwarnings("ignore:matched, but not projected")
def test_targets_match_as_in_transformers(targets, tied, tmp_path):
    model = llama(tie_word_embeddings=tied)
    ours = projected(param_groups(model, 4, targets))
    arguments = TrainingArguments(
        tmp_path, optim="galore_adamw", optim_target_modules=targets, use_cpu=True, report_to="none"
    )
    groups = Trainer.get_optimizer_cls_and_kwargs(arguments, model)[1]["params"]
    theirs = {id(parameter) for group in groups if "rank" in group for parameter in group["params"]}
    assert ours == {name for name, parameter in model.named_parameters() if id(parameter) in theirs}
    if "linear" not in str(targets):
        linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        assert ours == {f"{name}.weight" for name in linear if check_target_module_exists(targets, name)}


@pytest.mark.parametrize("targets", ["attn", "q_proj", ["attention"], [], r"model\.layers"], ids=str)
def test_nothing_matched_lists_what_could(targets):
    message = re.escape(f"target_modules {targets!r} match no linear layer. These could be named: lm_head, model.")
    with pytest.raises(ValueError, match=message + r'.*model\.layers\.\*\.self_attn\.v_proj; or "all-linear"'):
        param_groups(llama(), 4, targets)


def test_a_model_without_linear_layers_is_told():
    with pytest.raises(ValueError, match="has no linear layer that could be projected"):
        param_groups(nn.Sequential(nn.Embedding(8, 4), nn.LayerNorm(4)), 2, "all-linear")


@pytest.mark.parametrize("targets", [["attn", "*_proj"], "*mlp"], ids=str)
def test_what_is_no_pattern_is_told(targets):
    with pytest.raises(ValueError, match=r"target_modules has '\*(_proj|mlp)', which is no regular expression"):
        param_groups(llama(), 4, targets)


# What is projected ----------------------------------------------------------------------------------------------------


def test_by_default_attention_and_mlp_are_projected_and_each_parameter_is_claimed_once():
    model = llama()
    groups = param_groups(model, 4)
    parameters = dict(model.named_parameters())
    assert claimed(groups) == sorted(parameters)
    assert projected(groups) == {name for name in parameters if re.search(r"(self_attn|mlp)\..*_proj\.weight", name)}
    for group in groups:
        assert all(parameters[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))


def test_the_keys_of_a_group_are_those_that_were_asked_for():
    keys = {"update_proj_gap": 7, "scale": 0.5, "proj_type": "left", "decomposition": "svd", "stagger": False}
    keys |= {"cos_threshold": 0.3, "gamma_proj": 1.5, "queue_size": 2}
    plain, made = sorted(param_groups(llama(), 4, **keys), key=len)
    assert {key: made[key] for key in ("rank", *keys)} == {"rank": 4, **keys}
    assert plain.keys() == {"params", "param_names"}


@pytest.mark.parametrize(
    ("key", "value"), [("rank", 0), ("update_proj_gap", 0), ("proj_type", "up"), ("scale", -1.0), ("queue_size", 0)]
)
def test_a_value_out_of_range_is_told(key, value):
    with pytest.raises(ValueError, match=f"{key} is {re.escape(repr(value))}"):
        param_groups(llama(), **{"rank": 4, key: value})


def test_conv1d_of_gpt2_is_projected_and_its_tied_head_is_reported():
    model = gpt2()
    with pytest.warns(UserWarning, match="not projected: lm_head .its weight is tied to a module that is not linear"):
        groups = param_groups(model, 4, "all-linear")
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert projected(groups) == {f"transformer.h.0.{layer}.weight" for layer in layers}
    assert claimed(groups) == sorted(name for name, _ in model.named_parameters())  # the tied weight once
    optimizer = train_one_step(model, groups)
    weight = model.transformer.h[0].attn.c_attn.weight  # a Conv1D's is (in, out)
    assert optimizer.state[weight]["basis"]["left"].shape == (32, 4)
    assert optimizer.state[weight]["inner"]["exp_avg"].shape == (4, 96)


@pytest.mark.parametrize("targets", [("attn", "mlp"), "all-linear"], ids=str)
@pytest.mark.filterwarnings("ignore:matched, but not projected")
def test_experts_have_a_basis_each(targets):
    model = mixtral()
    groups = param_groups(model, 4, targets)
    (stacked,) = (group for group in groups if group.get("layout") == "stack")
    layers = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    assert stacked["param_names"] == [f"{layer}.{name}" for layer in layers for name in ("gate_up_proj", "down_proj")]
    assert claimed(groups) == sorted(name for name, _ in model.named_parameters())
    optimizer = train_one_step(model, groups)
    state = optimizer.state[model.model.layers[0].mlp.experts.gate_up_proj]
    basis = state["basis"]["right"]
    assert basis.shape == (3, 32, 4)
    assert state["inner"]["exp_avg"].shape == (3, 80, 4)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4).expand(3, 4, 4), atol=1e-5, rtol=0)
    assert not torch.allclose(basis[0].abs(), basis[1].abs(), atol=1e-2)


def test_what_is_matched_but_no_linear_layer_is_reported_once_for_all_layers():
    model = gpt_oss()
    with pytest.warns(UserWarning, match="not projected") as caught:
        groups = param_groups(model, 4)
    (warning,) = caught
    kinds = ("experts.down_proj_bias", "experts.gate_up_proj_bias", "router.weight")
    reported = ", ".join(f"model.layers.*.mlp.{kind} (not of a linear layer)" for kind in kinds)
    assert str(warning.message) == f"matched, but not projected: {reported}"
    assert warning.filename == __file__
    assert "model.layers.0.mlp.experts.gate_up_proj" in projected(groups)


def test_tokens_positions_and_convolutions_are_no_experts():
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = nn.ModuleDict({"vit": ViTModel(ViTConfig(**size, image_size=32, patch_size=8)), "conv": nn.Conv1d(8, 8, 3)})
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert projected(param_groups(model, 4, "all-linear")) == linear


def test_a_head_tied_to_the_embedding_is_not_projected_but_reported():
    model = llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="matched, but not projected: lm_head .its weight is tied"):
        groups = param_groups(model, 4, ["q_proj", "lm_head"])
    assert all(name.endswith("q_proj.weight") for name in projected(groups))
    assert claimed(groups).count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in claimed(groups)


def test_linear_layers_that_share_a_weight_are_projected_once():
    model = nn.ModuleDict({"first": nn.Linear(24, 16), "second": nn.Linear(24, 16)})
    model["second"].weight = model["first"].weight
    for targets in ("all-linear", ["second"]):
        groups = param_groups(model, 4, targets)
        assert projected(groups) == {"first.weight"}
        assert claimed(groups) == ["first.bias", "first.weight", "second.bias"]


def test_frozen_parameters_are_left_out():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    groups = param_groups(model, 4)
    assert claimed(groups) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert all(".layers.1." in name for name in projected(groups))
    model.model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match="hold frozen weights only; set requires_grad, or choose others"):
        param_groups(model, 4)


@pytest.mark.parametrize("make", [llama, mixtral, gpt2])
@pytest.mark.filterwarnings("ignore:matched, but not projected")
def test_decay_is_for_matrices_alone_when_it_is_asked_for(make):
    model = make()
    groups = param_groups(model, 4, weight_decay=0.1)
    assert claimed(groups) == sorted(name for name, _ in model.named_parameters())
    for group in groups:
        vectors = {weight.dim() == 1 for weight in group["params"]}
        assert vectors == {group["weight_decay"] == 0.0}
        assert group["weight_decay"] in (0.0, 0.1)
    assert projected(groups) == projected(param_groups(model, 4))
    assert all("weight_decay" not in group for group in param_groups(model, 4))


@pytest.mark.filterwarnings("ignore:matched, but not projected")
def test_biases_and_norms_of_two_dimensions_do_not_decay():
    model = nn.ModuleDict({"moe": gpt_oss(), "norm": nn.LayerNorm((3, 8)), "table": nn.Embedding(4, 4)})
    (undecayed,) = (group for group in param_groups(model, 4, weight_decay=0.1) if group["weight_decay"] == 0.0)
    two_dimensional = {name for name in undecayed["param_names"] if model.get_parameter(name).dim() == 2}
    layers = [f"moe.model.layers.{layer}.mlp.experts" for layer in range(2)]
    biases = {f"{layer}.{name}_proj_bias" for layer in layers for name in ("gate_up", "down")}
    assert two_dimensional == {"norm.weight", "norm.bias", *biases}


# The summary ----------------------------------------------------------------------------------------------------------


def printed_bytes(text, row, column):
    """The number of bytes in a cell of the summary, and the most by which its rounding can be off."""
    cells = re.split(r"\s{2,}", next(line for line in text.splitlines() if line.startswith(row)))
    number, unit = cells[column].split()
    factor = 1000 ** ("B", "kB", "MB", "GB").index(unit)
    return float(number) * factor, 0.051 * factor if factor > 1 else 0


def measured(optimizer):
    """State bytes but those of counters and of the queue of overlaps."""
    counters = [
        value
        for state in optimizer.state.values()
        for key, value in (*state.items(), *state["inner"].items())
        if isinstance(value, torch.Tensor) and (value.dim() == 0 or key == "overlaps")
    ]
    return state_bytes(optimizer) - sum(value.nbytes for value in counters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, mixtral, gpt2])
@pytest.mark.filterwarnings("ignore:matched, but not projected")
def test_the_summary_says_the_bytes_that_are_measured(make, dtype):
    model = make().to(dtype)
    groups = param_groups(model, 4)
    text = summarize(groups)
    said, rounding = printed_bytes(text, "all", 3)
    assert abs(measured(train_one_step(model, groups)) - said) <= rounding
    plain = 2 * sum(weight.numel() * weight.element_size() for weight in model.parameters())
    said, rounding = printed_bytes(text, "all", 4)
    assert abs(plain - said) <= rounding


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=["wide", "tall"])
@pytest.mark.filterwarnings("ignore:rank 3 saves no memory")
def test_of_few_bytes_the_summary_says_each(shape, proj_type):
    model = nn.Linear(*shape, bias=False)
    groups = param_groups(nn.ModuleDict({"mlp": model}), 3, proj_type=proj_type)
    optimizer = GaLoreAdamW(groups)
    model(torch.randn(2, shape[0])).sum().backward()
    optimizer.step()
    assert printed_bytes(summarize(groups), "rank 3", 3) == (measured(optimizer), 0)


def test_the_summary_is_printed_when_asked_for_and_fits_a_terminal(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = param_groups(mixtral(), 4)
        assert capsys.readouterr().out == ""
        param_groups(mixtral(), 4, summary=True)
    text = capsys.readouterr().out
    assert text == summarize(groups) + "\nLinear layers that are not projected: lm_head\n"
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split("  ")[0] for line in text.splitlines()[:-1]]
    assert rows == ["parameters", "rank 4", "rank 4 (experts)", "not projected", "all"]
