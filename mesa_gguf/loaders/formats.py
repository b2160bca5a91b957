"""What a file is, by its content. The name decides nothing but which lines of a plain text are headings."""

from __future__ import annotations

import re

# where a mark lies, the mark, what such a file is, and what to do with it
_FILES = (
    (0, b"\xd0\xcf\x11\xe0", "an old Office file", "save it as text first"),
    (0, b"{\\rtf", "an RTF file", "save it as text first"),
    (0, b"\x1f\x8b", "a gzip file", "unpack it first"),
    (0, b"\xfd7zXZ\0", "an xz file", "unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (0, b"Rar!\x1a\x07", "a RAR archive", "unpack it first"),
    (257, b"ustar", "a tar archive", "unpack it first"),
    (0, b"!<arch>\n", "an archive of object files", "give a text as the document"),
    (0, b"\x89PNG", "a picture", "give a text as the document"),
    (0, b"\xff\xd8\xff", "a picture", "give a text as the document"),
    (0, b"II*\0", "a picture", "give a text as the document"),
    (0, b"MM\0*", "a picture", "give a text as the document"),
    (0, b"\0\0\1\0", "a picture", "give a text as the document"),
    (0, b"\0\0\0\x0cjP  ", "a picture", "give a text as the document"),
    (0, b"%!PS", "a PostScript file", "make a PDF file of it first, with ps2pdf for example"),
    (0, b"\x1a\x45\xdf\xa3", "a video or sound", "give a text as the document"),
    (0, b"\x7fELF", "a program", "give a text as the document"),
    (0, b"\xca\xfe\xba\xbe", "a program", "give a text as the document"),
    (0, b"\xcf\xfa\xed\xfe", "a program", "give a text as the document"),
    (0, b"\0asm", "a program", "give a text as the document"),
    (0, b"SQLite format 3\0", "an SQLite database", "save the tables that matter as text first"),
    (0, b"\x93NUMPY", "an array of NumPy", "give a text as the document"),
    (0, b"OTTO\0", "a font", "give a text as the document"),
)
# such marks may begin a text, so these need control characters behind them
_BINARY_FILES = (
    (0, b"GGUF", "a GGUF model", "give a text as the document"),
    (0, b"BZh", "a bzip2 file", "unpack it first"),
    (0, b"GIF8", "a picture", "give a text as the document"),
    (0, b"8BPS", "a picture", "give a text as the document"),
    (4, b"ftypheic", "a picture", "give a text as the document"),
    (4, b"ftypavif", "a picture", "give a text as the document"),
    (8, b"WEBP", "a picture", "give a text as the document"),
    (0, b"AT&TFORM", "a DjVu file", "save it as a PDF file with a text layer first"),
    (60, b"BOOKMOBI", "a Kindle book", "save it as EPUB first"),
    (0, b"ITSF", "a compiled help file", "save it as HTML first"),
    (4, b"ftyp", "a video or sound", "give a text as the document"),
    (0, b"ID3", "a sound", "give a text as the document"),
    (0, b"fLaC", "a sound", "give a text as the document"),
    (0, b"OggS", "a video or sound", "give a text as the document"),
    (0, b"RIFF", "a video, sound or picture", "give a text as the document"),
    (0, b"PAR1", "a Parquet file", "save it as CSV first"),
    (0, b"wOF", "a font", "give a text as the document"),
    (0, b"BM", "a picture", "give a text as the document"),
    (0, b"MZ", "a program", "give a text as the document"),
    (0, b"PK\5\6", "an empty ZIP archive", "give a text as the document"),
    (5, b"\0\0\0{", "a model in safetensors", "give a text as the document"),
)

# packed files other than DOCX and EPUB: a member that only they have
_PACKED = (
    ("xl/workbook.xml", "an Excel workbook", "save its sheets as CSV first"),
    ("xl/workbook.bin", "an Excel workbook", "save its sheets as CSV first"),
    ("ppt/presentation.xml", "a PowerPoint presentation", "save it as PDF first"),
    ("content.xml", "an OpenDocument file", "save it as DOCX or PDF first"),
    ("Index/Document.iwa", "a file of Pages, Numbers or Keynote", "save it as PDF or DOCX first"),
    ("AndroidManifest.xml", "an Android program", "give a text as the document"),
    ("META-INF/MANIFEST.MF", "a Java archive", "give a text as the document"),
)

# pictures that are written as text, and what may stand before their mark
_DRAWINGS = ((re.compile(rb"<(?:\w+:)?svg[\s>]"), "a drawing"), (re.compile(rb"/\* XPM \*/"), "a picture"))
_BEFORE_DRAWING = re.compile(
    rb"\xef\xbb\xbf|\s+|<!--.*?-->|<\?.*?\?>|<!DOCTYPE\s+svg\b[^<>\[]*>", re.DOTALL | re.IGNORECASE
)
_DRAWING_HEAD = 16_384

_PDF_END = re.compile(rb"\bstartxref\s+\d+\s+%%EOF\s*\Z")

# endings of files that are never text; of others, such as .doc, people make texts
_NAMED = {
    ending: what
    for what, endings in (
        ("PDF file", "pdf"),
        ("DOCX file", "docx docm dotx dotm"),
        ("EPUB file", "epub"),
        ("OpenDocument file", "odt ods odp"),
        ("Excel workbook", "xlsx xlsm"),
        ("PowerPoint presentation", "pptx pptm"),
        ("RTF file", "rtf"),
        ("ZIP archive", "zip"),
    )
    for ending in endings.split()
}

_ASIDE = re.compile(r"\s+|<!--.*?-->|<\?.*?\?>", re.DOTALL)
_HTML = re.compile(
    r"<(?:!doctype\s+html|html|head|body|title|meta|link|style|script|base|h[1-6]|p|div|span|table|ul|ol|article|main|section|"
    r"header|nav|center|font|br|hr|a|b|i|img|pre|form|blockquote)\b[^<>]{0,2000}/?>",
    re.IGNORECASE,
)
_HTML_CLOSED = re.compile(
    r"</(?:html|body|p|div|table|ul|ol|h[1-6]|article|section|a|span|title|pre)\s*>|<(?:p|br)\s*/?>", re.I
)

MARKDOWN = frozenset("md markdown mdown mkd mkdn mdx qmd rmd".split())
CODE = frozenset(
    """py pyi pyx c h cc cpp cxx hh hpp cu cuh m mm rs go java kt kts scala cs fs js mjs cjs jsx ts tsx php rb pl pm lua r jl swift
    dart zig nim hs ml mli ex exs erl clj lisp el vb pas f90 f95 sql sh bash zsh fish ps1 bat cmake mk proto""".split()
)
_ATX = re.compile(r"(?:^|\n)[ \t]*\n?#{1,6}[ \t]+\S[^\n]*\n(?:[ \t]*\n|\Z)|\n\n#{1,6}[ \t]+\S[^\n]*(?:\n|\Z)")
_CODE_SIGN = re.compile(
    r"^(?:#!|#include\b|import |from \S+ import |package |use |using |def |class |func )", re.MULTILINE
)
_SHOWN = 65_536


def foreign(data: bytes) -> tuple[str, str] | None:
    """What bytes are that no loader reads, and what to do; None for a PDF, a packed file, and whatever may be text."""
    for at, mark, what, advice in _FILES:
        if data.startswith(mark, at):
            if what == "an old Office file" and "EncryptedPackage".encode("utf-16-le") in data:
                return "an Office file that is locked with a password", "save it without one first"
            return what, advice
    if any(byte < 9 for byte in data[:256]):
        for at, mark, what, advice in _BINARY_FILES:
            if data.startswith(mark, at):
                return what, advice
    head, at = data[:_DRAWING_HEAD], 0
    while aside := _BEFORE_DRAWING.match(head, at):
        at = aside.end()
    for pattern, what in _DRAWINGS:
        if pattern.match(head, at):
            return what, "give a text as the document"
    return None


def is_pdf(data: bytes) -> bool:
    """As readers of PDF see it: the mark may stand behind a kilobyte of something else. One whose mark is damaged still ends as one."""
    at = data.find(b"%PDF-", 0, 1024 + 5)
    return at == 0 or (at > 0 and (b"endobj" in data or b"\0" in data)) or bool(_PDF_END.search(data[-1024:]))


def is_packed(data: bytes) -> bool:
    """A ZIP file, as DOCX and EPUB are. One whose beginning is damaged still has its directory at the end."""
    if data.startswith(b"PK\x03\x04"):
        return True
    return b"PK\1\2" in data and b"PK\5\6" in data[-(1 << 16) - 22 :]


def not_as_named(name: str) -> str | None:
    """What a file is not, though its name says so, when it is taken for a text: it is damaged, and no text. None where the name says no such thing."""
    return _NAMED.get(name.rpartition(".")[2].lower()) if "." in name else None


def packed_kind(members: frozenset[str], mimetype: str) -> str | tuple[str, str]:
    """ "docx" or "epub", or what a packed file is otherwise and what to do.

    Args:
        members: their names.
        mimetype: what its member of that name says.
    """
    if mimetype == "application/epub+zip" or "META-INF/container.xml" in members:
        return "epub"
    for member, what, advice in _PACKED:
        if member in members:
            return what, advice
    if "[Content_Types].xml" in members and any(name.startswith("word/") for name in members):
        return "docx"
    return "a ZIP archive", "unpack it, and give its files or their folder"


def text_kind(text: str, name: str) -> str:
    """ "html", "markdown", "code" or "text".

    Args:
        name: of the file; its ending tells Markdown and code from other text, which reads the same.
    """
    ending = name.rpartition(".")[2].lower() if "." in name else ""
    if ending in MARKDOWN:
        return "markdown"
    if ending in CODE:
        return "code"
    if is_html(text):
        return "html"
    head = text[:_SHOWN]
    if _CODE_SIGN.search(head):
        return "code" if head.startswith("#!") else "text"
    return "markdown" if _ATX.search(head) else "text"


def is_html(text: str) -> bool:
    """Whether a text is a page: begins with a tag of HTML, behind comments, and closes some."""
    at = 0
    while found := _ASIDE.match(text, at):
        at = found.end()
    begin = _HTML.match(text, at)
    if not begin:
        return False
    return begin[0][1:].lower().startswith(("!doctype", "html", "head", "body")) or bool(_HTML_CLOSED.search(text))
