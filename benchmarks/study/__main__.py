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
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common.command import described, some_of
from benchmarks.study import training
from benchmarks.study.methods import METHODS
from benchmarks.study.plan import FIRST, LONG, SEEDS, at_seed_0, means, searched, wanted
from benchmarks.study.training import Job

Line = dict[str, Any]
"""A training and what came of it."""
Lines = dict[Job, Line]
"""What is known, by training."""


def job_of(line: Line) -> Job:
    """Return the training of a line."""
    return Job(**{field.name: line[field.name] for field in fields(Job)})


def read(path: Path) -> Lines:
    """Return the lines of a file; a last one that was cut off is left out."""
    texts = path.read_text().splitlines() if path.exists() else []
    return {job_of(line): line for line in (json.loads(text) for text in texts if text.endswith("}"))}


def perplexities(lines: Lines) -> dict[Job, float]:
    """Return what the plan knows them by."""
    return {job: float(line["perplexity"]) for job, line in lines.items()}


def study(given: argparse.Namespace, methods: Sequence[str]) -> Lines:
    """Train for as long as the budget says, and return all lines."""
    began_s = time.monotonic()
    lines = read(given.out)
    known = perplexities(lines)
    taken, plan = set(known), wanted if given.steps == Job.steps else partial(searched, steps=given.steps)
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
        while idle and (job := next((one for one in plan(known, methods) if one not in taken), None)):
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
            line = lines[job] = {**asdict(job), **result, "at_s": round(time.monotonic() - began_s, 1)}
            with given.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            told = {name: value for name, value in line.items() if name not in ("curve", "state_bytes")}
            print(*(f"{value:.5g}" if isinstance(value, float) else value for value in told.values()), flush=True)
    for process in processes:
        process.kill()
    return lines


BASE = "adamw"  # what the others are compared with
HEADS = ["method", "rates", "perplexity", "of AdamW's", "seeds lower"]
HEADS += ["best of one seed, of AdamW's", "pairs", "state, MB"]


def rows(lines: Lines, steps: int, tokens: int) -> list[list[str]]:
    """Return a row for each method."""
    known = perplexities(lines)
    made = []
    base = next(iter(means(known, BASE, steps, tokens).values()), [])
    base_at_0 = next(iter(at_seed_0(known, BASE, steps, tokens).values()), math.nan)
    for name, method in METHODS.items():
        found = at_seed_0(known, name, steps, tokens)
        if not found or math.isinf(min(found.values())):
            continue
        job, value = next(iter(found.items()))
        over_seeds = ["", "", ""]
        for job, values in list(means(known, name, steps, tokens).items())[:1]:  # noqa: B007
            over_seeds[0] = f"{mean(values):.2f} ± {stdev(values):.2f}"
            if base:
                lower = sum(ours < theirs for ours, theirs in zip(values, base, strict=True))
                over_seeds[1:] = [f"{mean(values) / mean(base):.3f}", f"{lower} of {len(values)}"]
        sizes = "{:.2f} + {:.2f}".format(*(size / 1e6 for size in lines[job]["state_bytes"]))
        rates = f"{job.lr:.3g} / {job.others_lr:.3g}"
        made.append([method.about, rates, *over_seeds, f"{value / base_at_0:.3f}", str(len(found)), sizes])
    return made


def print_tables(lines: Lines) -> None:
    """Print the tables as Markdown, and what failed."""
    for steps, tokens in sorted({(job.steps, job.tokens) for job in lines}, key=lambda pair: (pair[1], pair[0])):
        print(f"\n{steps} steps of {tokens} tokens\n")
        for row in (HEADS, ["---"] * len(HEADS), *rows(lines, steps, tokens)):
            print("|", " | ".join(row), "|")
    failures = {(job.method, line["error"]) for job, line in lines.items() if "error" in line}
    for method, error in sorted(failures):
        print(f"\n{method} failed: {error}")


