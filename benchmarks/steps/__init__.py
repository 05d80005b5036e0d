"""How fast whole training steps of a LLaMA are, and in how much memory: `python -m benchmarks.steps`."""
