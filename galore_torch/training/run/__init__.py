"""One run, whatever its job: its folder, records, checkpoints, signals, progress and plots."""
