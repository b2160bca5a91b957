"""The index of a library: documents, their places, their chunks by vocabulary, collections, and what is kept of which model.

SQLite with write-ahead logging, FTS5 over the chunks' text. The text of every document is here, so that a chunk whose rows were
dropped, or are of another model, is simply read again.

SQLite notices pages that make no sense, but not another letter in a text. So what answers depend on has a seal, a checksum that is
compared when it is read. Chunks are cut anew where theirs are damaged; a document whose text is damaged cannot be read until it is
added again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from ..loaders.document import printable
from .copying import copied
from .renewal import identity, is_there, renew
from .schema import (
    BUSY_SECONDS,
    DOCUMENT,
    TABLES,
    VERSION,
    is_damage,
    is_refused,
    is_the_disk,
    is_whole,
    seal,
    seal_collection,
    seal_of_members,
    spans_of,
    statements,
    text_of,
    told_by_sqlite,
    transaction,
)
from .store import ChunkStore, LibraryError, cannot_be_kept

P = ParamSpec("P")
R = TypeVar("R")


class _Damaged(LibraryError):
    """The index is damaged: what is whole in it can be brought into another one."""


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


def _mending(method: Callable[Concatenate[Index, P], R]) -> Callable[Concatenate[Index, P], R]:
    """Where a method of the index finds it damaged, it is called again with what was whole in it."""

    @functools.wraps(method)
    def mended(self: Index, /, *args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
        with self._lock:
            self._n_calls += 1
            try:
                return method(self, *given, **kwargs)
            except _Damaged as err:
                if self._n_calls > 1 or err.__cause__ is None:  # the outer one is called again
                    raise
                self._begin_anew(err.__cause__)
                return method(self, *given, **kwargs)
            finally:
                self._n_calls -= 1

    return mended


class Index:
    """The index in a file. May be used by several threads and processes.

    Args:
        store: where kept chunks are: an index that is made has those that are there.
        read_only: why the file cannot be written to, where that is known.

    Attributes:
        mended: what was damaged, and what was done about it, in one line.
        read_only: why the file cannot be written to; what is written is in a copy then, and goes with it. None where it can.
        n_forgotten: times that the chunks of all documents were forgotten, to be cut anew.

    Raises:
        LibraryError: the file is of a future version, or cannot be made.
    """

    def __init__(self, path: Path, store: ChunkStore | None = None, *, read_only: str | None = None) -> None:
        self.path, self.read_only = path, read_only
        self.mended: str | None = None
        self.n_forgotten = 0
        self._store = store
        self._lock = threading.RLock()
        self._n_calls = 0  # of methods within methods
        self._connection: sqlite3.Connection | None = None  # None: it was lost, and is to be opened again
        self._is_closed = False
        self._file: tuple[int, int] | None = None  # that is open
        try:
            try:
                self._open_between_others()
            except sqlite3.DatabaseError as err:
                if is_damage(err):
                    self._begin_anew(err)
                elif self.read_only is None and is_refused(err) and is_there(path):  # whatever its rights say
                    self.read_only = str(err)
                    self._open_between_others()
                else:
                    raise
        except sqlite3.DatabaseError as err:
            raise self._unusable("opened", err) from err
        except OSError as err:
            raise cannot_be_kept(path, err) from None

    @property
    def _db(self) -> sqlite3.Connection:
        db = self._connection
        if db is not None and self._n_calls and not db.in_transaction and self._is_another():
            self._disconnect()
            self.n_forgotten += 1
        if self._connection is None:
            self._reopen()
        assert self._connection is not None
        return self._connection

    def _is_another(self) -> bool:
        """Another process set the file that is open aside, and put another one in its place."""
        now = identity(self.path)
        return self.read_only is None and now is not None and now != self._file

    def _reopen(self) -> None:
        """Open the index that another process put in the place of this one, or that could not be opened when this was tried last."""
        if self._is_closed:
            raise sqlite3.ProgrammingError("the library was closed")
        try:
            self._open_between_others()
        except OSError as err:
            raise LibraryError(f"{self.path}: the library cannot be opened again: {err.strerror}") from None

    def _open_between_others(self) -> None:
        """Open it, or make it; where others open it at the same moment, after them.

        note: SQLite does not wait for those that change the journal's mode, whatever its timeout is.
        """
        give_up = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                if not is_there(self.path):
                    self._renew(None)
                with told_by_sqlite():
                    self._open()
                return
            except sqlite3.OperationalError as err:
                if "locked" not in str(err) or time.monotonic() > give_up:
                    raise
                time.sleep(0.05)

    def _open(self) -> None:
        self._file = identity(self.path)
        if self.read_only is None:
            db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        else:
            db = copied(self.path)
        db.text_factory = text_of  # damaged text is no error of SQLite's: its seal does not fit
        try:
            db.execute("PRAGMA foreign_keys = ON")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise LibraryError(
                    f"{self.path}: this library is of a newer mesa-gguf (version {version}, this one knows {VERSION}): "
                    "update mesa-gguf, or use another folder"
                )
            names = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if version == 0 and names and not names & TABLES:
                raise LibraryError(
                    f"{self.path}: is the database of another program: use another folder for the library"
                )
            mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode.lower() != "wal":
                db.execute("PRAGMA journal_mode = DELETE")  # as on network drives, where WAL does not work
            db.execute("PRAGMA synchronous = FULL")
            if version == 1:
                self._seal_all(db)
            elif db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("its pages are damaged")
            if not {name for (name,) in db.execute("SELECT name FROM sqlite_master")} >= TABLES:
                raise sqlite3.DatabaseError("it has not all tables")
        except BaseException:
            db.close()
            raise
        self._connection = db

    def _begin_anew(self, err: BaseException) -> None:
        """Set a damaged index aside, and go on with another one that has what is whole in it.

        Raises:
            LibraryError: that cannot be used either.
        """
        if self.read_only is not None:
            raise LibraryError(
                f"{self.path}: the index is damaged ({err}), and cannot be mended, as it can only be read: "
                "open the library where it can be written to, or use another one"
            )
        with self._lock:
            self._disconnect()
            self.n_forgotten += 1
            try:
                self._renew(err)
                self._open_between_others()
            except sqlite3.DatabaseError as again:
                raise self._unusable("opened", again) from again
            except OSError as failed:
                raise LibraryError(
                    f"{self.path}: the index is damaged ({err}), and cannot be set aside: {failed.strerror}"
                ) from None

    def _renew(self, why: BaseException | None) -> None:
        self.mended = renew(self.path, self._store, self._file, why) or self.mended

    def _seal_all(self, db: sqlite3.Connection) -> None:
        """Bring an index of version 1, which had no seals, to this one."""
        with transaction(db):
            if db.execute("PRAGMA user_version").fetchone()[0] != 1:
                return  # another process was faster
            for table in ("documents", "collections", "preambles"):
                db.execute(f"ALTER TABLE {table} ADD COLUMN seal TEXT NOT NULL DEFAULT ''")
            for (document,) in db.execute("SELECT id FROM documents").fetchall():
                self._seal_document(db, document)
            for (collection,) in db.execute("SELECT name FROM collections").fetchall():
                seal_collection(db, collection)
            for row in db.execute("SELECT model, name, tokens FROM preambles").fetchall():
                db.execute("UPDATE preambles SET seal = ? WHERE model = ?", (seal(*row), row[0]))
            self._forget_cuts(db)
            db.execute(f"PRAGMA user_version = {VERSION}")

    def _forget_cuts(self, db: sqlite3.Connection) -> None:
        """Documents are cut into chunks anew when they are asked about. What is kept of chunks stays."""
        self.n_forgotten += 1
        (last,) = db.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'spans'").fetchone()
        for table in ("spans", "cuts", "words"):
            db.execute(f"DROP TABLE IF EXISTS {table}")
        for statement in statements():
            if any(f"TABLE {table} " in statement for table in ("spans", "cuts", "words")):
                db.execute(statement)
        db.execute("INSERT INTO sqlite_sequence SELECT 'spans', ? WHERE ? > 0", (last, last))

    @staticmethod
    def _seal_document(db: sqlite3.Connection, document: int) -> None:
        (*values, _) = db.execute(f"SELECT {DOCUMENT} FROM documents WHERE id = ?", (document,)).fetchone()
        db.execute("UPDATE documents SET seal = ? WHERE id = ?", (seal(*values), document))

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._disconnect()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A `transaction`, by one thread at a time."""
        with self._lock:
            self._n_calls += 1
            try:
                while True:
                    with told_by_sqlite(), transaction(db := self._db):
                        if not self._is_another():  # while this one waited for its turn
                            yield db
                            return
            except sqlite3.DatabaseError as err:
                raise self._unusable("written to", err) from err
            finally:
                self._n_calls -= 1

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """What is read within is of one moment, whatever other processes write meanwhile."""
        try:
            with told_by_sqlite():
                db = self._db
                if db.in_transaction:
                    yield db
                    return
                db.execute("BEGIN")
                try:
                    yield db
                finally:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
        except sqlite3.DatabaseError as err:
            raise self._unusable("read", err) from err

    @_mending
    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            with told_by_sqlite():
                return self._db.execute(query, values).fetchall()
        except sqlite3.DatabaseError as err:
            raise self._unusable("read", err) from err

    def _unusable(self, what: str, err: sqlite3.DatabaseError) -> LibraryError:
        """The error to raise: the index is damaged, the disk is full or cannot be written to, or the library was closed."""
        if is_damage(err):
            return _Damaged(
                f"{self.path}: the index is damaged each time that it is {what} ({err}): see whether the disk is"
            )
        if isinstance(err, sqlite3.ProgrammingError):
            return LibraryError(f"{self.path}: the library cannot be {what}: {err}")
        see = "the disk is full, and the file and its folder can be written to"
        if self.read_only is not None:
            see = "you may read it"
        return LibraryError(f"{self.path}: the library cannot be {what}: {err}: see whether {see}")

    def _unpacked(self, packed: str) -> list[Any]:
        try:
            value = json.loads(packed)
            if not isinstance(value, list):
                raise ValueError("a list is no list")
        except (TypeError, ValueError, RecursionError) as err:
            raise _Damaged(f"{self.path}: the index is damaged: {err}") from err
        return value

    def _document(self, row: Sequence[Any]) -> DocumentRow:
        number, name, source, digest, kind, title, text, places, notes, added, _ = row
        if not is_whole(row):
            return DocumentRow(
                number, printable(str(name)), None, str(digest), str(kind), str(title), "", [], [], 0.0, whole=False
            )
        unpacked = [(start, page, heading) for start, page, heading in self._unpacked(places)]
        return DocumentRow(number, name, source, digest, kind, title, text, unpacked, self._unpacked(notes), added)

    #
    # documents
    #

    @_mending
    def add_document(
        self,
        *,
        name: str,
        source: str | None,
        digest: str,
        kind: str,
        title: str,
        text: str,
        places: Sequence[tuple[int, int | None, Sequence[str]]],
        notes: Sequence[str] = (),
        again: bool = False,
    ) -> int:
        """The number of a document; what its source held before goes. A document that is there already is the same one,
        unless it was loaded again in another way."""
        packed = json.dumps([(start, page, list(heading)) for start, page, heading in places])
        with self.writing() as db:
            found = db.execute("SELECT id FROM documents WHERE digest = ? AND source IS ?", (digest, source)).fetchone()
            if found is not None and not again:
                row = db.execute(f"SELECT {DOCUMENT} FROM documents WHERE id = ?", found).fetchone()
                if row is not None and is_whole(row):
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
                seal_collection(db, collection)
            return new

    def _remove(self, db: sqlite3.Connection, document: int) -> None:
        row = db.execute(f"SELECT {DOCUMENT} FROM documents WHERE id = ?", (document,)).fetchone()
        # another text, or other borders, would take the wrong words from the index
        if row is not None and not (is_whole(row) and _cuts_are_whole(db, document)):
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
            seal_collection(db, collection)

    @_mending
    def remove_document(self, document: int) -> None:
        with self.writing() as db:
            self._remove(db, document)

    @_mending
    def documents(self, collection: str | None = None) -> list[DocumentRow]:
        """All documents, or those of a collection, in the order in which they were added."""
        which = "" if collection is None else " WHERE id IN (SELECT document FROM members WHERE collection = ?)"
        if collection is not None:
            self._check_collection(collection)
        rows = self._rows(
            f"SELECT {DOCUMENT} FROM documents{which} ORDER BY id",
            () if collection is None else (collection,),
        )
        return [self._document(row) for row in rows]

    @_mending
    def document_numbers(self, collection: str | None = None) -> list[int]:
        """The numbers of all documents, or of those of a collection, without their texts."""
        which = "" if collection is None else " WHERE id IN (SELECT document FROM members WHERE collection = ?)"
        values = () if collection is None else (collection,)
        return [int(number) for (number,) in self._rows(f"SELECT id FROM documents{which} ORDER BY id", values)]

    @_mending
    def document(self, document: int) -> DocumentRow | None:
        rows = self._rows(f"SELECT {DOCUMENT} FROM documents WHERE id = ?", (document,))
        return self._document(rows[0]) if rows else None

    @_mending
    def find_document(self, digest: str, source: str | None) -> int | None:
        """The document of these bytes, of this source if there are several."""
        rows = self._rows("SELECT id FROM documents WHERE digest = ? ORDER BY source IS NOT ?, id", (digest, source))
        return int(rows[0][0]) if rows else None

    #
    # chunks
    #

    @_mending
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
                (document, vocabulary, seal(document, vocabulary, spans_of(db, document, vocabulary))),
            )

    @_mending
    def spans(self, document: int, vocabulary: str) -> list[SpanRow]:
        """The chunks of a document in order; empty if that vocabulary has not cut it yet, or what it noted is damaged."""
        with self._lock:
            with self._reading() as db:
                sealed = db.execute(
                    "SELECT seal FROM cuts WHERE document = ? AND vocabulary = ?", (document, vocabulary)
                ).fetchall()
                rows = spans_of(db, document, vocabulary)
            if [(seal(document, vocabulary, rows),)] != sealed and (rows or sealed):
                self._cut_anew()
                return []
        return [
            SpanRow(span, of, ordinal, start, stop, n_tokens, self._unpacked(heading), first, last)
            for span, of, ordinal, start, stop, n_tokens, heading, first, last in rows
        ]

    @_mending
    def are_others(self, first: Mapping[int, int]) -> bool:
        """Whether documents have other chunks by now: they were cut anew, by whomever.

        Args:
            first: of each document its first chunk, as `spans` gave it.
        """
        query = "SELECT 1 FROM documents WHERE id = ? AND NOT EXISTS (SELECT 1 FROM spans WHERE id = ?)"
        with self._reading() as db:
            return any(db.execute(query, pair).fetchone() is not None for pair in first.items())

    @_mending
    def cuts(self) -> dict[int, list[tuple[str, int, int]]]:
        """Of each document the vocabularies that have cut it: (vocabulary, chunks, tokens) each."""
        found: dict[int, list[tuple[str, int, int]]] = {}
        for document, vocabulary, n_chunks, n_tokens in self._rows(
            "SELECT document, vocabulary, count(*), total(n_tokens) FROM spans WHERE typeof(document) = 'integer'"
            " GROUP BY document, vocabulary ORDER BY document, vocabulary"
        ):
            found.setdefault(int(document), []).append((str(vocabulary), int(n_chunks), int(n_tokens)))
        return found

    def _cut_anew(self) -> None:
        with self.writing() as db:
            self._forget_cuts(db)
        self.mended = f"{self.path}: the chunks of documents were damaged in the index: they are cut anew"

    @_mending
    def check(self) -> None:
        """Look at every page; where one is damaged, what is whole in the index comes into another one."""
        (found,) = self._rows("PRAGMA integrity_check(1)")[0]
        if found != "ok":
            raise _Damaged(f"{self.path}: the index is damaged") from sqlite3.DatabaseError(
                " ".join(str(found).split())
            )

    @_mending
    def check_words(self) -> bool:
        """Whether the words of chunks are whole; where they are not, documents are cut anew."""
        with self._lock:
            try:
                with told_by_sqlite():
                    self._db.execute("INSERT INTO words (words) VALUES ('integrity-check')")
            except sqlite3.DatabaseError:
                self._cut_anew()
                return False
        return True

    @_mending
    def search(self, question: str, vocabulary: str, documents: Sequence[int], limit: int) -> list[tuple[int, float]]:
        """The chunks that match a question best: (chunk, score) each, the larger the better. Source: BM25, by FTS5.

        Where the words are damaged there are none, and `n_forgotten` has grown: cut the documents, and search again.
        """
        terms = terms_of(question)
        if not terms or not documents:
            return []
        query = " OR ".join(f'"{term}"' for term in terms)
        with self._lock:
            try:
                with told_by_sqlite():
                    db = self._db
                    db.execute("CREATE TEMP TABLE IF NOT EXISTS chosen (document INTEGER PRIMARY KEY)")
                    db.execute("DELETE FROM chosen")
                    db.executemany("INSERT OR IGNORE INTO chosen VALUES (?)", [(document,) for document in documents])
                    rows = db.execute(
                        "SELECT s.id, -bm25(words) FROM words JOIN spans s ON s.id = words.rowid"
                        " WHERE words MATCH ? AND s.vocabulary = ? AND s.document IN (SELECT document FROM chosen)"
                        " ORDER BY bm25(words), s.id LIMIT ?",
                        (query, vocabulary, limit),
                    ).fetchall()
            except sqlite3.DatabaseError as err:
                if is_the_disk(err) or isinstance(err, sqlite3.ProgrammingError):  # the library was closed
                    raise self._unusable("read", err) from err
                self._cut_anew()
                return []
        return [(int(span), float(score)) for span, score in rows]

    #
    # collections
    #

    @_mending
    def add_to_collection(self, collection: str, documents: Iterable[int]) -> None:
        with self.writing() as db:
            if db.execute("SELECT 1 FROM collections WHERE name = ?", (collection,)).fetchone():
                self._check_collection(collection)
            db.execute("INSERT OR IGNORE INTO collections (name, added) VALUES (?, ?)", (collection, time.time()))
            for document in documents:  # one that another process removed meanwhile is no member
                db.execute(
                    "INSERT OR IGNORE INTO members SELECT ?, id FROM documents WHERE id = ?", (collection, document)
                )
            seal_collection(db, collection)

    def _check_collection(self, collection: str) -> None:
        with self._lock:
            with self._reading() as db:
                sealed = db.execute("SELECT seal FROM collections WHERE name = ?", (collection,)).fetchone()
                expected = seal_of_members(db, collection)
            if sealed is not None and sealed[0] != expected:
                raise LibraryError(
                    f"{self.path}: the collection {collection} is damaged: remove it, and add its documents to it again"
                )

    @_mending
    def remove_from_collection(self, collection: str, document: int) -> None:
        with self.writing() as db:
            self._check_collection(collection)
            db.execute("DELETE FROM members WHERE collection = ? AND document = ?", (collection, document))
            seal_collection(db, collection)

    @_mending
    def collections_of(self, document: int) -> list[str]:
        """The collections that a document is in."""
        rows = self._rows("SELECT collection FROM members WHERE document = ? ORDER BY collection", (document,))
        return [str(name) for (name,) in rows]

    @_mending
    def collections(self) -> list[tuple[str, int]]:
        """Name and number of documents of each."""
        return [
            (str(name), int(n))
            for name, n in self._rows(
                "SELECT c.name, count(m.document) FROM collections c LEFT JOIN members m ON m.collection = c.name"
                " GROUP BY c.name ORDER BY c.name"
            )
        ]

    @_mending
    def remove_collection(self, collection: str) -> None:
        with self.writing() as db:
            db.execute("DELETE FROM collections WHERE name = ?", (collection,))

    #
    # what is kept
    #

    @_mending
    def note_kept(self, key: str, model: str, n_tokens: int, size: int) -> None:
        with self.writing() as db:
            db.execute(
                "INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?, (SELECT coalesce(max(used), 0) + 1 FROM kept))",
                (key, model, n_tokens, size),
            )

    @_mending
    def note_used(self, keys: Sequence[str], model: str) -> None:
        """They were used just now, by a model. Those of which the index has lost sight are there again.

        note: counted, not timed: clocks jump.
        """
        with self.writing() as db:
            self._note_found(db, _lacking(db, keys))
            (now,) = db.execute("SELECT coalesce(max(used), 0) + 1 FROM kept").fetchone()
            db.executemany("UPDATE kept SET used = ?, model = ? WHERE key = ?", [(now, model, key) for key in keys])

    @_mending
    def note_found(self, keys: Sequence[str]) -> None:
        """These are kept, as their files say; another process may have taken them away meanwhile."""
        with self.writing() as db:
            self._note_found(db, keys)

    @_mending
    def note_lacking(self, keys: Sequence[str]) -> None:
        """Of these, which are kept, note those that the index had lost sight of."""
        try:
            with told_by_sqlite():
                lacking = _lacking(self._db, keys)
        except sqlite3.DatabaseError as err:
            raise self._unusable("read", err) from err
        if lacking:
            self.note_found(lacking)

    def _note_found(self, db: sqlite3.Connection, keys: Sequence[str]) -> None:
        # note: looked at within the transaction: whoever takes a file away notes it after that
        heads = [] if self._store is None else [self._store.head(key) for key in keys]
        db.executemany(
            "INSERT INTO kept VALUES (?, '', ?, ?, 0)"
            " ON CONFLICT (key) DO UPDATE SET n_tokens = excluded.n_tokens, size = excluded.size",
            [(head.key, head.n_tokens, head.size) for head in heads if head is not None],
        )

    @_mending
    def note_dropped(self, keys: Iterable[str]) -> None:
        """They are gone, unless another process has kept them again meanwhile."""
        with self.writing() as db:
            gone = [(key,) for key in keys if self._store is None or key not in self._store]
            db.executemany("DELETE FROM kept WHERE key = ?", gone)

    @_mending
    def kept(self) -> list[KeptRow]:
        """What is kept, least recently used first. Rows that make no sense are taken from the chunks' files again."""
        for _ in range(2):
            rows = self._rows("SELECT rowid, key, model, n_tokens, size, used FROM kept ORDER BY used, key")
            wrong = [row for row in rows if not _makes_sense(*row[1:])]
            if not wrong:
                return [KeptRow(*row[1:]) for row in rows]
            with self.writing() as db:
                db.executemany("DELETE FROM kept WHERE rowid = ?", [row[:1] for row in wrong])
                self._note_found(db, [str(row[1]) for row in wrong])
        raise _Damaged(f"{self.path}: the index is damaged") from sqlite3.DatabaseError(
            "what it has of kept chunks makes no sense"
        )

    def n_kept(self, model: str) -> int:
        """How much is kept of a model: chunks and what lies beside them, what is of no model that is known among it."""
        return int(self._rows("SELECT count(*) FROM kept WHERE model IN (?, '')", (model,))[0][0])

    def kept_bytes(self) -> int:
        return int(self._rows("SELECT total(size) FROM kept")[0][0])

    #
    # preambles
    #

    @_mending
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

    @_mending
    def model_names(self) -> dict[str, str]:
        return {str(model): str(name) for model, name in self._rows("SELECT model, name FROM preambles")}


