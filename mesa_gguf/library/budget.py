"""What kept chunks may take of the disk, where it was set to last: a line in a file beside them, which outlives a damaged index."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from pathlib import Path

from .store import LibraryError, sync_folder

UNLIMITED = 2**63 - 1  # bytes: more than any disk has
_FILE = "budget"
_NO_LIMIT = "unlimited"


def budget_of(folder: Path) -> int | None:
    """The budget that was set for the chunks in a folder; None where none was.

    Raises:
        ValueError: the file does not say one.
    """
    try:
        text = (folder / _FILE).read_bytes()[:64].decode("ascii", "replace").strip()
    except FileNotFoundError:
        return None
    except OSError as err:
        raise ValueError(f"it cannot be read: {err.strerror}") from None
    if text == _NO_LIMIT:
        return UNLIMITED
    if not re.fullmatch(r"\d{1,40}", text):
        raise ValueError("it has no number of bytes in it")
    return min(int(text), UNLIMITED)


def set_budget(folder: Path, budget: int | None) -> None:
    """Set it for every process from now on, in one step; None: as if none had been set.

    Raises:
        LibraryError: the folder cannot be written to.
    """
    path = folder / _FILE
    new = path.with_name(f"{_FILE}.{os.getpid()}.{secrets.token_hex(4)}.new")
    try:
        if budget is None:
            path.unlink(missing_ok=True)
        else:
            try:
                with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                    file.write(f"{_NO_LIMIT if budget >= UNLIMITED else budget}\n")
                    file.flush()
                    os.fsync(file.fileno())
                new.chmod(stat.S_IMODE(folder.stat().st_mode) & 0o666)  # as the chunks
                os.replace(new, path)
            finally:
                with contextlib.suppress(OSError):
                    new.unlink()
        sync_folder(folder)
    except OSError as err:
        raise LibraryError(f"{path}: the budget cannot be set: {err.strerror}") from None
