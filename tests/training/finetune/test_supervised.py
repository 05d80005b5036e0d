"""Supervised fine-tuning of causal models: what is learnt from, by every form of rows, and what is left behind."""

import json

import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from galore_torch.training.finetune.run import Finetuning
from galore_torch.training.run import records
from galore_torch.training.run.run import new_run
from galore_torch.training.settings.methods import TUNING
from tests.training.finetune.conftest import losses, sentences
from tests.training.learning import learns


def chats():
    return [
        {"messages": [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": name}]}
        for text, name in sentences()[:48]
    ]


def learnt(run) -> list[str]:
    """The texts of the first batch that count for the loss, special tokens included."""
    batch = next(iter(run.trainer.get_train_dataloader()))
    return [
        run.job.tokenizer.decode(ids[labels != -100])
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


@pytest.mark.slow
@pytest.mark.learning
@pytest.mark.parametrize("method", TUNING)
def test_every_method_learns(supervise, tmp_path, method):
    given = {"rank": 8} if "galore" in method or "lora" in method else {}
    if "galore" in method:
        given["update_proj_gap"] = 5
    if method == "relora":  # the steps after a restart are large until the new moments know the gradients
        given |= {"restart_every": 24, "restart_warmup": 0.9}
    # An adapter's product begins at zero, and a random frozen model gives it little to work with.
    steps, lr, share = (48, 3e-3, 0.95) if "lora" in method else (16, 1e-2, 0.7)
    result = learns(
        new_run(Finetuning, supervise(method=method, steps=steps, lr=lr, answers=0, **given), tmp_path / "run"), share
    )
    assert result.finished
    final = records.final(tmp_path / "run" / "metrics.jsonl")
    assert final["scores"] == {"perplexity": pytest.approx(records.perplexity(result.eval_loss))}


def test_of_prompt_and_completion_the_completion_alone_is_learnt(supervise, tmp_path):
    run = new_run(Finetuning, supervise(), tmp_path / "run")
    assert {text.replace("</s>", "") for text in learnt(run)} <= {"calendar", "heapq"}
    run.train()
    said = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert len(said) == 2
    assert all(row["input"].strip() in {text for text, _ in sentences()} for row in said)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.chat_template


def test_of_messages_all_or_the_answers_are_learnt(supervise, write, tmp_path):
    data = write("chats.jsonl", chats())
    whole = new_run(Finetuning, supervise(data=data), tmp_path / "whole")
    assert all(text.startswith("<|user|>") for text in learnt(whole))
    answers = new_run(Finetuning, supervise(data=data, answers_only=True), tmp_path / "answers")
    assert {text.replace("</s>", "") for text in learnt(answers)} <= {"calendar", "heapq"}
    result = answers.train()
    assert result.finished
    said = [json.loads(line) for line in (tmp_path / "answers" / "predictions.jsonl").read_text().splitlines()]
    assert all(row["input"].endswith("<|assistant|>") for row in said)


def test_plain_text_is_learnt_whole(supervise, write, tmp_path):
    rows = [{"line": text} for text, _ in sentences()[:48]]
    run = new_run(Finetuning, supervise(data=write("text.csv", rows), text_column="line"), tmp_path / "run")
    assert {text.replace("</s>", "").replace("<s>", "") for text in learnt(run)} <= {row["line"] for row in rows}


@pytest.mark.parametrize("gradients", [None, "fused"])
@pytest.mark.broad("fused")
def test_micro_batches_make_their_batch(supervise, tmp_path, gradients):
    how = (
        {"method": "galore", "rank": 4, "update_proj_gap": 2, "gradients": gradients}
        if gradients
        else {"method": "full"}
    )
    for name, micro in (("whole", 8), ("parts", 2)):
        new_run(Finetuning, supervise(steps=4, micro_batch=micro, **how), tmp_path / name).train()
    whole, parts = (torch.tensor(losses(tmp_path / name)) for name in ("whole", "parts"))
    torch.testing.assert_close(whole, parts, rtol=2e-3, atol=0)


# GGUF ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(causal, tmp_path):
    """The causal model as a GGUF file, as llama.cpp's converter names things."""
    model = LlamaForCausalLM.from_pretrained(causal)
    config = model.config
    folder = tmp_path / "packed"
    folder.mkdir()
    writer = GGUFWriter(str(folder / "model.gguf"), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    state = json.loads((causal / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token.startswith("<") else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    places = {
        "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
        "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        kind = parts[-2]
        if kind in heads:  # llama.cpp keeps the two halves of each rotated pair side by side
            tensor = tensor.view(heads[kind], 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        block = f"blk.{parts[2]}." if "layers" in parts else ""
        writer.add_tensor(f"{block}{places[kind]}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.mark.slow
def test_a_gguf_file_is_trained_as_the_model_that_it_holds(packed, supervise, tmp_path):
    run = new_run(Finetuning, supervise(model=str(packed), gguf_file="model.gguf", steps=4), tmp_path / "packed-run")
    whole = new_run(Finetuning, supervise(steps=4), tmp_path / "run")
    ids = torch.arange(20)[None] + 10
    torch.testing.assert_close(run.model(ids).logits, whole.model(ids).logits, atol=1e-5, rtol=1e-4)
    assert run.train().finished