def damaged_document(row: DocumentRow) -> LibraryError:
    return LibraryError(f"document {row.id} ({row.name}) is damaged in the library's index: add its file again")


def _makes_sense(key: object, model: object, n_tokens: object, size: object, used: object) -> bool:
    """Whether a row of what is kept can be one. note: it has no seal: it can be had from the files."""
    numbers = ((n_tokens, 2**31), (size, 2**50), (used, 2**53))
    return (
        isinstance(key, str)
        and isinstance(model, str)
        and all(isinstance(number, int) and 0 <= number < most for number, most in numbers)
    )


def _cuts_are_whole(db: sqlite3.Connection, document: int) -> bool:
    sealed = db.execute("SELECT vocabulary, seal FROM cuts WHERE document = ?", (document,)).fetchall()
    cut = db.execute("SELECT DISTINCT vocabulary FROM spans WHERE document = ?", (document,)).fetchall()
    is_sealed = {vocabulary for (vocabulary,) in cut} <= {vocabulary for vocabulary, _ in sealed}
    return is_sealed and all(seal(document, cut, spans_of(db, document, cut)) == said for cut, said in sealed)


def _lacking(db: sqlite3.Connection, keys: Sequence[str]) -> list[str]:
    """The keys that an index has not."""
    return [key for key in keys if db.execute("SELECT 1 FROM kept WHERE key = ?", (key,)).fetchone() is None]


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
