"""A study of how well ways to train learn: many small LLaMAs, each method at its best rates, over three seeds.

    python -m benchmarks.study --prepare tokens.pt                  # once: the text, tokenized by `galore pretrain`
    python -m benchmarks.study tokens.pt --device cuda --workers 6 --streams 4 --budget 200 --out study.jsonl
    python -m benchmarks.study --table study.jsonl [--plot rates.png] [--curves curves.png]

Rates of the layers' matrices and of embeddings, head and norms are searched apart, in doublings, until the best pair is
surrounded by worse ones; then the best pair, and later the second, is trained with two more seeds. The order is that
of importance, and each training that ends is a line of JSON, so that a study that is cut short keeps what it knows;
one that finds lines in its file goes on from there. Processes take turns at one GPU, and the trainings of a process
overlap there, each in its own stream.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.study import training
from benchmarks.study.methods import METHODS
from benchmarks.study.plan import wanted
from benchmarks.study.results import plot, plot_curves, print_tables
from benchmarks.study.training import Job

Line = dict[str, Any]
"""A training and what came of it."""


def read(path: Path) -> list[Line]:
    """Return the lines of a file; a last one that was cut off is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def job_of(line: Line) -> Job:
    """Return the training of a line."""
    return Job(**{field.name: line[field.name] for field in fields(Job)})


def study(given: argparse.Namespace, methods: Sequence[str]) -> list[Line]:
    """Train for as long as the budget says, and return all lines."""
    began_s = time.monotonic()
    lines = read(given.out)
    known = {job_of(line): float(line["perplexity"]) for line in lines}
    taken = set(known)
    context = multiprocessing.get_context("spawn")  # what has been forked may not use a GPU
    idle: list[Connection] = []
    processes = []
    for _ in range(given.workers):
        pipes = [context.Pipe() for _ in range(given.streams)]
        theirs = [end for _, end in pipes]
        processes.append(context.Process(target=training.serve, args=(theirs, given.text, given.device), daemon=True))
        processes[-1].start()
        for end in theirs:
            end.close()
        idle += [end for end, _ in pipes]
    running: dict[Connection, Job] = {}
    while (left_s := given.budget - (time.monotonic() - began_s)) > 0:
        while idle and (job := next((one for one in wanted(known, methods) if one not in taken), None)):
            taken.add(job)
            running[here := idle.pop(0)] = job
            here.send(job)
        if not running:
            break
        for ended in wait(list(running), timeout=left_s):
            assert isinstance(ended, Connection)
            job = running.pop(ended)
            try:
                result = ended.recv()
            except (EOFError, OSError):  # its process has died: others go on, and this one is not tried again
                print(f"a process died at {job}", flush=True)
                continue
            idle.append(ended)
            known[job] = result["perplexity"]
            lines.append({**asdict(job), **result, "at_s": round(time.monotonic() - began_s, 1)})
            with given.out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            told = {name: value for name, value in lines[-1].items() if name not in ("curve", "state_bytes")}
            print(*(f"{value:.5g}" if isinstance(value, float) else value for value in told.values()), flush=True)
    for process in processes:
        process.kill()
    return lines


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__, formatter_class=raw)
    add = made.add_argument
    add("text", type=Path, nargs="?", help="the prepared text")
    add("--prepare", type=Path, metavar="FILE", help="write the prepared text, and nothing more")
    add("--table", type=Path, metavar="FILE", help="print the tables of a study's lines, and nothing more")
    add("--plot", type=Path, metavar="PNG", help="draw perplexities over rates too")
    add("--curves", type=Path, metavar="PNG", help="draw losses over tokens too")
    add("--only", help="methods, with commas between: all by default that may share a process")
    add("--device", choices=["cuda", "cpu"], default="cpu", help="where to train (cpu)")
    add("--workers", type=int, default=1, help="processes (1)")
    add("--streams", type=int, default=1, help="trainings that take turns in each process (1)")
    add("--budget", type=float, default=3600.0, help="seconds for all of it (3600)")
    add("--out", type=Path, default=Path("study.jsonl"), help="file of the lines; one that exists is gone on with")
    add("--small", action="store_true", help="a model of next to nothing on random tokens, to rehearse")
    return made


def main(arguments: list[str] | None = None) -> list[Line]:
    """Do what the command line asks for, and return a study's lines."""
    command = parser()
    given = command.parse_args(arguments)
    together = [name for name, method in METHODS.items() if not method.alone]
    methods = together if given.only is None else [name for name in given.only.split(",") if name]
    if unknown := [name for name in methods if name not in METHODS]:
        command.error(f"--only names {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    if given.streams > 1 and (lonely := [name for name in methods if name not in together]):
        command.error(f"--streams {given.streams} would spoil what is trained beside {', '.join(lonely)}; give 1")
    if given.prepare:
        training.prepare(given.prepare)
        return []
    if not (given.text or given.small or given.table):
        command.error("give the prepared text (--prepare FILE makes it), or --small")
    lines = read(given.table) if given.table else study(given, methods)
    print_tables({job_of(line): line for line in lines})
    if given.plot:
        plot({job_of(line): line for line in lines}, given.plot)
    if given.curves:
        plot_curves({job_of(line): line for line in lines}, given.curves)
    return lines


if __name__ == "__main__":
    main()
