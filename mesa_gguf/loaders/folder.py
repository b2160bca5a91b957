"""The files of a folder that can be loaded."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ..errors import DocumentError
from ..paths import expanded
from .decoding import is_binary
from .document import LIMITS, Limits, printable
from .formats import foreign, is_packed, is_pdf, not_as_named

_SHOWN = 65_536


@dataclass(frozen=True)
class Walk:
    """What is in a folder.

    Attributes:
        files: that look as if they could be loaded, in the order of their names.
        notes: what was left out and why, a line each, with its name as the folder was called. Hidden files and folders are left out without a word.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def walk(folder: Path, *, limits: Limits = LIMITS) -> Walk:
    """The files of a folder, and of those in it, that can be loaded.

    Links are followed to files in the folder, not to folders. What leads out of it, is hidden, or is no regular file is left out.

    Raises:
        DocumentError: it is no folder that can be read, or has too many files.
    """
    shown = printable(str(folder))
    try:
        root = expanded(folder).resolve(strict=True)
        if not root.is_dir():
            raise DocumentError(f"{shown} is no folder")
        os.scandir(root).close()
    except FileNotFoundError:
        raise DocumentError(f"{shown}: there is no such folder") from None
    except (OSError, ValueError, RuntimeError) as err:  # RuntimeError: links in a circle
        raise DocumentError(f"{shown} cannot be read: {getattr(err, 'strerror', None) or err}") from None

    files: list[Path] = []
    notes: list[str] = []
    seen: set[tuple[int, int]] = set()
    n_entries = 0
    todo = [root]
    while todo:
        path = todo.pop()
        name = printable((folder / path.relative_to(root)).as_posix())
        try:
            is_link = path.is_symlink()
            real = path.resolve(strict=True)
            if is_link and not real.is_relative_to(root):
                notes.append(f"{name} is a link that leads out of the folder")
                continue
            if is_link and any(part.startswith(".") for part in real.relative_to(root).parts):
                continue
            status = real.stat()
            if stat.S_ISDIR(status.st_mode):
                if is_link:
                    continue  # what it leads to is in the folder, and comes by itself
                if is_library(path):
                    if path == root:
                        raise DocumentError(f"{shown} is a library of mesa-gguf: its documents are in it already")
                    notes.append(f"{name} is a library of mesa-gguf")
                    continue
                with os.scandir(path) as entries:
                    names = sorted((entry.name for entry in entries if not entry.name.startswith(".")), reverse=True)
                n_entries += len(names)
                limits.check("files", n_entries, f"{shown} has {n_entries:,} files or more")
                todo.extend(path / entry for entry in names)
                continue
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            reason = _why_not(real, status, limits)
        except OSError as err:
            reason = f"cannot be read: {err.strerror or err}"
        except RuntimeError:
            reason = "is a link to itself"
        if reason:
            notes.append(f"{name} {reason}")
        else:
            files.append(path)
    return Walk(tuple(files), tuple(notes))


def is_library(folder: Path) -> bool:
    """Whether a folder is a library's: it has an index and kept chunks, or chunks alone, where the index is lost."""
    chunks = folder / "chunks"
    if not chunks.is_dir():
        return False
    return (folder / "index.sqlite3").is_file() or next(chunks.glob("[0-9a-f][0-9a-f]/*.chunk"), None) is not None


def _why_not(path: Path, status: os.stat_result, limits: Limits) -> str | None:
    """Why a file is left out; None if it is not."""
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file"
    if status.st_size == 0:
        return "is empty"
    if status.st_size > limits.file_bytes:
        return f"is too large: {status.st_size:,} bytes, and {limits.file_bytes:,} is the limit (limits.file_bytes)"
    with path.open("rb") as file:
        head = file.read(_SHOWN)
    if file_kind := foreign(head):
        return f"is {file_kind[0]}"
    if is_pdf(head) or is_packed(head):
        return None
    if what := not_as_named(path.name):
        return f"is no {what}, though its name says so: it is damaged, or of another kind"
    return "is no text" if is_binary(head) else None