@contextmanager
def picture(path: Path, *words: str) -> Iterator[tuple[Any, Any]]:
    """Yield axes with these words along them, and what styles lines; when the block ends the picture is saved."""
    from galore_torch.training.run import plots  # a rented GPU may lack what it needs

    figure, axes = plots.new_axes(*words, size=(8, 4.8))
    yield axes, plots
    plots.add_legend(figure)
    figure.savefig(path, dpi=100)


def plot(lines: Lines, path: Path) -> None:
    """Draw perplexity against the rate of the matrices, as a factor on each method's best, at seed 0."""
    known = perplexities(lines)
    found = {name: at_seed_0(known, name) for name in (*LONG, *FIRST)}
    least = min((value for by_job in found.values() for value in by_job.values()), default=math.inf)
    with picture(path, "rate of the matrices, of the best", "perplexity") as (axes, plots):
        for index, (name, by_job) in enumerate(found.items()):
            best = next(iter(by_job), None)
            if best is not None and math.isfinite(known[best]):
                at_best = [(job.lr / best.lr, known[job]) for job in by_job if job.others_lr == best.others_lr]
                axes.plot(*zip(*sorted(at_best), strict=True), label=name, **plots.line_style(index, len(at_best)))
        axes.set_xscale("log", base=2)
        if math.isfinite(least):
            axes.set_ylim(0.97 * least, 1.5 * least)


def plot_curves(lines: Lines, path: Path) -> None:
    """Draw the training losses of each method at its best rates, the mean of all seeds."""
    known = perplexities(lines)
    with picture(path, "", "training loss, mean of the seeds") as (axes, plots):
        for index, name in enumerate(LONG):
            for best in list(means(known, name))[:1]:
                curves = [lines[replace(best, seed=seed)]["curve"] for seed in SEEDS]
                points, tokens = len(curves[0]), best.steps * best.tokens
                along = [tokens * (point + 0.5) / points for point in range(points)]
                axes.plot(along, list(map(mean, zip(*curves, strict=True))), label=name, **plots.line_style(index))
        axes.set_ylim(top=5.0)
        plots.count_by(axes, "tokens")


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line asks for."""
    command = described(__doc__, "benchmarks.study")
    add = command.add_argument
    add("text", type=Path, nargs="?", help="the prepared text")
    add("--prepare", type=Path, metavar="FILE", help="write the prepared text, and nothing more")
    add("--table", type=Path, metavar="FILE", help="print the tables of a study's lines, and nothing more")
    add("--plot", type=Path, metavar="PNG", help="draw perplexities over rates too")
    add("--curves", type=Path, metavar="PNG", help="draw losses over tokens too")
    add("--only", default="", help="methods, with commas between: all by default that may share a process")
    add("--device", choices=["cuda", "cpu"], default="cpu", help="where to train (cpu)")
    add("--workers", type=int, default=1, help="processes (1)")
    add("--streams", type=int, default=1, help="trainings that take turns in each process (1)")
    add("--budget", type=float, default=3600.0, help="seconds for all of it (3600)")
    add("--steps", type=int, default=Job.steps, help="of a training; other than 400, only rates are searched (400)")
    add("--out", type=Path, default=Path("study.jsonl"), help="file of the lines; one that exists is gone on with")
    add("--small", action="store_true", help="a model of next to nothing on random tokens, to rehearse")
    given = command.parse_args(arguments)
    together = [name for name, method in METHODS.items() if not method.alone]
    methods = some_of(METHODS, given.only, command) or together
    if given.streams > 1 and (lonely := [name for name in methods if name not in together]):
        command.error(f"--streams {given.streams} would spoil what is trained beside {', '.join(lonely)}; give 1")
    if given.prepare:
        training.prepare(given.prepare)
        return
    if not (given.text or given.small or given.table):
        command.error("give the prepared text (--prepare FILE makes it), or --small")
    lines = read(given.table) if given.table else study(given, methods)
    print_tables(lines)
    if given.plot:
        plot(lines, given.plot)
    if given.curves:
        plot_curves(lines, given.curves)


if __name__ == "__main__":
    main()
