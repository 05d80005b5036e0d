"""What the benchmarks share. Nothing here imports this package at once: a published one may stand in its place."""
