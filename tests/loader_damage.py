"""Damages documents and loads each: what test_loaders.py runs in processes that may abort.

Every variant follows from a seed and its number, which is printed before it is tried.

    python loader_damage.py FORMAT SEED BEGIN END
"""

from __future__ import annotations

import faulthandler
import io
import os
import random
import resource
import signal
import sys
import time
import traceback
import zipfile
from itertools import pairwise
from typing import Any

import make_documents as make
from mesa_gguf import MesaError
from mesa_gguf.loaders import Limits, load_bytes
from mesa_gguf.loaders.readers import warm_up

SECONDS = 20  # a variant that takes longer hangs
MEMORY = 4 << 30
LIMITS = Limits(seconds=None, unpacked_bytes=64 << 20, characters=5_000_000, pages=2000)

NUMBERS = [b"0", b"-1", b"1", b"65536", b"2147483647", b"4294967296", b"99999999999999999999"]
BYTES = [
    b"\0",
    b"\xff",
    b"<",
    b">",
    b"&",
    b'"',
    b"[",
    b"<<",
    b"\xed\xa0\x80",
    b"\xfe\xff",
    b"&#0;",
    b"&#xD800;",
    b"&x;",
    b"%00",
]
MARKUP = [
    b"<p>",
    b"</p>",
    b"<table><tr><td>",
    b"<h1>",
    b"<pre>",
    b"<!--",
    b"-->",
    b"<![CDATA[",
    b"<script>",
    b"<?x",
    b"<svg>",
]


def originals(form: str) -> list[bytes]:
    body = "".join(
        make.docx_paragraph(f"Chapter {i}", f"Heading{1 + i % 2}") + make.docx_paragraph(make.SENTENCES[i % 4])
        for i in range(4)
    ) + make.docx_table([["a", "b"], ["c", "d"]])
    parts = {f"part{i}.xhtml": f"<h1>Part {i}</h1><p>{make.SENTENCES[i % 4]}</p>" for i in range(3)}
    if form == "pdf":
        pages = [[*make.SENTENCES], ["Second page"], make.SCANNED]
        return [
            make.pdf(pages, title="Report", outline=[(1, "One", 1), (2, "Two", 2)], field="filled in", attached=True),
            make.pdf(pages, nameless=True),
            make.pdf(pages, password="x"),
        ]
    if form == "html":
        table = "<table><tr><td>a<td>b<tr><td>c</table><pre>x = 1\n\ny = 2</pre><ul><li>one<li>two</ul>"
        return [
            make.page(2, extra=table).encode(),
            make.page(1, title="Zürich").encode("utf-16"),
            b"<p>short <b>page</p>",
        ]
    if form == "docx":
        note = f'<w:footnote w:id="1">{make.docx_paragraph("A note.")}</w:footnote>'
        return [make.docx(body, title="Report", notes=note), make.packed(make.docx_members(body), zipfile.ZIP_STORED)]
    if form == "epub":
        members = make.epub_members(parts, toc=[("part0.xhtml", "One")])
        return [make.packed(members), make.packed(members, zipfile.ZIP_STORED)]
    if form == "markdown":
        return [
            "# Títle\n\nText\n\nTwo\n---\n\n```\ncode\n```\n\n| a | b |\n".encode(),
            b"---\ntitle: x\n---\n# A\n\nb\n\n## C\n",
        ]
    return [
        "Ein Text mit Umlauten: äöüß.\n".encode() * 9,
        "Ein Text: äöüß.\n".encode("cp1252") * 9,
        "日本語の文。".encode("utf-16"),
    ]


def damage(data: bytes, rng: random.Random) -> bytes:
    """One to eight changes of bytes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        at = rng.randrange(len(out) + 1)
        end = min(at + rng.choice([1, 2, 4, 16, 200]), len(out))
        what = rng.randrange(8)
        if what == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif what == 1:
            del out[at:end]
        elif what == 2:
            out[at:at] = out[at:end] * rng.choice([1, 2, 50])
        elif what == 3:
            out[at:at] = rng.choice(BYTES + MARKUP) * rng.choice([1, 1, 1, 300])
        elif what == 4:
            digits = [i for i, byte in enumerate(out) if 48 <= byte <= 57]
            if digits:
                start = rng.choice(digits)
                out[start : start + 1] = rng.choice(NUMBERS)
        elif what == 5:
            out[at:end] = rng.randbytes(end - at)
        elif what == 6 and rng.random() < 0.5:
            del out[at:]
        else:
            other = rng.randrange(len(out) + 1)
            out[at:end] = out[other : other + end - at]
    return bytes(out)


def damage_members(data: bytes, rng: random.Random) -> bytes:
    """A packed file whose members are damaged, or missing, or called otherwise; the packing is sound."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members: dict[str, bytes | str] = {name: file.read(name) for name in file.namelist()}
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(list(members) or ["x"])
        content = members.pop(name, b"")
        assert isinstance(content, bytes)
        what = rng.randrange(6)
        if what < 4:
            members[name] = damage(content, rng)
        elif what == 4:
            members[rng.choice(["../" + name, "/" + name, name.upper(), "C:\\" + name])] = content
    return make.packed(members)


def variant(form: str, sources: list[bytes], seed: int, number: int) -> bytes:
    rng = random.Random(f"{form} {seed} {number}")
    data = rng.choice(sources)
    return damage_members(data, rng) if form in ("docx", "epub") and rng.random() < 0.6 else damage(data, rng)


def watch(event: str, details: tuple[Any, ...]) -> None:
    """Nothing is fetched, written or started."""
    writes = event == "open" and isinstance(details[1], str) and set(details[1]) & set("wax+")
    if writes or event.startswith(
        ("socket.", "subprocess.", "os.system", "os.remove", "os.rename", "os.mkdir", "shutil.", "urllib.")
    ):
        print(f"forbidden: {event} {details}", flush=True)
        raise SystemExit(3)


def main(form: str, seed: int, begin: int, end: int) -> None:
    faulthandler.enable()
    warm_up("pdf" if form == "pdf" else "packed" if form in ("docx", "epub") else "html", False)
    for original in originals(form):
        load_bytes(original, f"file.{form}", password="x", limits=LIMITS)  # also for what is imported late
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(watch)
    sources = originals(form)
    loaded = refused = 0
    slowest = 0.0
    name = "file.md" if form == "markdown" else f"file.{form}"
    for number in range(begin, end):
        print(f"variant {number}", flush=True)
        data = variant(form, sources, seed, number)
        signal.alarm(SECONDS)
        before = time.process_time()
        try:
            document = load_bytes(data, name, password="x", everything=number % 2 == 1, limits=LIMITS)
        except MesaError as err:
            said = str(err)
            assert said.startswith("file.") and "\n" not in said and len(said) < 1000, said
            refused += 1
            cause = err.__cause__
            if cause is not None:  # what a package raised, not what a loader has wrong
                frame = traceback.extract_tb(cause.__traceback__)[-1]
                assert f"mesa_gguf{os.sep}loaders" not in frame.filename, "".join(traceback.format_exception(cause))
        else:
            assert document.text.strip()
            assert document.places[0].start == 0
            assert all(a.start < b.start for a, b in pairwise(document.places))
            assert document.places[-1].start <= len(document.text)
            assert "\r" not in document.text and "\0" not in document.text
            document.text.encode()  # no halves of characters
            loaded += 1
        signal.alarm(0)
        slowest = max(slowest, time.process_time() - before)
    print(f"done: {loaded} loaded, {refused} refused, the slowest in {slowest:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
