"""Training steps of LLaMA-7B on a CPU: `python -m benchmarks.llama_7b`."""
