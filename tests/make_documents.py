"""Small real documents of each format, made by hand, so that a test knows where everything in them lies."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence

#
# PDF
#

FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"
NAMELESS = """/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /X def /CMapType 2 def
1 begincodespacerange <00> <FF> endcodespacerange 1 beginbfrange <20> <7E> <E020> endbfrange endcmap end end"""
_PAD = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")

SCANNED = "scanned"
"""In place of a page's lines: a picture."""


def _string(text: str) -> bytes:
    if text.isascii():
        return b"(" + text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)").encode() + b")"
    return b"<feff" + text.encode("utf-16-be").hex().encode() + b">"


def _page_content(lines: Sequence[str]) -> bytes:
    shown = b" ".join(
        b"(" + line.encode("cp1252").replace(b"\\", rb"\\").replace(b"(", rb"\(").replace(b")", rb"\)") + b") Tj T*"
        for line in lines
    )
    return b"BT /F1 12 Tf 72 720 Td 14 TL " + shown + b" ET" if lines else b""


def rc4(key: bytes, data: bytes) -> bytes:
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    out, i, j = bytearray(), 0, 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def pdf(
    pages: Sequence[Sequence[str] | str],
    *,
    title: str = "",
    outline: Sequence[tuple[int, str, int]] = (),
    password: str = "",
    nameless: bool = False,
    field: str = "",
    attached: bool = False,
) -> bytes:
    """A PDF file.

    Args:
        pages: lines of each, or SCANNED.
        outline: level (1 or 2), title and page (from 1) of its bookmarks.
        nameless: its font says of no letter which it is.
        field: what was filled into a form on the first page.
        attached: a file is attached.
    """
    objects: list[bytes] = []

    def add(content: bytes) -> int:
        objects.append(content)
        return len(objects)

    def stream(data: bytes, entries: bytes = b"") -> int:
        number = len(objects) + 1
        if key:
            data = rc4(hashlib.md5(key + number.to_bytes(3, "little") + b"\0\0").digest()[:10], data)
        return add(b"<< /Length %d %s >>\nstream\n" % (len(data), entries) + data + b"\nendstream")

    key = b""
    encrypt = b""
    if password:
        padded = (password.encode() + _PAD)[:32]
        owner = rc4(hashlib.md5(padded).digest()[:5], padded)
        key = hashlib.md5(padded + owner + (-4).to_bytes(4, "little", signed=True) + b"0" * 16).digest()[:5]
        user = rc4(key, _PAD)
        encrypt = b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>" % (
            owner.hex().encode(),
            user.hex().encode(),
        )

    catalog, tree = add(b""), add(b"")
    font = add(FONT)
    if nameless:
        objects[font - 1] = FONT[:-2] + b"/ToUnicode %d 0 R >>" % stream(NAMELESS.encode())
    picture = stream(
        b"\x80", b"/Type /XObject /Subtype /Image /Width 1 /Height 1 /ColorSpace /DeviceGray /BitsPerComponent 8"
    )
    kids = []
    widget = 0
    if field:
        look = stream(
            b"/Tx BMC BT /F1 12 Tf 2 4 Td (%s) Tj ET EMC" % field.encode(),
            b"/Type /XObject /Subtype /Form /BBox [0 0 200 20] /Resources << /Font << /F1 %d 0 R >> >>" % font,
        )
        widget = add(
            b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /V (%s) /F 4 /Rect [72 600 272 620] /AP << /N %d 0 R >> >>"
            % (field.encode(), look)
        )
    for page in pages:
        content = stream(b"100 0 0 100 72 500 cm /I1 Do" if page == SCANNED else _page_content(page))
        annots = b"/Annots [%d 0 R]" % widget if widget and not kids else b""
        kids.append(
            add(
                b"<< /Type /Page /Parent %d 0 R /MediaBox [0 0 612 792] /Contents %d 0 R %s /Resources << /Font << /F1 %d 0 R >> "
                b"/XObject << /I1 %d 0 R >> >> >>" % (tree, content, annots, font, picture)
            )
        )
    objects[tree - 1] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (
        len(kids),
        b" ".join(b"%d 0 R" % kid for kid in kids),
    )
    extra = b""
    if outline:
        extra += b" /Outlines %d 0 R" % _outline(objects, add, kids, outline)
    if field:
        extra += b" /AcroForm << /Fields [%d 0 R] /DR << /Font << /F1 %d 0 R >> >> /DA (/F1 12 Tf) >>" % (widget, font)
    if attached:
        file = stream(b"hidden", b"/Type /EmbeddedFile")
        extra += (
            b" /Names << /EmbeddedFiles << /Names [(a.txt) << /Type /Filespec /F (a.txt) /EF << /F %d 0 R >> >>] >> >>"
            % file
        )
    objects[catalog - 1] = b"<< /Type /Catalog /Pages %d 0 R%s >>" % (tree, extra)
    trailer = b"/Root %d 0 R /ID [<%s> <%s>]" % (catalog, b"30" * 16, b"30" * 16)
    if title:
        trailer += b" /Info %d 0 R" % add(b"<< /Title %s >>" % _string(title))
    if encrypt:
        trailer += b" /Encrypt %d 0 R" % add(encrypt)

    out = bytearray(b"%PDF-1.6\n%\xe2\xe3\xcf\xd3\n")
    at = []
    for number, content in enumerate(objects, 1):
        at.append(len(out))
        out += b"%d 0 obj\n" % number + content + b"\nendobj\n"
    table = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + b"".join(
        b"%010d 00000 n \n" % offset for offset in at
    )
    out += b"trailer << /Size %d %s >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, table)
    return bytes(out)


