"""Files as text with places: PDF, HTML, DOCX, EPUB, Markdown, source code and plain text.

    >>> document = load(Path("report.pdf"))
    >>> document.place_at(document.text.index("in March")).page
    7

A file is known by its content, not its name; where its name says PDF, DOCX or EPUB and its content is none, it is damaged. What is not in the text is told in `notes`; what cannot be read is an error.
Nothing is fetched and nothing is written.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from ..errors import DocumentError, PromptError
from ..paths import expanded
from .apart import read_apart
from .decoding import decode_any, is_binary
from .document import LIMITS, Limits, LoadedDocument, Place, printable
from .folder import Walk, walk
from .formats import foreign, is_packed, is_pdf, not_as_named, text_kind
from .plain import read_plain

__all__ = ["Limits", "LoadedDocument", "Place", "Walk", "load", "load_bytes", "walk"]


def load(
    path: Path,
    *,
    encoding: str | None = None,
    password: str | None = None,
    everything: bool = False,
    limits: Limits = LIMITS,
) -> LoadedDocument:
    """A file as text.

    Args:
        encoding: of a plain text, Markdown, code or HTML; None: it is found.
        password: of a PDF that is locked.
        everything: of a page its menus and footers too, not only what looks like its main text.
        limits: what it may cost.

    Raises:
        DocumentError: it cannot be read: the message says why and what to do.
        MissingPackageError: a package that this format takes is not there.
    """
    name = printable(str(path))
    try:
        # a pipe without a writer would be waited for
        handle = os.open(expanded(path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISDIR(status.st_mode):
                raise DocumentError(f"{name} is a folder")
            if not stat.S_ISREG(status.st_mode):
                raise DocumentError(f"{name} is no regular file")
            limits.check("file_bytes", status.st_size, f"{name} has {status.st_size:,} bytes")
            data = file.read(limits.file_bytes + 1)
    except FileNotFoundError:
        raise DocumentError(f"{name}: there is no such file") from None
    except IsADirectoryError:
        raise DocumentError(f"{name} is a folder") from None
    except (OSError, RuntimeError) as err:
        raise DocumentError(f"{name} cannot be read: {getattr(err, 'strerror', None) or err}") from None
    except ValueError as err:
        if isinstance(err, DocumentError):
            raise
        raise DocumentError(f"{name} cannot be read: {err}") from None  # a NUL in the name
    return load_bytes(data, name, encoding=encoding, password=password, everything=everything, limits=limits)


def load_bytes(
    data: bytes,
    name: str,
    *,
    encoding: str | None = None,
    password: str | None = None,
    everything: bool = False,
    limits: Limits = LIMITS,
) -> LoadedDocument:
    """What `load` gives for a file of these bytes.

    Args:
        name: for messages; its ending tells Markdown and code from other text.
    """
    name = printable(name)
    limits.check("file_bytes", len(data), f"{name} has {len(data):,} bytes")
    if not data:
        raise DocumentError(f"{name} is empty")
    if found := foreign(data):
        raise DocumentError(f"{name} is {found[0]}, which is not read: {found[1]}")
    notes: tuple[str, ...] = ()
    if is_pdf(data):
        kind = "pdf"
    elif is_packed(data):
        kind = "packed"
    else:
        if encoding is None and (what := not_as_named(name)):
            raise DocumentError(
                f"{name} is no {what}, though its name says so: it is damaged, or of another kind: where it is a text, rename it to .txt"
            )
        text, notes = _decode(data, name, encoding)
        kind = text_kind(text, name)
        if kind != "html":
            return read_plain(text, name, kind, notes, limits)
        data = text.encode("utf-8", "surrogatepass")
    python = sys.executable and not getattr(sys, "frozen", False)  # else that is the application
    if python and limits.seconds is not None:
        reader = read_apart
    else:
        from .readers import read as reader
    return reader(kind, data, name, password=password, everything=everything, notes=notes, limits=limits)


def _decode(data: bytes, name: str, encoding: str | None) -> tuple[str, tuple[str, ...]]:
    if encoding is None and is_binary(data):
        raise DocumentError(
            f"{name} is a binary file of no kind that is read (PDF, HTML, DOCX, EPUB, Markdown, code, plain text): save it as one "
            "of these first"
        )
    try:
        return decode_any(data, name, encoding, markup=b"<" in data[:4096])
    except PromptError as err:
        raise DocumentError(err.what, *err.remedies) from None
