"""The index of a library: documents, their places, their chunks by vocabulary, collections, and what is kept of which model.

SQLite with write-ahead logging, FTS5 over the chunks' text. The text of every document is here, so that a chunk whose rows were
dropped, or are of another model, is simply read again.

SQLite notices pages that make no sense, but not another letter in a text. So what answers depend on has a seal, a checksum that is
compared when it is read. Chunks are cut anew where theirs are damaged; a document whose text is damaged cannot be read until it is
added again.
"""

from __future__ import annotations

import contextlib
import hashlib
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

VERSION = 2
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
    seal TEXT NOT NULL DEFAULT '',
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
CREATE TABLE cuts (
    document INTEGER NOT NULL REFERENCES documents (id) ON DELETE CASCADE,
    vocabulary TEXT NOT NULL,
    seal TEXT NOT NULL,
    PRIMARY KEY (document, vocabulary)
);
CREATE VIRTUAL TABLE words USING fts5 (text, content='', tokenize="unicode61 remove_diacritics 2");
CREATE TABLE collections (name TEXT PRIMARY KEY, added REAL NOT NULL, seal TEXT NOT NULL DEFAULT '');
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
CREATE TABLE preambles (model TEXT PRIMARY KEY, name TEXT NOT NULL, tokens TEXT NOT NULL, seal TEXT NOT NULL DEFAULT '');
"""

_DOCUMENT = "id, name, source, digest, kind, title, text, places, notes, added, seal"
_SPAN = "id, document, ordinal, start, stop, n_tokens, heading, page_first, page_last"


def seal(*parts: object) -> str:
    """A checksum of values as SQLite gives them back."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True)
