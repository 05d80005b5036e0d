"""What a study found: a table for each length and batch, what failed, and figures."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.study.methods import METHODS
from benchmarks.study.plan import FIRST, LONG, SEEDS, at_seed_0, means
from benchmarks.study.training import Job

Lines = Mapping[Job, Mapping[str, Any]]
"""What is known, by training."""

BASE = "adamw"  # what the others are compared with


def rows(lines: Lines, steps: int, tokens: int) -> list[list[str]]:
    """Return a row for each method."""
    known = {job: float(line["perplexity"]) for job, line in lines.items()}
    made = []
    base = next(iter(means(known, BASE, steps, tokens).values()), [math.nan])
    base_at_0 = next(iter(at_seed_0(known, BASE, steps, tokens).values()), math.nan)
    for name, method in METHODS.items():
        found = at_seed_0(known, name, steps, tokens)
        if not found or math.isinf(min(found.values())):
            continue
        job, value = next(iter(found.items()))
        over_seeds = ["", "", "", ""]
        for job, values in list(means(known, name, steps, tokens).items())[:1]:  # noqa: B007
            lower = sum(ours < theirs for ours, theirs in zip(values, base, strict=False))
            shown = f"{mean(values):.2f} ± {stdev(values):.2f}"
            over_seeds = [shown, f"{mean(values) / mean(base):.3f}", f"{lower} of {len(values)}"]
            if math.isnan(mean(base)):
                over_seeds[1:3] = ["", ""]
        sizes = "{:.2f} + {:.2f}".format(*(size / 1e6 for size in lines[job]["state_bytes"]))
        rates = f"{job.lr:.3g} / {job.others_lr:.3g}"
        made.append([method.about, rates, *over_seeds[:3], f"{value / base_at_0:.3f}", str(len(found)), sizes])
    return made


HEADS = [
    "method",
    "rates",
    "perplexity",
    "of AdamW's",
    "seeds lower",
    "best of one seed, of AdamW's",
    "pairs",
    "state, MB",
]


def print_tables(lines: Lines) -> None:
    """Print the tables as Markdown, and what failed."""
    for steps, tokens in sorted({(job.steps, job.tokens) for job in lines}, key=lambda pair: (pair[1], pair[0])):
        print(f"\n{steps} steps of {tokens} tokens\n")
        for row in (HEADS, ["---"] * len(HEADS), *rows(lines, steps, tokens)):
            print("|", " | ".join(row), "|")
    failures = {(job.method, line["error"]) for job, line in lines.items() if "error" in line}
    for method, error in sorted(failures):
        print(f"\n{method} failed: {error}")


def plot(lines: Lines, picture: Path) -> None:
    """Draw perplexity against the rate of the matrices, as a factor on each method's best, at seed 0."""
    from galore_torch.training.run.plots import add_legend, line_style, new_axes

    known = {job: float(line["perplexity"]) for job, line in lines.items()}
    figure, axes = new_axes("rate of the matrices, of the best", "perplexity", size=(8, 4.8))
    least = math.inf
    for index, name in enumerate((*LONG, *FIRST)):
        found = at_seed_0(known, name)
        best = next(iter(found), None)
        if best is None or math.isinf(known[best]):
            continue
        least = min(least, known[best])
        points = sorted((job.lr / best.lr, value) for job, value in found.items() if job.others_lr == best.others_lr)
        axes.plot(*zip(*points, strict=True), label=name, **line_style(index, len(points)))
    axes.set_xscale("log", base=2)
    if math.isfinite(least):
        axes.set_ylim(0.97 * least, 1.5 * least)
    add_legend(figure)
    figure.savefig(picture, dpi=100)


def plot_curves(lines: Lines, picture: Path) -> None:
    """Draw the training losses of each method at its best rates, the mean of all seeds."""
    from galore_torch.training.run.plots import add_legend, count_by, line_style, new_axes

    known = {job: float(line["perplexity"]) for job, line in lines.items()}
    figure, axes = new_axes("", "training loss, mean of the seeds", size=(8, 4.8))
    for index, name in enumerate(LONG):
        best = next(iter(means(known, name)), None)
        if best is None:
            continue
        curves = [lines[replace(best, seed=seed)]["curve"] for seed in SEEDS]
        tokens = best.steps * best.tokens
        along = [tokens * (point + 0.5) / len(curves[0]) for point in range(len(curves[0]))]
        axes.plot(along, list(map(mean, zip(*curves, strict=True))), label=name, **line_style(index))
    axes.set_ylim(top=5.0)
    count_by(axes, "tokens")
    add_legend(figure)
    figure.savefig(picture, dpi=100)
