"""What an optimizer costs in a step on the weights of a LLaMA: `python -m benchmarks.step`."""