class DocumentRow:
    """A document as the index has it.

    Attributes:
        source: the file that it came from; None where there was none.
        digest: SHA-256 of the file's bytes.
        places: (start, page, headings) each, as the loader gave them.
        whole: it is what was put there; else it was damaged, and must not be read.
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
    whole: bool = True


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
        self.n_forgotten = 0  # times that the chunks of all documents were forgotten, to be cut anew
        try:
            self._open_between_others()
        except sqlite3.DatabaseError as err:
            if _is_the_disk(err):
                raise LibraryError(
                    f"{path}: the library's index cannot be opened: {err}: see whether the disk is full, or can be written to"
                ) from None
            self._begin_anew(err)
        except OSError as err:
            raise LibraryError(f"{path}: the library cannot be kept there: {err.strerror}") from None

    def _open_between_others(self) -> None:
        """Open it; where others open it at the same moment, after them.

        note: SQLite does not wait for those that change the journal's mode, whatever its timeout is.
        """
        give_up = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._look(self.path)
                self._open()
                return
            except sqlite3.OperationalError as err:
                if "locked" not in str(err) or time.monotonic() > give_up:
                    raise
                time.sleep(0.05)

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
        self._db.text_factory = _text  # damaged text is no error of SQLite's: its seal does not fit
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
                        for statement in _statements():
                            self._db.execute(statement)
                        self._db.execute(f"PRAGMA user_version = {VERSION}")
            elif version == 1:
                self._seal_all()
            elif self._db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("its pages are damaged")
            if not {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")} >= _TABLES:
                raise sqlite3.DatabaseError("it has not all tables")
        except BaseException:
            self._db.close()
            raise

    def _begin_anew(self, err: Exception) -> None:
        """Set a damaged index aside, and begin another one with what is whole in it."""
        self.n_forgotten += 1
        with contextlib.suppress(AttributeError):
            self._db.close()
        aside = self._set_aside(err)
        self._open()
        self._salvage(aside)

    def _seal_all(self) -> None:
        """Bring an index of version 1, which had no seals, to this one."""
        with self.writing() as db:
            if db.execute("PRAGMA user_version").fetchone()[0] != 1:
                return  # another process was faster
            for table in ("documents", "collections", "preambles"):
                db.execute(f"ALTER TABLE {table} ADD COLUMN seal TEXT NOT NULL DEFAULT ''")
            for (document,) in db.execute("SELECT id FROM documents").fetchall():
                self._seal_document(db, document)
            for (collection,) in db.execute("SELECT name FROM collections").fetchall():
                self._seal_collection(db, collection)
            for row in db.execute("SELECT model, name, tokens FROM preambles").fetchall():
                db.execute("UPDATE preambles SET seal = ? WHERE model = ?", (seal(*row), row[0]))
            self._forget_cuts(db)
            db.execute(f"PRAGMA user_version = {VERSION}")

    def _forget_cuts(self, db: sqlite3.Connection) -> None:
        """Documents are cut into chunks anew when they are asked about. What is kept of chunks stays."""
        self.n_forgotten += 1
        for table in ("spans", "cuts", "words"):
            db.execute(f"DROP TABLE IF EXISTS {table}")
        for statement in _statements():
            if any(f"TABLE {table} " in statement for table in ("spans", "cuts", "words")):
                db.execute(statement)

    @staticmethod
    def _seal_document(db: sqlite3.Connection, document: int) -> None:
        (*values, _) = db.execute(f"SELECT {_DOCUMENT} FROM documents WHERE id = ?", (document,)).fetchone()
        db.execute("UPDATE documents SET seal = ? WHERE id = ?", (seal(*values), document))

    @staticmethod
    def _seal_collection(db: sqlite3.Connection, collection: str) -> None:
        db.execute("UPDATE collections SET seal = ? WHERE name = ?", (_members(db, collection), collection))

    def _salvage(self, aside: Path) -> None:
        """Bring what is whole in a damaged index into this one."""
        source = sqlite3.connect(f"{aside.resolve().as_uri()}?mode=ro", uri=True)
        source.text_factory = _text
        try:
            documents = [row for row in _all_that_can_be_read(source, "documents", _DOCUMENT, "id") if _is_whole(row)]
            with self.writing() as db:
                for row in documents:
                    marks = ", ".join("?" * len(row))
                    db.execute(f"INSERT OR IGNORE INTO documents ({_DOCUMENT}) VALUES ({marks})", row)
                there = {row[0] for row in documents}
                for name, added in _all_that_can_be_read(source, "collections", "name, added", "rowid"):
                    with contextlib.suppress(sqlite3.DatabaseError):
                        db.execute("INSERT INTO collections (name, added) VALUES (?, ?)", (str(name), added))
                for name, document in _all_that_can_be_read(source, "members", "collection, document", "rowid"):
                    if document in there:
                        db.execute("INSERT OR IGNORE INTO collections (name, added) VALUES (?, ?)", (str(name), 0.0))
                        db.execute("INSERT OR IGNORE INTO members VALUES (?, ?)", (str(name), document))
                for (name,) in db.execute("SELECT name FROM collections").fetchall():
                    self._seal_collection(db, name)
                for row in _all_that_can_be_read(source, "preambles", "model, name, tokens, seal", "rowid"):
                    if seal(*row[:3]) == row[3]:
                        db.execute("INSERT OR IGNORE INTO preambles VALUES (?, ?, ?, ?)", row)
                for row in _all_that_can_be_read(source, "kept", "key, model, n_tokens, size, used", "rowid"):
                    with contextlib.suppress(sqlite3.DatabaseError):
                        db.execute("INSERT INTO kept VALUES (?, ?, ?, ?, ?)", row)
        finally:
            source.close()
        found = f"{len(documents)} documents" if len(documents) != 1 else "1 document"
        self.mended = f"{self.mended} with the {found} that could be read" if documents else self.mended

    def _set_aside(self, err: Exception) -> Path:
        """A damaged index is kept under another name: the texts in it may be what somebody needs."""
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self.path}{suffix}").replace(f"{aside}{suffix}")
        self.mended = f"{self.path}: the index was damaged ({err}): it is now {aside.name}, and a new one was begun"
        return aside

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A `transaction`, by one thread at a time."""
        with self._lock:
            try:
                with transaction(self._db):
                    yield self._db
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
        except (TypeError, ValueError, RecursionError) as err:
            raise self._unusable("read", err) from None
        return value

    def _document(self, row: Sequence[Any]) -> DocumentRow:
        number, name, source, digest, kind, title, text, places, notes, added, _ = row
        if not _is_whole(row):
            return DocumentRow(
                number, str(name), None, str(digest), str(kind), str(title), "", [], [], 0.0, whole=False
            )
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
            self._seal_document(db, new)
            for collection in sorted(collections):
                db.execute("INSERT INTO members VALUES (?, ?)", (collection, new))
                self._seal_collection(db, collection)
            return new

    def _remove(self, db: sqlite3.Connection, document: int) -> None:
        row = db.execute(f"SELECT {_DOCUMENT} FROM documents WHERE id = ?", (document,)).fetchone()
        if row is not None and not _is_whole(row):  # another text would take the wrong words from the index
            self._forget_cuts(db)
        collections = db.execute("SELECT collection FROM members WHERE document = ?", (document,)).fetchall()
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
        for (collection,) in collections:
            self._seal_collection(db, collection)

    def remove_document(self, document: int) -> None:
        with self.writing() as db:
            self._remove(db, document)

    def documents(self, collection: str | None = None) -> list[DocumentRow]:
        """All documents, or those of a collection, in the order in which they were added."""
        which = "" if collection is None else " WHERE id IN (SELECT document FROM members WHERE collection = ?)"
        if collection is not None:
            self._check_collection(collection)
        rows = self._rows(
            f"SELECT {_DOCUMENT} FROM documents{which} ORDER BY id",
            () if collection is None else (collection,),
        )
        return [self._document(row) for row in rows]

    def document_numbers(self, collection: str | None = None) -> list[int]:
        """The numbers of all documents, or of those of a collection, without their texts."""
        which = "" if collection is None else " WHERE id IN (SELECT document FROM members WHERE collection = ?)"
        values = () if collection is None else (collection,)
        return [int(number) for (number,) in self._rows(f"SELECT id FROM documents{which} ORDER BY id", values)]

    def document(self, document: int) -> DocumentRow | None:
        rows = self._rows(f"SELECT {_DOCUMENT} FROM documents WHERE id = ?", (document,))
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
        if not row.whole:
            raise damaged_document(row)
        with self.writing() as db:
            if db.execute(
                "SELECT 1 FROM cuts WHERE document = ? AND vocabulary = ?", (document, vocabulary)
            ).fetchone():
                return  # another process was faster
            if not db.execute("SELECT 1 FROM documents WHERE id = ?", (document,)).fetchone():  # it was here just now
                raise LibraryError(f"document {document} is not in the library any more")
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
            db.execute(
                "INSERT INTO cuts VALUES (?, ?, ?)",
                (document, vocabulary, seal(document, vocabulary, _spans(db, document, vocabulary))),
            )

    def spans(self, document: int, vocabulary: str) -> list[SpanRow]:
        """The chunks of a document in order; empty if that vocabulary has not cut it yet, or what it noted is damaged."""
        with self._lock:
            sealed = self._rows("SELECT seal FROM cuts WHERE document = ? AND vocabulary = ?", (document, vocabulary))
            try:
                rows = _spans(self._db, document, vocabulary)
            except sqlite3.DatabaseError as err:
                raise self._unusable("read", err) from None
            if [(seal(document, vocabulary, rows),)] != sealed and (rows or sealed):
                self._cut_anew()
                return []
        return [
            SpanRow(span, of, ordinal, start, stop, n_tokens, self._unpacked(heading), first, last)
            for span, of, ordinal, start, stop, n_tokens, heading, first, last in rows
        ]

    def cuts(self) -> dict[int, list[tuple[str, int, int]]]:
        """Of each document the vocabularies that have cut it: (vocabulary, chunks, tokens) each."""
        found: dict[int, list[tuple[str, int, int]]] = {}
        for document, vocabulary, n_chunks, n_tokens in self._rows(
            "SELECT document, vocabulary, count(*), sum(n_tokens) FROM spans GROUP BY document, vocabulary ORDER BY document, vocabulary"
        ):
            found.setdefault(int(document), []).append((str(vocabulary), int(n_chunks), int(n_tokens)))
        return found

    def _cut_anew(self) -> None:
        try:
            with self.writing() as db:
                self._forget_cuts(db)
            self.mended = f"{self.path}: the chunks of documents were damaged in the index: they are cut anew"
        except LibraryError as err:
            if not isinstance(err.__context__, sqlite3.DatabaseError) or _is_the_disk(err.__context__):
                raise
            self._begin_anew(err.__context__)

    def check_words(self) -> bool:
        """Whether the words of chunks are whole; where they are not, documents are cut anew."""
        with self._lock:
            try:
                self._db.execute("INSERT INTO words (words) VALUES ('integrity-check')")
            except sqlite3.DatabaseError:
                self._cut_anew()
                return False
        return True

    def search(self, question: str, vocabulary: str, documents: Sequence[int], limit: int) -> list[tuple[int, float]]:
        """The chunks that match a question best: (chunk, score) each, the larger the better. Source: BM25, by FTS5.

        Where the words are damaged there are none, and `n_forgotten` has grown: cut the documents, and search again.
        """
        terms = terms_of(question)
        if not terms or not documents:
            return []
        query = " OR ".join(f'"{term}"' for term in terms)
        with self._lock:
            self._db.execute("CREATE TEMP TABLE IF NOT EXISTS chosen (document INTEGER PRIMARY KEY)")
            self._db.execute("DELETE FROM chosen")
            self._db.executemany("INSERT OR IGNORE INTO chosen VALUES (?)", [(document,) for document in documents])
            try:
                rows = self._db.execute(
                    "SELECT s.id, -bm25(words) FROM words JOIN spans s ON s.id = words.rowid"
                    " WHERE words MATCH ? AND s.vocabulary = ? AND s.document IN (SELECT document FROM chosen)"
                    " ORDER BY bm25(words), s.id LIMIT ?",
                    (query, vocabulary, limit),
                ).fetchall()
            except sqlite3.DatabaseError as err:
                if _is_the_disk(err) or isinstance(err, sqlite3.ProgrammingError):  # the library was closed
                    raise self._unusable("read", err) from None
                self._cut_anew()
                return []
        return [(int(span), float(score)) for span, score in rows]

    #
    # collections
    #

    def add_to_collection(self, collection: str, documents: Iterable[int]) -> None:
        with self.writing() as db:
            if db.execute("SELECT 1 FROM collections WHERE name = ?", (collection,)).fetchone():
                self._check_collection(collection)
            db.execute("INSERT OR IGNORE INTO collections (name, added) VALUES (?, ?)", (collection, time.time()))
            for document in documents:  # one that another process removed meanwhile is no member
                db.execute(
                    "INSERT OR IGNORE INTO members SELECT ?, id FROM documents WHERE id = ?", (collection, document)
                )
            self._seal_collection(db, collection)

    def _check_collection(self, collection: str) -> None:
        with self._lock:
            sealed = self._rows("SELECT seal FROM collections WHERE name = ?", (collection,))
            if sealed and sealed[0][0] != _members(self._db, collection):
                raise LibraryError(
                    f"{self.path}: the collection {collection} is damaged: remove it, and add its documents to it again"
                )

    def remove_from_collection(self, collection: str, document: int) -> None:
        with self.writing() as db:
            self._check_collection(collection)
            db.execute("DELETE FROM members WHERE collection = ? AND document = ?", (collection, document))
            self._seal_collection(db, collection)

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
        there = self._rows("SELECT model, name, tokens, seal FROM preambles WHERE model = ?", (model,))
        if not there:  # a library that cannot be written to may have it
            with self.writing() as db:
                packed = json.dumps(list(tokens))
                db.execute(
                    "INSERT OR IGNORE INTO preambles VALUES (?, ?, ?, ?)",
                    (model, name, packed, seal(model, name, packed)),
                )
            there = self._rows("SELECT model, name, tokens, seal FROM preambles WHERE model = ?", (model,))
        if seal(*there[0][:3]) != there[0][3]:
            with self.writing() as db:  # the one that is given now, then: chunks behind another one are read anew
                db.execute("DELETE FROM preambles WHERE model = ?", (model,))
            return self.preamble(model, name, tokens)
        return [int(token) for token in self._unpacked(there[0][2])]

    def model_names(self) -> dict[str, str]:
        return dict(self._rows("SELECT model, name FROM preambles"))


