"""The documents cannot rot: their Python runs, their commands parse, their links lead somewhere.

The Python blocks of a document run in order and share their names, as a reader would type them. They find a small
`model`, batches of it as `data` and the same as `rows` for a Trainer; a block that makes an optimizer or a trainer
gets a new model. A block after `<!-- not run: why -->`, and one that leaves arguments out as `(...,`, is only parsed.
"""

import ast
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from galore_torch.training.finetune import presets as tuning_presets
from galore_torch.training.pretrain import presets
from tests.command_line import app

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)

NOT_RUN = {"torchtitan.md": 1, "frameworks.md": 2}
"""How many blocks of a document may be parsed only: frameworks are in environments of their own, where the files
tests/integrations/test_*_for_real.py run their blocks."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- not run: \S.* -->\s*\Z")
MAKES = re.compile(r"^optimizer = |Trainer\(", re.MULTILINE)
COMMAND = re.compile(r"^ *(galore .+)$", re.MULTILINE)
INLINE = re.compile(r"`(galore [a-z][^`]*)`")
LINK = re.compile(r"(?<!!)\[[^]]+\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A Python block: its first line in the document, its text, and whether it is to be run."""

    line: int
    text: str
    is_run: bool


def blocks_of(text: str) -> list[Block]:
    """The Python blocks of a document."""
    return [
        Block(
            line=text.count("\n", 0, found.start(2)) + 1,
            text=found[2],
            is_run=not MARK.search(text[: found.start()]) and "(...," not in found[2],
        )
        for found in FENCE.finditer(text)
        if found[1] == "python"
    ]


def commands_of(text: str) -> list[str]:
    """The command lines of a document: in blocks that are no Python, indented, or inside a sentence."""
    prose = FENCE.sub(lambda found: "" if found[1] == "python" else found[2], text)
    joined = prose.replace("\\\n", " ")
    return [*COMMAND.findall(joined), *INLINE.findall(joined)]


def anchor(heading: str) -> str:
    """The name under which a heading can be linked to."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# Python --------------------------------------------------------------------------------------------------------------


def given() -> dict:
    """What every block finds: a small untrained LLaMA, and text for it, in batches and in rows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    ids = torch.randint(64, (16, 16))
    return {
        "model": LlamaForCausalLM(config),
        "data": [{"input_ids": part, "labels": part} for part in ids.split(4)],
        "rows": [{"input_ids": row, "labels": row} for row in ids],
    }


@every_document
def test_its_python_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "document", **given()}
    for block in blocks_of(path.read_text()):
        code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")  # parsed, also where it is not run
        if block.is_run:
            namespace.update(given() if MAKES.search(block.text) else {})
            exec(code, namespace)


def test_few_blocks_are_not_run():
    left = {path.name: sum(not block.is_run for block in blocks_of(path.read_text())) for path in DOCUMENTS}
    assert {name: count for name, count in left.items() if count > NOT_RUN.get(name, 0)} == {}


@every_document
def test_what_it_imports_of_the_package_is_there(path):
    """Also in blocks that are not run."""
    for block in blocks_of(path.read_text()):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "galore_torch":
                exec(ast.unparse(node), {})


# Commands ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def galore():
    """The console command, which says what each of its commands was given in the place of doing it."""
    told = []

    def disarm(command, path):
        children = getattr(command, "commands", {})
        for name, child in children.items():
            disarm(child, (*path, name))
        if not children:
            command.callback = lambda **values: told.append((path, values))

    command = typer.main.get_command(app())
    disarm(command, ())

    def run(line):
        told.clear()
        words = shlex.split(line, comments=True)[1:]
        command.main(words, prog_name="galore", standalone_mode=False)
        return None if "--help" in words else told[0]

    return run


BESIDE_SETTINGS = ("preset", "method", "config", "out", "resume", "prepare", "json")
CONFIGURE = {("pretrain",): presets.configure, ("finetune",): tuning_presets.configure}

COMMANDS = Counter((path.name, line) for path in DOCUMENTS for line in commands_of(path.read_text()))


@pytest.mark.parametrize(("name", "line"), COMMANDS)
@pytest.mark.broad
def test_its_commands_parse(name, line, galore):
    """Options exist, values are of their types, and settings fit together, as far as can be told before a run."""
    told = galore(line)
    is_named_alone = len(shlex.split(line, comments=True)) == 2
    if told is None or is_named_alone or told[0] not in CONFIGURE or told[1]["resume"] or told[1]["config"]:
        return
    path, values = told
    settings = {key: value for key, value in values.items() if key not in BESIDE_SETTINGS}
    CONFIGURE[path](values["preset"], method=values["method"], **settings)


# Links ---------------------------------------------------------------------------------------------------------------


@every_document
def test_its_links_lead_somewhere(path):
    lost = []
    for target in LINK.findall(path.read_text()):
        file, _, name = target.partition("#")
        if "://" in target:
            continue
        found = (path.parent / file).resolve() if file else path
        if not found.exists() or (name and name not in map(anchor, HEADING.findall(found.read_text()))):
            lost.append(target)
    assert lost == []


# The rules can fail --------------------------------------------------------------------------------------------------


def test_blocks_and_commands_are_found():
    text = (
        "Say `galore pretrain --rank 4` or\n\n    galore compare --seed 1  # a remark\n\n"
        "```sh\ngalore finetune \\\n  --task rte\n```\n\n"
        "```python\none = 1\n```\n\n<!-- not run: why -->\n```python\ntwo = 2\n```\n\n```python\nf(..., x=1)\n```\n"
    )
    assert [(block.line, block.is_run) for block in blocks_of(text)] == [(11, True), (16, False), (20, False)]
    assert [shlex.split(line, comments=True)[1:] for line in commands_of(text)] == [
        ["compare", "--seed", "1"],
        ["finetune", "--task", "rte"],
        ["pretrain", "--rank", "4"],
    ]


@pytest.mark.parametrize(
    "line",
    ["galore pretrain --no-such 1", "galore pretrain --rank four", "galore train", "galore compare --no-such 1"],
)
def test_a_wrong_command_is_found(line, galore):
    with pytest.raises(Exception, match=r"(?i)no such|a valid"):
        galore(line)
