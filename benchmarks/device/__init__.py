"""Whether all is right on a GPU, where a step's time goes, how fast it is: `python -m benchmarks.device`."""