_TABLES = frozenset(re.findall(r"CREATE (?:VIRTUAL )?TABLE (\w+)", _SCHEMA))


def _is_the_disk(err: BaseException) -> bool:
    """The disk is full, cannot be written to, or others hold the file: what is in it may be well."""
    text = str(err)
    return isinstance(err, sqlite3.OperationalError) and not any(
        sign in text for sign in ("vtable constructor", "no such", "malformed", "corrupt")
    )


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """A transaction that has the right to write from its beginning; taken back where an error leaves it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def damaged_document(row: DocumentRow) -> LibraryError:
    return LibraryError(f"document {row.id} ({row.name}) is damaged in the library's index: add its file again")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _statements() -> list[str]:
    return [statement for statement in _SCHEMA.split(";\n") if statement.strip()]


def _is_whole(row: Sequence[Any]) -> bool:
    """A document's columns are what was put there."""
    return bool(seal(*row[:-1]) == row[-1])


def _spans(db: sqlite3.Connection, document: int, vocabulary: str) -> list[Any]:
    return db.execute(
        f"SELECT {_SPAN} FROM spans WHERE document = ? AND vocabulary = ? ORDER BY ordinal", (document, vocabulary)
    ).fetchall()


def _members(db: sqlite3.Connection, collection: str) -> str:
    """The seal of a collection: its documents."""
    rows = db.execute("SELECT document FROM members WHERE collection = ? ORDER BY document", (collection,)).fetchall()
    return seal(collection, rows)


def _all_that_can_be_read(db: sqlite3.Connection, table: str, columns: str, key: str) -> list[tuple[Any, ...]]:
    """The rows of a damaged table, from both of its ends."""
    found: dict[Any, tuple[Any, ...]] = {}
    for order in ("ASC", "DESC"):
        with contextlib.suppress(sqlite3.DatabaseError, UnicodeError, OverflowError):
            for number, *row in db.execute(f"SELECT {key}, {columns} FROM {table} ORDER BY {key} {order}"):
                found[number] = tuple(row)
    return [found[number] for number in sorted(found, key=str)]


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
