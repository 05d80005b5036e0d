"""Hooks of `mkdocs build`: the start page is the README, and links out of `docs/` become plain text."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

README = Path(__file__).parents[1] / "README.md"
_OUTSIDE = re.compile(
    r"\[([^]]+)\]\((?!https?:|#)(?!docs/)(?:\.\./)?(?:reference|tests|examples|benchmarks|LICENSE|CONTRIBUTING)[^)]*\)"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the start page."""
    files.append(File.generated(config, "index.md", content=README.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links between README and `docs/` into links between pages, and links to code into plain text."""
    markdown = _OUTSIDE.sub(r"\1", markdown)
    return markdown.replace("](docs/", "](").replace("](../README.md", "](index.md")
