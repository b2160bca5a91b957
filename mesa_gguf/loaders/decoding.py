"""Text from bytes in whatever encoding."""

from __future__ import annotations

import codecs
import re
from itertools import islice

from ..errors import PromptError, Remedy, missing_package
from ..text import counted
from .formats import foreign, not_as_named

# marks at a text's beginning, the longer ones first: UTF-32's begins with UTF-16's
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_BYTES_SHOWN = 65_536  # looked at to guess an encoding
_BYTES_GUESSED = 262_144  # the same, by charset-normalizer

# what a page says of itself, in HTML or XML
_DECLARED = re.compile(
    rb"<(?:meta\b[^>]{0,200}?charset\s*=|\?xml\b[^>]{0,100}?encoding\s*=)\s*[\"']?\s*([\w:.-]{1,40})", re.I
)
# what browsers take these names for, because authors do
_MEANT = {
    "iso8859-1": "cp1252",
    "ascii": "cp1252",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
_LOW_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # in every encoding but UTF-16 and UTF-32
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f]")  # not \t \n \v \f \r, escape, next line


def decode(data: bytes, name: str, encoding: str | None = None) -> str:
    """The text that bytes are, with line ends as \\n and without a byte order mark.

    Args:
        name: what they are of, for messages.
        encoding: None: UTF-8, or what a mark at the beginning says, or UTF-16 where it is plain to see.

    Raises:
        PromptError: they are no text in that encoding; names what they are, or an encoding that would work.
    """
    if file := foreign(data) or _readable(data):
        raise PromptError(f"{name} is {file[0]}, not text: {file[1]}")
    if encoding is None and (what := not_as_named(name)):
        raise PromptError(
            f"{name} is no {what}, though its name says so, and may be damaged: where it is a text, rename it to .txt"
        )
    return _decode(data, name, encoding or plain_encoding(data))


def decode_any(
    data: bytes, name: str, encoding: str | None = None, *, markup: bool = False
) -> tuple[str, tuple[str, ...]]:
    """The text that bytes are, and how that was found, a line each, where it was not plain.

    Args:
        name: what they are of, for messages.
        encoding: None: as for `decode`, and where that fails what charset-normalizer finds likeliest.
        markup: HTML, which may say its encoding.

    Raises:
        PromptError: they are no text that could be found.
        MissingPackageError: the encoding would have to be guessed, and charset-normalizer is not there.
    """
    if encoding is not None:
        return _decode(data, name, encoding), ()
    plain = plain_encoding(data)
    declared = _declared(data) if markup and plain == "utf-8" else None
    # pages say what they like, and bytes that are UTF-8 are seldom anything else, unless they are letters made of ASCII
    tries = [declared, plain] if declared and declared.startswith(("iso2022", "hz")) else [plain, declared]
    for tried in filter(None, tries):
        try:
            return _decode(data, name, tried), ()
        except PromptError:
            if tried == plain and (whole := _whole_characters(data, plain)):
                return _decode(data[whole], name, plain), (_cut_note(data, whole, plain),)
            if plain != "utf-8" or b"\0" in data:
                raise
    if text := _damaged_utf8(data):
        return text
    found = _guess(data)
    if found is None:
        raise PromptError(
            f"{name} is no text in any encoding that was tried", Remedy("encoding", why="if you know it")
        ) from None
    return _decode(data, name, found), (f"the encoding was guessed: {found}",)


