"""What a setting names, here or on the Hugging Face Hub: is it there, and may a model be pushed to it?

Asked before libraries that take seconds are imported, and the Hub asked once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from galore_torch.extras import install
from galore_torch.units import sentence

_MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "azure_ml": ("azureml",), "flyte": ("flytekit",)}
"""Of trackers that are not called as a module is."""


@contextmanager
def refused(what: str, remedy: str, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Make a ValueError of what the body raises: what is wrong, why a library says so, and the remedy.

    Args:
        what: the setting, its value, and what cannot be done with it.
        remedy: a sentence.
        kinds: of errors; by default any, as the Hub's client raises errors of many kinds.
    """
    try:
        yield
    except kinds as error:
        raise ValueError(f"{what}: {sentence(error)} {remedy}") from error


def local_path(field: str, name: str) -> Path:
    """The path that a setting names: as it stands if that exists, else with ``~`` as the home folder.

    A ValueError says that no path can have that name.
    """
    path = Path(name)
    try:
        return path if path.exists() else path.expanduser()
    except RuntimeError:  # nobody has such a home
        return path
    except OSError as error:  # too long, for example
        raise ValueError(f"{field} = {name[:80]!r} cannot be a path: {error.strerror}; give another.") from error


def is_written_as_path(name: str) -> bool:
    """Whether a name can only be meant as a path: no name on the Hub begins like that."""
    return name.startswith((".", "/", "~"))


def model_of_run(field: str, name: str) -> str:
    """The folder of the finished model, where a setting names the folder of a run; else the name as it is.

    A ValueError says that the run has none yet.
    """
    run = local_path(field, name)
    if not (run / "config.toml").is_file():
        return name
    if not (run / "model" / "config.json").is_file():
        raise ValueError(
            f"{field} = {name!r} is a run that has no finished model yet; finish it with --resume --out {name}, or "
            "give the folder of one of its checkpoints."
        )
    return str(run / "model")


def require_model(field: str, name: str, file: str = "config.json") -> None:
    """Refuse, with a ValueError, a model that is neither a folder with a file nor one on the Hub."""
    path, wrong = local_path(field, name), f"{field} = {name!r} cannot be loaded: "
    if path.is_dir():
        if not (path / file).is_file():
            raise ValueError(f"{wrong}the folder has no {file}; give a folder that a model was saved in.")
        if file.endswith(".json"):
            require_json(field, name, path / file)
        of_tokenizers = ("tokenizer*", "vocab*", "*.model", "*.spm")
        if field == "model" and file == "config.json" and not any(any(path.glob(one)) for one in of_tokenizers):
            raise ValueError(f"{wrong}the folder has no tokenizer; save it there too, by its save_pretrained.")
    elif path.is_file():
        raise ValueError(f"{wrong}it is a file; give the folder that it is in.")
    elif is_written_as_path(name) or name.count("/") > 1:
        raise ValueError(f"{wrong}there is no such folder, and names on the Hub are org/name; give one that exists.")
    else:
        require_on_hub(field, name, "model")


def require_json(field: str, name: str, path: Path) -> None:
    """Refuse, with a ValueError, a file of a setting that holds no JSON object."""
    try:
        dict(json.loads(path.read_text(encoding="utf-8-sig")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{field} = {name!r}: {path} is not JSON: {error}. Mend it, or give another.") from error


def require_on_hub(field: str, name: str, kind: str) -> None:
    """Refuse, with a ValueError, a name that the Hub does not have, or, where it is not reached, a model not cached."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    cached = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}").is_dir()
    if constants.HF_HUB_OFFLINE or cached:
        return
    wrong = f"{field} = {name!r} cannot be loaded: "
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=10)
    except GatedRepoError as error:
        raise ValueError(f"{wrong}it is gated; ask for access on its page and log in by hf auth login.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{wrong}it is neither here nor on the Hugging Face Hub; check the name, or log in by hf auth login."
        ) from error
    except Exception as error:
        if kind == "model":
            raise ValueError(
                f"{wrong}it is not here, and the Hugging Face Hub is not reached ({error}); check the path and the "
                "network, or give the folder of a model or a run."
            ) from error
        # Whoever looks for it would try again and again.
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True


def trackers(report_to: str) -> list[str]:
    """The trackers that a setting names, by comma, ``none`` being none; a ValueError says that one is not installed."""
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if not (name.isidentifier() and any(map(find_spec, _MODULES.get(name, (name,))))):
            raise ValueError(
                f"report_to = {name!r} is not installed, or no tracker; choose none, tensorboard, trackio or wandb. "
                f"{install('track')}"
            )
    return names


class NotPushedError(Exception):
    """The Hub did not take a model, which is whole in its folder."""


def require_token(name: str | None) -> None:
    """Refuse, with a ValueError, to push to a repository without a token: before libraries are imported."""
    if name is None:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError(
            f"push_to_hub = {name!r} needs a token of the Hugging Face Hub, and there is none; log in by "
            "hf auth login, or set HF_TOKEN."
        )


def make_repository(name: str) -> str:
    """Make the repository unless it is there, and return its whole name; a ValueError says that it is not allowed."""
    from huggingface_hub import HfApi

    remedy = "Check the name, the token and the network, or leave it out."
    with refused(f"push_to_hub = {name!r} is refused by the Hugging Face Hub", remedy):
        return str(HfApi().create_repo(name, exist_ok=True).repo_id)


def push(folder: Path, name: str) -> str:
    """Upload a model's folder in one commit, and return its address; a `NotPushedError` says how to do it later."""
    from huggingface_hub import HfApi

    message = "Upload the trained model"
    try:
        return str(HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url)
    except Exception as error:
        raise NotPushedError(
            f"push_to_hub = {name!r} has failed: {sentence(error)} Push the model by\n  hf upload {name} {folder}"
        ) from error
