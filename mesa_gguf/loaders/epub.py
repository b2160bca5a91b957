"""EPUB: the parts that its package document lists, in its order."""

from __future__ import annotations

import re
from html.entities import name2codepoint
from typing import TYPE_CHECKING

from ..errors import DocumentError, PromptError, missing_package
from .decoding import decode_any
from .document import Builder, Headings, Limits, LoadedDocument, Place, listed, one_line
from .html import Marks, check_depth, parse_html, whole_text
from .packed import Packed

if TYPE_CHECKING:
    from lxml.etree import XMLParser
    from lxml.etree import _Element as Element

_PAGES = ("application/xhtml+xml", "text/html", "text/x-oeb1-document", "application/xml", "text/xml")
_ENTITY = re.compile(r"&([A-Za-z][A-Za-z0-9]{1,30});")
_OWN = ("amp", "lt", "gt", "quot", "apos")  # XML knows these
_FONTS = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")  # obfuscation, which locks no text


def read_epub(packed: Packed, limits: Limits) -> LoadedDocument:
    """A book and its places.

    Raises:
        DocumentError: it is damaged, locked, has no text, or is beyond a limit.
        MissingPackageError: lxml or inscriptis is not there.
    """
    name = packed.name
    container = _xml(packed, "META-INF/container.xml", limits)
    root = next((el.get("full-path") for el in _all(container, "rootfile") if el.get("full-path")), None)
    package_at = packed.resolve("", root) if root else None
    if package_at is None:
        raise DocumentError(f"{name} is a damaged EPUB: its container names no package document that is there")
    package = _xml(packed, package_at, limits)
    items = {el.get("id"): el for el in _all(package, "item")}
    locked = _locked(packed, limits)
    labels = _labels(packed, package_at, package, limits)

    builder = Builder(name, limits)
    headings = Headings()
    n_parts, missing, empty = 0, [], []
    seen: set[str] = set()
    for n_parts, ref in enumerate(_all(package, "itemref"), 1):
        item = items.get(ref.get("idref"))
        at = packed.resolve(package_at, item.get("href", "")) if item is not None else None
        if item is None or at is None:
            missing.append(n_parts)
            continue
        if at in locked:
            raise DocumentError(f"{name} is protected (DRM), so that only its shop's reader can open it")
        if at in seen:
            continue  # listed twice: a book of one part a million times would be none
        seen.add(at)
        if item.get("media-type") not in _PAGES:
            empty.append(n_parts)
            continue
        text, places, headings = _part(packed, at, headings, labels.get(at), limits)
        if not text.strip():
            empty.append(n_parts)
            continue
        builder.add("\n" if builder.n_characters else "")
        builder.add(text, places)
    if missing:
        builder.notes.append(f"parts that are missing in the file: {listed(missing)} of {n_parts}")
    if empty:
        builder.notes.append(f"parts without text, pictures for example: {listed(empty)} of {n_parts}")
    title = next((one_line("".join(el.itertext())) for el in _all(package, "title")), None)
    return builder.document("epub", title)


def _part(
    packed: Packed, at: str, headings: Headings, label: str | None, limits: Limits
) -> tuple[str, list[Place], Headings]:
    """A part's text, its places, and the headings in force behind it.

    Args:
        headings: those in force before it.
        label: what the table of contents calls it.
    """
    tree = _page(packed, at, limits)
    body = next(iter(_all(tree, "body")), tree)
    marks = Marks(body)
    text, places = marks.take_out(whole_text(body), headings)
    if label and not places:
        headings = Headings()
        places = [Place(0, None, headings.enter(1, label))]
    return text, places, headings


def _page(packed: Packed, at: str, limits: Limits) -> Element:
    """A part's tree, with the names of its elements as in HTML."""
    from lxml import etree

    try:
        source, _ = decode_any(packed.read(at), f"{packed.name}: {one_line(at)}", markup=True)
    except PromptError as err:
        raise DocumentError(err.what, *err.remedies) from None
    known = _ENTITY.sub(
        lambda m: m[0] if m[1] in _OWN else chr(name2codepoint[m[1]]) if m[1] in name2codepoint else "\ufffd", source
    )
    known = re.sub(r"\A\s*<\?xml[^>]{0,200}\?>", "", known)
    try:
        tree = etree.fromstring(known.encode("utf-8", "replace"), _parser())
    except etree.XMLSyntaxError:
        return parse_html(source, packed.name, limits)
    check_depth(tree, packed.name, limits)
    etree.strip_elements(tree, etree.Comment, etree.ProcessingInstruction, etree.Entity, with_tail=False)
    for el in tree.iter():
        if isinstance(el.tag, str):
            el.tag = etree.QName(el).localname.lower()
    return tree


def _xml(packed: Packed, at: str, limits: Limits) -> Element:
    try:
        from lxml import etree
    except ImportError:
        raise missing_package("EPUB", "lxml", "documents") from None

    try:
        tree = etree.fromstring(packed.read(at), _parser())
    except (etree.XMLSyntaxError, ValueError) as err:
        raise DocumentError(f"{packed.name} is a damaged EPUB: {one_line(at)}: {one_line(str(err))}") from None
    check_depth(tree, packed.name, limits)
    return tree


def _parser() -> XMLParser:
    """One that fetches nothing, opens nothing, and stops where entities make much of little."""
    from lxml import etree

    return etree.XMLParser(resolve_entities="internal", no_network=True, load_dtd=False, huge_tree=False)


def _all(tree: Element, tag: str) -> list[Element]:
    """The elements of a name, in whatever namespace: books get those wrong."""
    return list(tree.iter(f"{{*}}{tag}"))


def _locked(packed: Packed, limits: Limits) -> set[str]:
    """The members that are encrypted, fonts left out."""
    if "META-INF/encryption.xml" not in packed.members:
        return set()
    found = set()
    for data in _all(_xml(packed, "META-INF/encryption.xml", limits), "EncryptedData"):
        methods = {el.get("Algorithm") for el in _all(data, "EncryptionMethod")}
        if not methods <= set(_FONTS):
            found |= {packed.resolve("", el.get("URI", "")) or "" for el in _all(data, "CipherReference")}
    return found


def _labels(packed: Packed, package_at: str, package: Element, limits: Limits) -> dict[str, str]:
    """What the table of contents calls the parts, for those that have no headings."""
    labels: dict[str, str] = {}
    for item in _all(package, "item"):
        is_nav = "nav" in (item.get("properties") or "").split()
        if not is_nav and item.get("media-type") != "application/x-dtbncx+xml":
            continue
        at = packed.resolve(package_at, item.get("href", ""))
        if at is None:
            continue
        try:
            tree = _xml(packed, at, limits)
        except DocumentError:
            continue  # it helps only
        if is_nav:
            found = [(el.get("href", ""), "".join(el.itertext())) for el in _all(tree, "a")]
        else:
            found = [
                (content.get("src", ""), "".join(label.itertext()))
                for point in _all(tree, "navPoint")
                for content in point.findall("{*}content")
                for label in point.findall("{*}navLabel")
            ]
        for link, label in found:
            part = packed.resolve(at, link)
            if part is not None and label.strip():
                labels.setdefault(part, label)
    return labels