def plain_encoding(data: bytes) -> str:
    """What a mark at the beginning says, UTF-16 where it is plain to see, else UTF-8."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding
    return _utf16(data) or "utf-8"


def is_binary(data: bytes) -> bool:
    """Whether bytes look like no text in any encoding: NULs, or many other control characters."""
    sample = data[:_BYTES_SHOWN]
    if plain_encoding(data) != "utf-8":
        return False
    return b"\0" in sample or 20 * len(_LOW_CONTROLS.findall(sample)) > 3 * len(sample)


def _readable(data: bytes) -> tuple[str, str] | None:
    """What loaders read, and `decode` does not."""
    if data.startswith(b"%PDF-"):
        return "a PDF file", "save its text first, with pdftotext for example"
    if data.startswith(b"PK\x03\x04"):
        return "a ZIP file, as DOCX, ODT and EPUB are", "save its text first, with pandoc for example"
    return None


def _decode(data: bytes, name: str, encoding: str) -> str:
    try:
        codecs.lookup(encoding)
    except (LookupError, ValueError):
        raise PromptError(
            f"there is no encoding {encoding!r}: use utf-8, utf-16, cp1252 or another that Python knows"
        ) from None
    try:
        text = data.decode(encoding)
    except LookupError:  # one that is not of text, such as base64
        raise PromptError(f"{encoding} is no encoding of text: use utf-8, utf-16 or cp1252") from None
    except UnicodeDecodeError as err:
        if whole := _whole_characters(data, encoding):
            side = "begins" if whole.start else "ends"
            raise PromptError(
                f"{name} is {encoding}, but {side} within a character: cut off its {_cut_bytes(data, whole)}"
            ) from None
        at = f"byte 0x{data[err.start]:02x} at offset {err.start}" if err.start < len(data) else "it is cut short"
        raise PromptError(f"{name} is not {encoding}: {at}", *_others(data, encoding)) from None
    except UnicodeError as err:  # UTF-16 and UTF-32 without a mark, punycode and their like
        raise PromptError(f"{name} is not {encoding}: {err}", *_others(data, encoding)) from None
    if "\0" in text:
        nul = text.index("\0")
        raise PromptError(f"{name} is not {encoding} text: it has a NUL at character {nul}", *_others(data, encoding))
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _utf16(data: bytes) -> str | None:
    """UTF-16 without a mark, if every other byte of the beginning is 0 in many characters, and none of the others is."""
    sample = data[: _BYTES_SHOWN - _BYTES_SHOWN % 2]
    even, odd = sample[0::2], sample[1::2]
    if not odd:
        return None
    zeros = even.count(0), odd.count(0)
    least = len(odd) // 4
    if len(data) % 2:  # it was cut, if it is any
        least = max(16, len(odd) * 3 // 4)
    if zeros[0] == 0 and zeros[1] > least:
        return "utf-16-le"
    if zeros[1] == 0 and zeros[0] > least:
        return "utf-16-be"
    return None


_BEGINNINGS = (b"\xc2", b"\xc3", b"\xe2", b"\xf0")
_UTF = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


def _whole_characters(data: bytes, encoding: str) -> slice | None:
    """The part of a text in Unicode that was cut within its first or last character, all else being right; None where it is another text."""
    name = codecs.lookup(encoding).name
    if name not in _UTF:
        return None
    is_utf8 = name == "utf-8"
    begin = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 4) if is_utf8 else 0
    decoder = codecs.getincrementaldecoder(name)()
    try:
        text = decoder.decode(data[begin:])  # it waits for the rest of the last character
    except UnicodeError:  # UTF-16 without a mark too
        return None
    end = len(data) - len(decoder.getstate()[0])
    if not text or "\0" in text or begin == 4:
        return None
    # of one byte behind ASCII alone: those that begin what is typed most; others are letters in older encodings
    is_sure = not is_utf8 or not text.isascii() or (begin == 0 and (end < len(data) - 1 or data[end:] in _BEGINNINGS))
    return slice(begin, end) if is_sure else None


def _cut_bytes(data: bytes, whole: slice) -> str:
    """Which bytes of a text were cut off a character, in words."""
    sides = ((whole.start, "first"), (len(data) - whole.stop, "last"))
    return " and ".join(f"{side} {n} bytes" if n > 1 else f"{side} byte" for n, side in sides if n)


def _cut_note(data: bytes, whole: slice, encoding: str) -> str:
    return f"the text is {encoding.upper()} that was cut within a character: its {_cut_bytes(data, whole)} left out"


def _others(data: bytes, tried: str) -> tuple[Remedy, ...]:
    """Encodings that would give a text, the likeliest alone."""
    guesses = [plain_encoding(data), "cp1252", "latin-1"]
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


def _declared(data: bytes) -> str | None:
    """The encoding that markup says it has, as browsers understand it."""
    found = _DECLARED.search(data, 0, 4096)
    if not found:
        return None
    try:
        known = codecs.lookup(found[1].decode("ascii")).name
    except (LookupError, ValueError):
        return None
    return None if known.startswith(("utf-16", "utf-32")) else _MEANT.get(known, known)  # those would have been seen


def _damaged_utf8(data: bytes) -> tuple[str, tuple[str, ...]] | None:
    """UTF-8 in which a few bytes are wrong: no other encoding is any likelier."""
    text = data.decode("utf-8", "replace")
    n_bad = text.count("\ufffd") - data.count("\ufffd".encode())
    n_good = sum(1 for _ in islice((c for c in text if c > "\x7f" and c != "\ufffd"), 10 * n_bad))
    if n_good < 10 * n_bad:
        return None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return text, (f"the text is UTF-8 with {counted(n_bad, 'damaged place')}, each shown as \ufffd",)


# what plain_encoding would have seen: of other bytes they make letters that nobody wrote
_SEEN = ("utf_16", "utf_16_be", "utf_16_le", "utf_32", "utf_32_be", "utf_32_le", "utf_7")


def _guess(data: bytes) -> str | None:
    """The likeliest encoding in which the bytes are a text."""
    # Western text with a few accents, dashes and quotes: statistics go wrong where there is little of it
    if 4 * sum(byte > 127 for byte in data[:_BYTES_SHOWN]) < len(data[:_BYTES_SHOWN]):
        western = _others(data, "utf-8")
        if western and western[0].value == "cp1252":
            return "cp1252"
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        raise missing_package("a text in an unknown encoding", "charset-normalizer", "documents") from None

    half = _BYTES_GUESSED // 2
    sample = data if len(data) <= 2 * half else data[:half] + data[-half:]
    for match in from_bytes(sample, cp_exclusion=list(_SEEN)):
        try:
            text = data.decode(match.encoding)
        except (UnicodeError, LookupError):
            continue
        if not _CONTROLS.search(text):
            return match.encoding
    return next((r.value for r in _others(data, "utf-8")), None)
