"""Where a finished model goes if it is pushed: a repository of the Hugging Face Hub, by the user's token."""

from __future__ import annotations

from pathlib import Path

from galore_torch.training.run.names import refused
from galore_torch.units import sentence


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
