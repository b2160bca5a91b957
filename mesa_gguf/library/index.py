"""The index of a library: documents, their places, their chunks by vocabulary, collections, and what is kept of which model.

SQLite with write-ahead logging, FTS5 over the chunks' text. The text of every document is here, so that a chunk whose rows were
dropped, or are of another model, is simply read again.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .store import LibraryError

VERSION = 1
BUSY_SECONDS = 60.0  # another process may be writing

# note: AUTOINCREMENT, so that a number that was given to a document or chunk never means another one
_SCHEMA = """
CREATE TABLE documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    source TEXT,
    digest TEXT NOT NULL,
    kind TEXT NOT NULL,
    title TEXT NOT NULL,
    text TEXT NOT NULL,
    places TEXT NOT NULL,
    notes TEXT NOT NULL,
    added REAL NOT NULL,
    UNIQUE (source, digest)
);
CREATE INDEX documents_by_digest ON documents (digest);
CREATE TABLE spans (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    document INTEGER NOT NULL REFERENCES documents (id) ON DELETE CASCADE,
    vocabulary TEXT NOT NULL,
    ordinal INTEGER NOT NULL,
    start INTEGER NOT NULL,
    stop INTEGER NOT NULL,
    n_tokens INTEGER NOT NULL,
    heading TEXT NOT NULL,
    page_first INTEGER,
    page_last INTEGER,
    UNIQUE (document, vocabulary, ordinal)
);
CREATE VIRTUAL TABLE words USING fts5 (text, content='', tokenize="unicode61 remove_diacritics 2");
CREATE TABLE collections (name TEXT PRIMARY KEY, added REAL NOT NULL);
CREATE TABLE members (
    collection TEXT NOT NULL REFERENCES collections (name) ON DELETE CASCADE,
    document INTEGER NOT NULL REFERENCES documents (id) ON DELETE CASCADE,
    PRIMARY KEY (collection, document)
);
CREATE TABLE kept (
    key TEXT PRIMARY KEY,
    model TEXT NOT NULL,
    n_tokens INTEGER NOT NULL,
    size INTEGER NOT NULL,
    used INTEGER NOT NULL
);
CREATE INDEX kept_by_use ON kept (used);
CREATE TABLE preambles (model TEXT PRIMARY KEY, name TEXT NOT NULL, tokens TEXT NOT NULL);
"""


@dataclass(frozen=True)
class DocumentRow:
    """A document as the index has it.

    Attributes:
        source: the file that it came from; None where there was none.
        digest: SHA-256 of the file's bytes.
        places: (start, page, headings) each, as the loader gave them.
    """

    id: int
    name: str
    source: str | None
    digest: str
    kind: str
    title: str
    text: str
    places: list[tuple[int, int | None, list[str]]]
    notes: list[str]
    added: float


@dataclass(frozen=True)
class SpanRow:
    """A chunk of a document, as a vocabulary counts tokens.

    Attributes:
        start, stop: in characters of the document's text.
        n_tokens: of its text.
    """

    id: int
    document: int
    ordinal: int
    start: int
    stop: int
    n_tokens: int
    heading: list[str]
    page_first: int | None
    page_last: int | None


@dataclass(frozen=True)
class KeptRow:
    """A chunk whose rows are kept: of which model, and when it was used last, as a count of uses."""

    key: str
    model: str
    n_tokens: int
    size: int
    used: int


class Index:
    """The index in a file. May be used by several threads and processes.

    Raises:
        LibraryError: the file is of a future version, is no index, or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self.mended: str | None = None
        try:
            self._look(path)
            self._open()
        except sqlite3.DatabaseError as err:
            if isinstance(err, sqlite3.OperationalError):
                raise LibraryError(
                    f"{path}: the library's index cannot be opened: {err}: see whether the disk is full, or can be written to"
                ) from None
            self._set_aside(err)
            self._open()
        except OSError as err:
            raise LibraryError(f"{path}: the library cannot be kept there: {err.strerror}") from None

    def _look(self, path: Path) -> None:
        """SQLite takes a file that was cut to nothing for a new one. One that another process makes just now is younger."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return
        if status.st_size < 100 and abs(time.time() - status.st_mtime) > BUSY_SECONDS:
            raise sqlite3.DatabaseError(f"it has {status.st_size} bytes")

    def _open(self) -> None:
        self._db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            self.path.chmod(0o600)
            self._db.execute("PRAGMA foreign_keys = ON")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise LibraryError(
                    f"{self.path}: this library is of a newer mesa-gguf (version {version}, this one knows {VERSION}): "
                    "update mesa-gguf, or use another folder"
                )
            mode = self._db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode.lower() != "wal":
                self._db.execute("PRAGMA journal_mode = DELETE")  # as on network drives, where WAL does not work
            self._db.execute("PRAGMA synchronous = FULL")
            if version == 0:
                with self.writing():
                    if self._db.execute("PRAGMA user_version").fetchone()[0] == 0:  # no other process was faster
                        for statement in filter(str.strip, _SCHEMA.split(";\n")):
                            self._db.execute(statement)
                        self._db.execute(f"PRAGMA user_version = {VERSION}")
            elif self._db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("its pages are damaged")
        except BaseException:
            self._db.close()
            raise

    def _set_aside(self, err: Exception) -> None:
        """A damaged index is kept under another name: the texts in it may be what somebody needs."""
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self.path}{suffix}").replace(f"{aside}{suffix}")
        self.mended = f"{self.path}: the index was damaged ({err}): it is now {aside.name}, and a new one was begun"

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that has the right to write from its beginning; taken back where an error leaves it."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.DatabaseError as err:
                raise self._unusable("written to", err) from None

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.DatabaseError as err:
                raise self._unusable("read", err) from None

    def _unusable(self, what: str, err: Exception) -> LibraryError:
        """The error to raise: the disk is full or cannot be written to, the index is damaged, or the library was closed."""
        return LibraryError(
            f"{self.path}: the library cannot be {what}: {err}. Where the disk has room and can be written to, the index is damaged: "
            "move it away, and add the documents again"
        )

    def _unpacked(self, packed: str) -> list[Any]:
        try:
            value = json.loads(packed)
            if not isinstance(value, list):
                raise ValueError("a list is no list")
        except (TypeError, ValueError) as err:
            raise self._unusable("read", err) from None
        return value

    def _document(self, row: Sequence[Any]) -> DocumentRow:
        number, name, source, digest, kind, title, text, places, notes, added = row
        unpacked = [(start, page, heading) for start, page, heading in self._unpacked(places)]
        return DocumentRow(number, name, source, digest, kind, title, text, unpacked, self._unpacked(notes), added)

    #
    # documents
    #

    def add_document(
        self,
        *,
        name: str,
        source: str | None,
        digest: str,
        kind: str,
        title: str,
        text: str,
        places: Iterable[tuple[int, int | None, Sequence[str]]],
        notes: Sequence[str] = (),
        again: bool = False,
    ) -> int:
        """The number of a document; what its source held before goes. A document that is there already is the same one,
        unless it was loaded again in another way."""
        packed = json.dumps([(start, page, list(heading)) for start, page, heading in places])
        with self.writing() as db:
            found = db.execute("SELECT id FROM documents WHERE digest = ? AND source IS ?", (digest, source)).fetchone()
            if found is not None and not again:
                return int(found[0])
            before = [] if found is None else [int(found[0])]
            if source is not None:
                before = [int(old) for (old,) in db.execute("SELECT id FROM documents WHERE source = ?", (source,))]
            collections: set[str] = set()
            for old in before:  # the new version takes its place in the collections
                collections |= {
                    name for (name,) in db.execute("SELECT collection FROM members WHERE document = ?", (old,))
                }
                self._remove(db, old)
            cursor = db.execute(
                "INSERT INTO documents (name, source, digest, kind, title, text, places, notes, added)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (name, source, digest, kind, title, text, packed, json.dumps(list(notes)), time.time()),
            )
            new = int(cursor.lastrowid or 0)
            db.executemany(
                "INSERT INTO members VALUES (?, ?)", [(collection, new) for collection in sorted(collections)]
            )
            return new

    @staticmethod
    def _remove(db: sqlite3.Connection, document: int) -> None:
        texts = db.execute(
            "SELECT s.id, substr(d.text, s.start + 1, s.stop - s.start), s.heading FROM spans s"
            " JOIN documents d ON d.id = s.document WHERE d.id = ?",
            (document,),
        ).fetchall()
        for span, text, heading in texts:
            db.execute(
                "INSERT INTO words (words, rowid, text) VALUES ('delete', ?, ?)",
                (span, words_of(text, json.loads(heading))),
            )
        db.execute("DELETE FROM documents WHERE id = ?", (document,))

    def remove_document(self, document: int) -> None:
        with self.writing() as db:
            self._remove(db, document)

    def documents(self, collection: str | None = None) -> list[DocumentRow]:
        """All documents, or those of a collection, in the order in which they were added."""
        which = "" if collection is None else " WHERE id IN (SELECT document FROM members WHERE collection = ?)"
        rows = self._rows(
            f"SELECT id, name, source, digest, kind, title, text, places, notes, added FROM documents{which} ORDER BY id",
            () if collection is None else (collection,),
        )
        return [self._document(row) for row in rows]

    def document_numbers(self, collection: str | None = None) -> list[int]:
        """The numbers of all documents, or of those of a collection, without their texts."""
        which = "" if collection is None else " WHERE id IN (SELECT document FROM members WHERE collection = ?)"
        values = () if collection is None else (collection,)
        return [int(number) for (number,) in self._rows(f"SELECT id FROM documents{which} ORDER BY id", values)]

    def document(self, document: int) -> DocumentRow | None:
        rows = self._rows(
            "SELECT id, name, source, digest, kind, title, text, places, notes, added FROM documents WHERE id = ?",
            (document,),
        )
        return self._document(rows[0]) if rows else None

    def find_document(self, digest: str, source: str | None) -> int | None:
        """The document of these bytes, of this source if there are several."""
        rows = self._rows("SELECT id FROM documents WHERE digest = ? ORDER BY source IS NOT ?, id", (digest, source))
        return int(rows[0][0]) if rows else None

    #
    # chunks
    #

    def set_spans(
        self,
        document: int,
        vocabulary: str,
        spans: Iterable[tuple[int, int, int, Sequence[str], int | None, int | None]],
    ) -> None:
        """Note how a vocabulary cuts a document: (start, stop, n_tokens, heading, page_first, page_last) each."""
        row = self.document(document)
        if row is None:
            raise LibraryError(f"document {document} is not in the library any more")
        with self.writing() as db:
            if db.execute(
                "SELECT 1 FROM spans WHERE document = ? AND vocabulary = ?", (document, vocabulary)
            ).fetchone():
                return  # another process was faster
            for ordinal, (start, stop, n_tokens, heading, first, last) in enumerate(spans):
                cursor = db.execute(
                    "INSERT INTO spans (document, vocabulary, ordinal, start, stop, n_tokens, heading, page_first, page_last)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (document, vocabulary, ordinal, start, stop, n_tokens, json.dumps(list(heading)), first, last),
                )
                db.execute(
                    "INSERT INTO words (rowid, text) VALUES (?, ?)",
                    (cursor.lastrowid, words_of(row.text[start:stop], heading)),
                )

    def spans(self, document: int, vocabulary: str) -> list[SpanRow]:
        """The chunks of a document in order; empty if that vocabulary has not cut it yet."""
        rows = self._rows(
            "SELECT id, document, ordinal, start, stop, n_tokens, heading, page_first, page_last FROM spans"
            " WHERE document = ? AND vocabulary = ? ORDER BY ordinal",
            (document, vocabulary),
        )
        return [
            SpanRow(span, of, ordinal, start, stop, n_tokens, self._unpacked(heading), first, last)
            for span, of, ordinal, start, stop, n_tokens, heading, first, last in rows
        ]

    def search(self, question: str, vocabulary: str, documents: Sequence[int], limit: int) -> list[tuple[int, float]]:
        """The chunks that match a question best: (chunk, score) each, the larger the better. Source: BM25, by FTS5."""
        terms = terms_of(question)
        if not terms or not documents:
            return []
        query = " OR ".join(f'"{term}"' for term in terms)
        with self._lock:
            self._db.execute("CREATE TEMP TABLE IF NOT EXISTS chosen (document INTEGER PRIMARY KEY)")
            self._db.execute("DELETE FROM chosen")
            self._db.executemany("INSERT OR IGNORE INTO chosen VALUES (?)", [(document,) for document in documents])
            rows = self._rows(
                "SELECT s.id, -bm25(words) FROM words JOIN spans s ON s.id = words.rowid"
                " WHERE words MATCH ? AND s.vocabulary = ? AND s.document IN (SELECT document FROM chosen)"
                " ORDER BY bm25(words), s.id LIMIT ?",
                (query, vocabulary, limit),
            )
        return [(int(span), float(score)) for span, score in rows]

    #
    # collections
    #

    def add_to_collection(self, collection: str, documents: Iterable[int]) -> None:
        with self.writing() as db:
            db.execute("INSERT OR IGNORE INTO collections VALUES (?, ?)", (collection, time.time()))
            db.executemany("INSERT OR IGNORE INTO members VALUES (?, ?)", [(collection, d) for d in documents])

    def remove_from_collection(self, collection: str, document: int) -> None:
        with self.writing() as db:
            db.execute("DELETE FROM members WHERE collection = ? AND document = ?", (collection, document))

    def collections_of(self, document: int) -> list[str]:
        """The collections that a document is in."""
        rows = self._rows("SELECT collection FROM members WHERE document = ? ORDER BY collection", (document,))
        return [str(name) for (name,) in rows]

    def collections(self) -> list[tuple[str, int]]:
        """Name and number of documents of each."""
        return [
            (name, n)
            for name, n in self._rows(
                "SELECT c.name, count(m.document) FROM collections c LEFT JOIN members m ON m.collection = c.name"
                " GROUP BY c.name ORDER BY c.name"
            )
        ]

    def remove_collection(self, collection: str) -> None:
        with self.writing() as db:
            db.execute("DELETE FROM collections WHERE name = ?", (collection,))

    #
    # what is kept
    #

    def note_kept(self, key: str, model: str, n_tokens: int, size: int) -> None:
        with self.writing() as db:
            db.execute(
                "INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?, (SELECT coalesce(max(used), 0) + 1 FROM kept))",
                (key, model, n_tokens, size),
            )

    def note_used(self, keys: Sequence[str]) -> None:
        """They were used just now. note: counted, not timed: clocks jump."""
        with self.writing() as db:
            (now,) = db.execute("SELECT coalesce(max(used), 0) + 1 FROM kept").fetchone()
            db.executemany("UPDATE kept SET used = ? WHERE key = ?", [(now, key) for key in keys])

    def note_dropped(self, keys: Iterable[str]) -> None:
        with self.writing() as db:
            db.executemany("DELETE FROM kept WHERE key = ?", [(key,) for key in keys])

    def kept(self) -> list[KeptRow]:
        """What is kept, least recently used first."""
        return [
            KeptRow(*row) for row in self._rows("SELECT key, model, n_tokens, size, used FROM kept ORDER BY used, key")
        ]

    def kept_bytes(self) -> int:
        return int(self._rows("SELECT coalesce(sum(size), 0) FROM kept")[0][0])

    #
    # preambles
    #

    def preamble(self, model: str, name: str, tokens: Sequence[int]) -> list[int]:
        """The preamble that this library's chunks of a model were read behind; the first one that is given stays.

        note: some chat templates write the date into it, which would make every chunk another one tomorrow.
        """
        there = self._rows("SELECT tokens FROM preambles WHERE model = ?", (model,))
        if not there:  # a library that cannot be written to may have it
            with self.writing() as db:
                db.execute("INSERT OR IGNORE INTO preambles VALUES (?, ?, ?)", (model, name, json.dumps(list(tokens))))
            there = self._rows("SELECT tokens FROM preambles WHERE model = ?", (model,))
        return [int(token) for token in self._unpacked(there[0][0])]

    def model_names(self) -> dict[str, str]:
        return dict(self._rows("SELECT model, name FROM preambles"))


#
# words
#

_WORD = re.compile(r"\w+")
_NO_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)


def words_of(text: str, heading: Sequence[str] = ()) -> str:
    """A text as it is searched: its headings before it; of scripts without spaces, each character and each pair as words."""
    return _pairs(unicodedata.normalize("NFKC", " ".join((*heading, text))))


def _pairs(text: str) -> str:
    def pairs(match: re.Match[str]) -> str:
        run = match[0]
        return f" {' '.join((*run, *(run[i : i + 2] for i in range(len(run) - 1))))} "

    return _NO_SPACES.sub(pairs, text)


def terms_of(question: str) -> list[str]:
    """The words that a question is searched by: each once, those that nearly every text has left out if others are there."""
    words = list(dict.fromkeys(word.casefold() for word in _WORD.findall(words_of(question))))
    content = [word for word in words if word not in _COMMON]
    return content or words


# of the languages that people ask in most; BM25 gives them little weight, but many of them outweigh one rare word in a short chunk
_COMMON = frozenset(
    "a an and are as at be by did do does for from had has have how i in is it of on or that the their there they this to was were "
    "what when where which who whom whose why will with you your "
    "der die das und ist in von mit was wer wo wann wie warum ein eine "
    "le la les un une des et est de du dans que qui quoi où quand "
    "el los las un una y es de en que quién dónde cuándo cómo".split()
)
