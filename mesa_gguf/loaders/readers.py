"""The readers of hostile formats, each kind's, with whatever they raise put in words."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..errors import DocumentError, MesaError, PromptError
from .document import Limits, LoadedDocument, beyond
from .docx import read_docx
from .epub import read_epub
from .html import read_html
from .packed import Packed
from .pdf import read_pdf


def read(
    kind: str, data: bytes, name: str, *, password: str | None, everything: bool, notes: tuple[str, ...], limits: Limits
) -> LoadedDocument:
    """A file and its places.

    Args:
        kind: "pdf", "html" or "packed" (DOCX, EPUB).
        data: the file; of HTML its text as UTF-8.

    Raises:
        DocumentError: it cannot be read.
        MissingPackageError: a package that this takes is not there.
    """
    try:
        if kind == "pdf":
            return read_pdf(data, name, password, limits)
        if kind == "html":
            return read_html(data.decode("utf-8", "surrogatepass"), name, notes, everything, limits)
        packed = Packed(data, name, limits)
        return read_docx(packed, limits) if packed.kind == "docx" else read_epub(packed, limits)
    except PromptError as err:
        raise DocumentError(err.what, *err.remedies) from None
    except MesaError:
        raise
    except MemoryError:
        raise beyond("memory", f"{name} needs more bytes of memory", limits.memory) from None
    except RecursionError:
        raise beyond("depth", f"{name} is nested too deep", limits.depth) from None
    except Exception as err:  # what the packages for damaged files raise is anything
        said = " ".join(str(err).split())[:200]
        raise DocumentError(f"{name} is damaged: {type(err).__name__}{f': {said}' if said else ''}") from err


def apart(
    data: bytes,
    name: str,
    *,
    kind: str,
    password: str | None,
    everything: bool,
    notes: list[str],
    limits: dict[str, Any],
) -> dict[str, Any]:
    """`read`, of and to what JSON can hold."""
    bounds = Limits(**limits)
    return asdict(read(kind, data, name, password=password, everything=everything, notes=tuple(notes), limits=bounds))


def warm_up(kind: str, everything: bool, **_: object) -> None:
    """Import what a kind takes, before nothing may be written or much memory taken."""
    modules = {
        "pdf": ["pypdfium2"],
        "html": ["lxml.html", "inscriptis"],
        "packed": ["lxml.html", "inscriptis", "mammoth"],
    }[kind]
    if kind == "html" and not everything:
        modules.append("trafilatura")
    for module in modules:
        try:
            __import__(module)
        except ImportError:
            continue  # told where it is needed
