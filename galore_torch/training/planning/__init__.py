"""``galore plan``: what a training will need of memory, by method."""
