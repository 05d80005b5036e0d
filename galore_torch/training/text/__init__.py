"""Text to train on: where it comes from, its tokenizer, packed into sequences."""
