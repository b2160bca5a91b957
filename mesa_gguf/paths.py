"""Paths as people write them, and the folder of this program's data."""

from __future__ import annotations

import os
from pathlib import Path

_APPLICATION = "mesa-gguf"


def expanded(path: str | os.PathLike[str]) -> Path:
    """With a home folder in the place of ~ or ~name; where there is none, as it was written, which names no file then."""
    return Path(os.path.expanduser(path))


def user_data_folder() -> Path:
    """Of the user, for this program; see `has_home`."""
    from platformdirs import user_data_path

    try:
        return user_data_path(_APPLICATION, appauthor=False)
    except (
        RuntimeError
    ):  # the user has no home, as in some containers; platformdirs leaves ~ where it is, or raises this
        return Path("~", _APPLICATION)


def has_home(folder: Path) -> bool:
    """Whether a folder can be made: ~ in it had a meaning."""
    return not str(folder).startswith("~") or folder.exists()
