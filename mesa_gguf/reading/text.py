"""Text from bytes: what comes from files, pipes and command lines may be anything."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

from ..errors import PromptError, Remedy

# marks at a text's beginning, the longer ones first: UTF-32's begins with UTF-16's
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

# files that are no text, by how they begin
_FILES = (
    (b"%PDF-", "a PDF file", "save its text first, with pdftotext for example"),
    (b"PK\x03\x04", "a ZIP file, as DOCX, ODT and EPUB are", "save its text first, with pandoc for example"),
    (b"\xd0\xcf\x11\xe0", "an old Office file", "save it as text first"),
    (b"{\\rtf", "an RTF file", "save it as text first"),
    (b"GGUF\x03\x00", "a GGUF model", "give a text as the document"),
    (b"\x1f\x8b", "a gzip file", "unpack it first"),
    (b"\x89PNG", "a picture", "give a text as the document"),
    (b"\xff\xd8\xff", "a picture", "give a text as the document"),
)

_BYTES_SHOWN = 65_536  # looked at to guess an encoding


def read_text(source: str, encoding: str | None = None) -> str:
    """The text of a file, or of standard input for "-", with line ends as \\n and without a byte order mark.

    Args:
        encoding: None: UTF-8, or what a mark at the beginning says, or UTF-16 where it is plain to see.

    Raises:
        PromptError: it cannot be read, or is no text in that encoding.
    """
    name = source_name(source)
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).expanduser().read_bytes()
    except IsADirectoryError:
        raise PromptError(f"{name} is a folder, not a text file") from None
    except FileNotFoundError:
        raise PromptError(f"{name}: there is no such file") from None
    except (OSError, ValueError) as err:  # ValueError: a NUL in the name
        raise PromptError(f"{name} cannot be read: {getattr(err, 'strerror', None) or err}") from None
    except (AttributeError, RuntimeError):
        raise PromptError("there is no standard input to read from") from None
    return decode(data, name, encoding)


def source_name(source: str) -> str:
    """How a file, or standard input, is called in messages."""
    return "standard input" if source == "-" else source.encode("utf-8", "backslashreplace").decode()


def decode(data: bytes, name: str, encoding: str | None = None) -> str:
    """The text that bytes are.

    Args:
        name: what they are of, for messages.
        encoding: as for `read_text`.

    Raises:
        PromptError: they are no text in that encoding; names what they are, or an encoding that would work.
    """
    for begin, what, advice in _FILES:
        if data.startswith(begin):
            raise PromptError(f"{name} is {what}, not text: {advice}")
    found = encoding or _encoding(data)
    try:
        codecs.lookup(found)
    except (LookupError, ValueError):
        raise PromptError(
            f"there is no encoding {found!r}: use utf-8, utf-16, cp1252 or another that Python knows"
        ) from None
    try:
        text = data.decode(found)
    except LookupError:  # one that is not of text, such as base64
        raise PromptError(f"{found} is no encoding of text: use utf-8, utf-16 or cp1252") from None
    except UnicodeDecodeError as err:
        at = f"byte 0x{data[err.start]:02x} at offset {err.start}" if err.start < len(data) else "it is cut short"
        raise PromptError(f"{name} is not {found}: {at}", *_others(data, found)) from None
    except UnicodeError as err:  # UTF-16 and UTF-32 without a mark, punycode and their like
        raise PromptError(f"{name} is not {found}: {err}", *_others(data, found)) from None
    if "\0" in text:
        nul = text.index("\0")
        raise PromptError(f"{name} is not {found} text: it has a NUL at character {nul}", *_others(data, found))
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _encoding(data: bytes) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding
    return _utf16(data) or "utf-8"


def _utf16(data: bytes) -> str | None:
    """UTF-16 without a mark, if every other byte of the beginning is 0 in many characters, and none of the others is."""
    sample = data[: _BYTES_SHOWN - _BYTES_SHOWN % 2]
    even, odd = sample[0::2], sample[1::2]
    if not odd or len(data) % 2:
        return None
    zeros = even.count(0), odd.count(0)
    if zeros[0] == 0 and zeros[1] > len(odd) // 4:
        return "utf-16-le"
    if zeros[1] == 0 and zeros[0] > len(even) // 4:
        return "utf-16-be"
    return None


def _others(data: bytes, tried: str) -> tuple[Remedy, ...]:
    """Encodings that would give a text, the likeliest alone."""
    guesses = [_encoding(data), "cp1252", "latin-1"]
    for guess in guesses:
        if codecs.lookup(guess).name == codecs.lookup(tried).name:
            continue
        try:
            text = data.decode(guess)
        except (UnicodeError, LookupError):
            continue
        # control characters: what latin-1 makes of another encoding's quotes
        if not any((ord(c) < 32 and c not in "\t\n\r\f\x0b\x1b") or 127 <= ord(c) < 160 for c in text):
            return (Remedy("encoding", guess),)
    return ()


def check_text(text: object, what: str) -> str:
    """A text from outside, without white space around it.

    Args:
        what: what it is, for messages: "the question".

    Raises:
        PromptError: it is empty, is no text, or has half a character, as command lines do that are not UTF-8.
    """
    if not isinstance(text, str):
        raise PromptError(f"{what} is of the type {type(text).__name__}: it must be text")
    half = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    if half is not None:
        code = ord(text[half])
        found = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a character, U+{code:04X},"
        raise PromptError(f"{what} is not UTF-8 text: {found} at character {half}")
    if not text.strip():
        raise PromptError(f"{what} is empty")
    return text.strip()
