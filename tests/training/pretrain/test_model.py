"""A model is made one layer at a time, and is the one that Transformers would have made at once."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from galore_torch.training.pretrain.model import fresh_llama

ARCHITECTURE = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, pad_token_id=3
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_those_of_the_constructor(dtype):
    torch.manual_seed(5)
    oracle = LlamaForCausalLM(ARCHITECTURE)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    model = fresh_llama(ARCHITECTURE, dtype)
    assert torch.equal(torch.get_rng_state(), after)
    kept, wanted = model.state_dict(), oracle.state_dict()
    assert list(kept) == list(wanted)
    assert all(torch.equal(kept[name], weight.to(dtype)) for name, weight in wanted.items())
    assert not kept["model.embed_tokens.weight"][3].any()
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_buffers_are_exact_whatever_the_dtype():
    wanted = dict(LlamaForCausalLM(ARCHITECTURE).named_buffers())
    kept = dict(fresh_llama(ARCHITECTURE, torch.bfloat16).named_buffers())
    assert kept.keys() == wanted.keys()
    assert all(torch.equal(kept[name], buffer) for name, buffer in wanted.items())


def test_each_layer_is_told_as_soon_as_it_stands():
    layers = []

    def note(module):
        if isinstance(module, LlamaDecoderLayer):
            layers.append(all(not weight.is_meta for weight in module.parameters()))
            module.mlp = torch.nn.Identity()  # as who quantizes a layer replaces what is in it

    model = fresh_llama(ARCHITECTURE, torch.float32, note)
    assert layers == [True, True]
    assert [type(layer.mlp) for layer in model.model.layers] == [torch.nn.Identity] * 2
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert model(input_ids=ids, labels=ids).loss.isfinite()
