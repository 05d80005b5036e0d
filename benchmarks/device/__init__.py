"""One command for a rented GPU: is all of it right there, where does a step's time go, how fast, in how much memory.

python -m benchmarks.device [--only PART,...] [--out FOLDER] [--budget SECONDS] [--small]

Every part has a share of the time. It prints each figure as soon as it has it, and keeps it in PART.json, so that a run
which is cut short has told what it knows; tables come last. With `--small` all of it runs on a CPU, in seconds.
"""
