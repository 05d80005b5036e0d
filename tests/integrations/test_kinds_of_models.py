"""Models that are no causal language models, each by the trainer that people use for it: trained, saved, resumed."""

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import (
    BertConfig,
    BertModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
    set_seed,
)

from galore_torch.integrations.transformers import GaLoreFactory
from tests.integrations.small_mistral import assert_falls, documents, tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.learning]

STEPS, SAVED, ROWS = 12, 6, 32
FACTORY = (GaLoreFactory, {"rank": 4, "update_proj_gap": 3, "scale": 1.0, "gradients": "fused"})


def arguments(folder, kind=TrainingArguments):
    return kind(
        str(folder), max_steps=STEPS, save_steps=SAVED, logging_steps=1, learning_rate=0.01, use_cpu=True,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, report_to="none", disable_tqdm=True,
    )  # fmt: skip


def vision(folder, checkpoint=None):
    """A ViT that tells bright images from dark ones.

    Transformers 5.23 saves it with the names of weights of earlier releases, and its Trainer then leaves the layers of
    a resumed model as they were, with any optimizer: it is given the checkpoint's.
    """
    set_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        num_labels=2,
    )  # fmt: skip
    labels = torch.arange(ROWS) % 2
    images = torch.randn(ROWS, 3, 16, 16) + labels[:, None, None, None]
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    kind = ViTForImageClassification
    model = kind(config) if checkpoint is None else kind.from_pretrained(checkpoint)
    return Trainer(model, arguments(folder), train_dataset=rows, optimizer_cls_and_kwargs=FACTORY)


def speech(folder, checkpoint=None):
    """A Whisper that learns some words by heart."""
    set_seed(0)
    config = WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=16,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    heard, words = torch.randn(ROWS, 8, 32), torch.arange(3, 3 + 8).repeat(ROWS, 1)
    rows = [{"input_features": sound, "labels": said} for sound, said in zip(heard, words, strict=True)]
    return Trainer(
        WhisperForConditionalGeneration(config), arguments(folder), train_dataset=rows, optimizer_cls_and_kwargs=FACTORY
    )


def sentences(folder, checkpoint=None):
    """An encoder that finds the end of a text by its beginning."""
    set_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder.parent / "encoder")
    tokenizer().save_pretrained(folder.parent / "encoder")
    encoder = Transformer(str(folder.parent / "encoder"), max_seq_length=16)
    model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension())], device="cpu")
    pairs = {
        "anchor": [text[:40] for text in documents()[:ROWS]],
        "positive": [text[40:] for text in documents()[:ROWS]],
    }
    return SentenceTransformerTrainer(
        model, arguments(folder, SentenceTransformerTrainingArguments), train_dataset=Dataset.from_dict(pairs),
        loss=MultipleNegativesRankingLoss(model), optimizer_cls_and_kwargs=FACTORY,
    )  # fmt: skip


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("make", [vision, speech, sentences])
def test_it_trains_saves_and_resumes(make, tmp_path):
    whole = make(tmp_path / "whole")
    whole.train()
    assert_falls(losses(whole))
    projected = [group for group in whole.optimizer.optimizer.param_groups if "rank" in group]
    assert sum(len(group["params"]) for group in projected) >= 2 * 6  # of each layer's attention and MLP
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{SAVED}")
    resumed = make(tmp_path / "resumed", checkpoint)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses(resumed)[SAVED:] == losses(whole)[SAVED:]
    for (name, weight), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(weight, other), name
