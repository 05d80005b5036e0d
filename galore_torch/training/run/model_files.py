"""What the files of a model say before it is loaded: what it is, and what is in its weights.

They are read in milliseconds, before libraries are imported. Of a model that is not here, or of another format than
safetensors, nothing is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from galore_torch.training.run.names import local_path
from galore_torch.units import first_of

_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_MADE_ANEW = "lm_head pre_classifier classification_head pooler dense out_proj score summary logits_proj"
"""Parts of a model that its files may lack."""


def require_length(field: str, length: int, model: str, positions: int | None = None) -> None:
    """Refuse, with a ValueError, sequences beyond a model's positions, which its configuration says if nobody does."""
    if positions is None:
        known = json_of(model, "config.json")
        positions = known.get("max_position_embeddings", known.get("n_positions"))
    if isinstance(positions, int) and length > positions:
        raise ValueError(f"{field} = {length} is beyond the {positions} positions of model = {model!r}; give less.")


def require_causal(model: str) -> None:
    """Refuse, with a ValueError, an encoder, by what it was saved as."""
    known = json_of(model, "config.json")
    if str(known.get("architectures")).endswith("ForMaskedLM']") and not known.get("is_decoder"):
        raise encoder(model, known.get("model_type"))


def encoder(model: str, kind: Any) -> ValueError:
    """That a model is an encoder, of a kind of Transformers'."""
    return ValueError(
        f"model = {model!r} is an encoder ({kind}), which writes no text; choose a causal model, or, for rows with "
        "labels, galore finetune --task classify."
    )


def require_template(model: str) -> None:
    """Refuse, with a ValueError, a folder of a model without a chat template."""
    folder = local_path("model", model)
    known = json_of(model, "tokenizer_config.json").get("chat_template")
    if folder.is_dir() and not known and not any((folder / one).exists() for one in _TEMPLATES):
        raise no_template(model)


def no_template(model: str) -> ValueError:
    """That a model has no chat template, and rows are messages."""
    return ValueError(
        f"model = {model!r} has no chat template for messages; give one as --chat-template FILE, or give prompt and "
        "completion as text."
    )


def json_of(model: str, name: str) -> dict[str, Any]:
    """What a file of a model holds; nothing where it is not here, or no JSON, which is told where it is loaded."""
    try:
        return dict(json.loads((local_path("model", model) / name).read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def require_weights(model: str, targets: str | list[str], ranks: Iterable[str]) -> None:
    """Refuse, with a ValueError, files of weights that have been cut off, and names of modules that they have not.

    Args:
        model: name or folder.
        targets: which modules are trained: parts of their names; a pattern is not looked at.
        ranks: ends of the names of those that have a rank of their own.
    """
    names = [name for path in sorted(local_path("model", model).glob("model*.safetensors")) for name in _matrices(path)]
    if not names or any(".experts." in name for name in names):  # those Transformers calls otherwise
        return
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    known = f"names that end by {first_of(ends, 20)}"
    for end in ranks:
        if end.removesuffix(".weight").rsplit(".", 1)[-1] not in [*ends, *_MADE_ANEW.split()]:
            raise ValueError(f"rank_pattern: {end!r} ends no name of a matrix; give {known}.")
    words = [target.rsplit(".", 1)[-1] for target in targets if isinstance(targets, list)]
    if words and not any(re.search(r"[^\w-]", word) or word in " ".join([*names, _MADE_ANEW]) for word in words):
        raise ValueError(
            f"target_modules = {','.join(targets)!r} match no linear layer; give parts of {known}, or all-linear."
        )


def _matrices(path: Path) -> list[str]:
    """Names of the modules whose matrices are in a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        try:
            header = dict(json.loads(file.read(begin - 8))) if begin <= size else {}
            header.pop("__metadata__", None)
            whole = begin + max((one["data_offsets"][1] for one in header.values()), default=0)
        except (ValueError, TypeError, LookupError):  # told where it is loaded
            return []
    if size < whole:
        raise ValueError(
            f"model = {str(path.parent)!r} cannot be loaded: {path.name} has {size:,} bytes of {whole:,}, and may have "
            "been cut off; give another copy."
        )
    matrices = [name.removesuffix(".weight") for name, one in header.items() if len(one.get("shape", ())) > 1]
    return [name for name in matrices if "embed" not in name]