def _outline(objects: list[bytes], add, kids: list[int], outline: Sequence[tuple[int, str, int]]) -> int:  # type: ignore[no-untyped-def]
    root = add(b"")
    numbers = [add(b"") for _ in outline]
    tops = [i for i, (level, _, _) in enumerate(outline) if level == 1]

    def chain(indices: list[int], parent: int) -> bytes:
        for i in indices:
            inside = [
                j for j in range(i + 1, len(outline)) if outline[j][0] == 2 and max(t for t in tops if t <= j) == i
            ]
            entries = b"/Title %s /Parent %d 0 R /Dest [%d 0 R /Fit]" % (
                _string(outline[i][1]),
                parent,
                kids[outline[i][2] - 1],
            )
            if i != indices[-1]:
                entries += b" /Next %d 0 R" % numbers[indices[indices.index(i) + 1]]
            if i != indices[0]:
                entries += b" /Prev %d 0 R" % numbers[indices[indices.index(i) - 1]]
            if outline[i][0] == 1 and inside:
                entries += b" " + chain(inside, numbers[i])
            objects[numbers[i] - 1] = b"<< " + entries + b" >>"
        return b"/First %d 0 R /Last %d 0 R /Count %d" % (numbers[indices[0]], numbers[indices[-1]], len(indices))

    objects[root - 1] = b"<< /Type /Outlines " + chain(tops, root) + b" >>"
    return root


#
# packed files
#


