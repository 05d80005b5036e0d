"""``manifest.json``: size and SHA-256 of each file of a folder, by which damage is told from what was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from galore_torch.training.run.files import write_whole

MANIFEST = "manifest.json"

_CHUNK = 1 << 20  # bytes


def write_manifest(folder: Path) -> None:
    """Write down size and digest of each file of a folder."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest_of_file(folder / name)}
        for name in sorted(files_in(folder))
    }
    write_whole(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def files_in(folder: Path) -> set[str]:
    """All files by their names from the folder on, but locks and the manifest."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix() for path in found}


def listed(folder: Path) -> set[str]:
    """The files that the manifest names; an OSError or a ValueError says that there is none that can be read."""
    return {name for name, _, _ in _entries(folder)}


def _entries(folder: Path) -> list[tuple[str, int, str]]:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return [(str(name), int(each["bytes"]), str(each["sha256"])) for name, each in files.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is not a manifest") from error


def damage(folder: Path) -> str | None:
    """What is wrong with the first file that is not as the manifest says; None if all is as it was written."""
    try:
        known = _entries(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    for name, size, digest in known:
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if digest_of_file(path) != digest:
                return f"{name} is not as it was written: its SHA-256 has changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:  # the second: no name of a file
            return f"{name!r} cannot be read ({error})"
    return None


def require_whole(field: str, name: str, folder: Path) -> None:
    """Refuse, with a ValueError, a folder that is not as its manifest says, which a setting has named."""
    wrong = damage(folder)
    if wrong is not None:
        raise ValueError(
            f"{field} = {name!r}: {folder} is damaged: {wrong}. Restore it from a copy; if you have changed it "
            f"yourself, remove {folder / MANIFEST}."
        )


def digest_of_file(path: Path) -> str:
    """The SHA-256 of what is in a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
