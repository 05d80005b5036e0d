"""Documents packed into sequences of one length, once for all who have the same tokenizer."""

import dataclasses

import pytest
from transformers import AutoTokenizer

from galore_torch.training.text import packing, sources
from galore_torch.training.text.config import DataConfig
from galore_torch.training.text.packing import END_OF_TEXT, tokenizer_for


@pytest.mark.parametrize("streamed", [False, True])
def test_packing_lays_documents_end_to_end(streamed, texts, cache):
    config = DataConfig(data=str(texts), vocab=400)
    corpus = sources.load(config, 0, cache)
    tokenizer = tokenizer_for(corpus, config, cache)
    few = corpus.train.select(range(4))
    documents = few.to_iterable_dataset() if streamed else few
    packed = [row["input_ids"] for row in packing.pack(documents, tokenizer, 32)]
    assert {len(row) for row in packed} == {32}
    whole = END_OF_TEXT.join(row["text"] for row in few) + END_OF_TEXT
    tokens = [token for row in packed for token in row]
    assert whole.startswith(tokenizer.decode(tokens))
    assert len(tokenizer(whole)["input_ids"]) - len(tokens) < 32


def test_text_is_packed_once_for_a_run_and_for_who_goes_on_with_its_model(texts, cache, tmp_path):
    config = DataConfig(data=str(texts), vocab=400)
    corpus = sources.load(config, 0, cache)
    tokenizer = tokenizer_for(corpus, config, cache)
    tokenizer.save_pretrained(tmp_path / "model")
    saved = AutoTokenizer.from_pretrained(tmp_path / "model", model_max_length=32)
    other = tokenizer_for(corpus, dataclasses.replace(config, vocab=300), cache)
    of_run, of_model, of_other = (packing.pack(corpus.train, one, 32) for one in (tokenizer, saved, other))
    assert of_run.cache_files == of_model.cache_files != of_other.cache_files
    assert of_run[:] == of_model[:] != of_other[:]
    assert (tokenizer.name_or_path, saved.model_max_length) != ("", 0)  # neither was changed


def test_sequences_are_whole_batches_and_the_evaluation_has_its_size(tiny, cache):
    config = tiny(batch=12)
    corpus = sources.load(config.data, 0, cache)
    train, held_out = packing.sequences(
        corpus, tokenizer_for(corpus, config.data, cache), config.data, config.schedule.batch
    )
    assert len(train) % 12 == 0
    assert len(held_out) == 640 // 32


def test_text_for_less_than_a_batch_is_told(tiny, cache):
    config = tiny(batch=100_000, micro_batch=4)
    corpus = sources.load(config.data, 0, cache)
    with pytest.raises(ValueError, match=r"fills \d+ sequences of 32 tokens, less than one batch of 100000.*--batch"):
        packing.sequences(corpus, tokenizer_for(corpus, config.data, cache), config.data, config.schedule.batch)
