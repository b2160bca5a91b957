"""Text from bytes: what comes from files, pipes and command lines may be anything."""

from __future__ import annotations

import sys

from ..errors import PromptError
from ..loaders.decoding import decode
from ..paths import expanded


def read_text(source: str, encoding: str | None = None) -> str:
    """The text of a file, or of standard input for "-", with line ends as \\n and without a byte order mark.

    Args:
        encoding: None: UTF-8, or what a mark at the beginning says, or UTF-16 where it is plain to see.

    Raises:
        PromptError: it cannot be read, or is no text in that encoding.
    """
    return decode(read_bytes(source), source_name(source), encoding)


def read_bytes(source: str) -> bytes:
    """What is in a file, or comes from standard input for "-".

    Raises:
        PromptError: it cannot be read.
    """
    name = source_name(source)
    try:
        return sys.stdin.buffer.read() if source == "-" else expanded(source).read_bytes()
    except IsADirectoryError:
        raise PromptError(f"{name} is a folder, not a text file") from None
    except FileNotFoundError:
        raise PromptError(f"{name}: there is no such file") from None
    except (OSError, ValueError) as err:  # ValueError: a NUL in the name
        raise PromptError(f"{name} cannot be read: {getattr(err, 'strerror', None) or err}") from None
    except (AttributeError, RuntimeError):
        raise PromptError("there is no standard input to read from") from None


def source_name(source: str) -> str:
    """How a file, or standard input, is called in messages."""
    return "standard input" if source == "-" else source.encode("utf-8", "backslashreplace").decode()


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
