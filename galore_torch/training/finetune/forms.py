"""Rows in the forms that people have them in become columns as TRL has them; and sums that are made on the spot.

| form | columns | become |
| --- | --- | --- |
| Alpaca | instruction, output, and input or not | prompt, completion |
| ShareGPT | conversations, of from and value | messages, of role and content |
| pairs | chosen and rejected, which begin with the prompt | prompt, chosen, rejected |
"""

from __future__ import annotations

import random
from typing import Any

import datasets

_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "bard": "assistant"}
_SUMS = 2000


def in_columns(rows: datasets.Dataset) -> Any:
    """Rows whose columns are those that TRL's trainers read; rows that need none of that are returned as they are."""
    columns = set(rows.column_names)
    if {"instruction", "output"} <= columns and not {"prompt", "completion", "messages"} & columns:
        return rows.map(_asked, remove_columns=sorted({"instruction", "input", "output"} & columns))
    if "conversations" in columns and "messages" not in columns:
        return rows.map(_messages, remove_columns=["conversations"])
    if {"chosen", "rejected"} <= columns and "prompt" not in columns:
        from trl import extract_prompt

        return rows.map(extract_prompt)
    return rows


def _asked(row: dict[str, Any]) -> dict[str, str]:
    """A row of Alpaca's, with the blank line between instruction, input and response that its template has."""
    parts = [str(row.get(name) or "").strip() for name in ("instruction", "input")]
    prompt = "".join(f"{part}\n\n" for part in parts if part)
    return {"prompt": prompt, "completion": str(row["output"] or "")}


def _messages(row: dict[str, Any]) -> dict[str, Any]:
    known = [one for one in row["conversations"] or [] if isinstance(one, dict)]
    said = [(one.get("from") or one.get("role"), one.get("value") or one.get("content")) for one in known]
    return {"messages": [{"role": _ROLES.get(str(who), str(who)), "content": what} for who, what in said]}


def arithmetic() -> Any:
    """Sums and differences of two numbers below a hundred, with their answers: a small task whose reward is a rule."""
    draw = random.Random(0)
    pairs = [sorted((draw.randrange(100), draw.randrange(100)), reverse=True) for _ in range(_SUMS)]
    signs = [draw.choice("+-") for _ in pairs]
    found = [a + b if sign == "+" else a - b for (a, b), sign in zip(pairs, signs, strict=True)]
    prompts = [f"{a} {sign} {b} = " for (a, b), sign in zip(pairs, signs, strict=True)]
    return datasets.Dataset.from_dict({"prompt": prompts, "answer": [str(number) for number in found]})
