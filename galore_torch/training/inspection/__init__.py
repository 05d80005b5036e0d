"""``galore inspect``: how few dimensions hold the gradients, and for how many steps the same few do."""