def packed(members: dict[str, bytes | str], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_STORED if name == "mimetype" else compression
            file.writestr(info, data)
    return out.getvalue()


W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"


def docx_members(body: str, *, title: str = "", notes: str = "") -> dict[str, bytes | str]:
    members: dict[str, bytes | str] = {
        "[Content_Types].xml": """<?xml version="1.0"?><Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">
<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>
<Default Extension="xml" ContentType="application/xml"/></Types>""",
        "_rels/.rels": f"""<Relationships xmlns="{_PACKAGE}"><Relationship Id="r1" Type="{_OFFICE}/officeDocument"
Target="word/document.xml"/></Relationships>""",
        "word/_rels/document.xml.rels": f"""<Relationships xmlns="{_PACKAGE}">
<Relationship Id="r1" Type="{_OFFICE}/styles" Target="styles.xml"/>
<Relationship Id="r2" Type="{_OFFICE}/footnotes" Target="footnotes.xml"/></Relationships>""",
        "word/styles.xml": f"<w:styles {W}>"
        + "".join(
            f'<w:style w:type="paragraph" w:styleId="Heading{i}"><w:name w:val="heading {i}"/></w:style>'
            for i in range(1, 4)
        )
        + '<w:style w:type="paragraph" w:styleId="Title"><w:name w:val="Title"/></w:style></w:styles>',
        "word/document.xml": f'<?xml version="1.0" encoding="UTF-8"?><w:document {W}><w:body>{body}</w:body></w:document>',
    }
    if notes:
        members["word/footnotes.xml"] = f"<w:footnotes {W}>{notes}</w:footnotes>"
    if title:
        members["docProps/core.xml"] = (
            '<cp:coreProperties xmlns:cp="http://schemas.openxmlformats.org/package/2006/metadata/core-properties" '
            f'xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{title}</dc:title></cp:coreProperties>'
        )
    return members


def docx_paragraph(text: str, style: str = "") -> str:
    style = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f'<w:p>{style}<w:r><w:t xml:space="preserve">{text}</w:t></w:r></w:p>'


def docx_table(rows: Sequence[Sequence[str]]) -> str:
    cells = ["".join(f"<w:tc>{docx_paragraph(cell)}</w:tc>" for cell in row) for row in rows]
    return f"<w:tbl>{''.join(f'<w:tr>{row}</w:tr>' for row in cells)}</w:tbl>"


def docx(body: str, *, title: str = "", notes: str = "") -> bytes:
    return packed(docx_members(body, title=title, notes=notes))


CONTAINER = """<?xml version="1.0"?><container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>
<rootfile full-path="OEBPS/content.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""


def epub_members(
    parts: dict[str, str], *, title: str = "A Book", toc: Sequence[tuple[str, str]] = ()
) -> dict[str, bytes | str]:
    """A book.

    Args:
        parts: bodies by file name, in the order of the spine.
        toc: links and labels.
    """
    manifest = "".join(
        f'<item id="i{n}" href="{name}" media-type="{"image/svg+xml" if name.endswith("svg") else "application/xhtml+xml"}"/>'
        for n, name in enumerate(parts)
    )
    spine = "".join(f'<itemref idref="i{n}"/>' for n in range(len(parts)))
    members: dict[str, bytes | str] = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": CONTAINER,
        "OEBPS/content.opf": f"""<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata
xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{title}</dc:title></metadata><manifest>{manifest}
<item id="toc" href="toc.ncx" media-type="application/x-dtbncx+xml"/></manifest><spine>{spine}</spine></package>""",
    }
    if toc:
        points = "".join(
            f'<navPoint><navLabel><text>{label}</text></navLabel><content src="{link}"/></navPoint>'
            for link, label in toc
        )
        members["OEBPS/toc.ncx"] = f'<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/"><navMap>{points}</navMap></ncx>'
    for name, body in parts.items():
        # the head is what breaks a reader of HTML that is no reader of XHTML
        members[f"OEBPS/{name}"] = (
            '<?xml version="1.0" encoding="utf-8"?><!DOCTYPE html><html xmlns="http://www.w3.org/1999/xhtml"><head><title/></head>'
            f"<body>{body}</body></html>"
        )
    return members


def epub(parts: dict[str, str], *, title: str = "A Book", toc: Sequence[tuple[str, str]] = ()) -> bytes:
    return packed(epub_members(parts, title=title, toc=toc))


#
# pages
#

SENTENCES = (
    "The committee met in the old hall by the river and spoke for three hours about the harvest and the new road.",
    "Nobody had expected that the engine would arrive before winter, and so there was no shed for it yet.",
    "A measure of grain cost twelve coins in the market, which was more than most families could pay.",
    "In the laboratory the lamps burned until morning, because the ambassador wanted his answer the next day.",
)


def page(n_sections: int = 3, *, extra: str = "", title: str = "The harvest") -> str:
    """HTML with a menu, an article and a footer."""
    sections = "".join(
        f"<h2>Section {i}</h2><p>{' '.join(SENTENCES)}</p><p>It was <b>number</b> {i} of <a href='/x'>them</a>. {SENTENCES[i % 4]}</p>"
        for i in range(1, n_sections + 1)
    )
    return (
        f"<!DOCTYPE html><html><head><title>{title}</title><script>var secret = 1;</script></head><body>"
        "<nav><ul><li><a href='/'>Home</a></li><li><a href='/about'>About us</a></li></ul></nav>"
        f"<article><h1>{title}</h1>{sections}{extra}</article><footer>Imprint and privacy</footer></body></html>"
    )
