"""The tables of a library's index, and what its rows are compared with."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

VERSION = 2
BUSY_SECONDS = 60.0  # another process may be writing, or making an index

# note: AUTOINCREMENT, so that a number that was given to a document or chunk never means another one
SCHEMA = """
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

DOCUMENT = "id, name, source, digest, kind, title, text, places, notes, added, seal"
SPAN = "id, document, ordinal, start, stop, n_tokens, heading, page_first, page_last"


def seal(*parts: object) -> str:
    """A checksum of values as SQLite gives them back."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


TABLES = frozenset(re.findall(r"CREATE (?:VIRTUAL )?TABLE (\w+)", SCHEMA))


def is_damage(err: BaseException | None) -> bool:
    """What an index in order never raises: it is damaged, whatever the disk does."""
    if not isinstance(err, sqlite3.DatabaseError) or isinstance(
        err, (sqlite3.ProgrammingError, sqlite3.NotSupportedError)
    ):
        return False  # the first: the library was closed
    return not is_the_disk(err)


@contextlib.contextmanager
def told_by_sqlite() -> Iterator[None]:
    """Damage may have SQLite say what is no text, or ask for more memory than there is."""
    try:
        yield
    except (UnicodeDecodeError, MemoryError) as err:
        raise sqlite3.DatabaseError(f"SQLite failed with a {type(err).__name__}") from err


# SQLite's codes for what the disk, or another process, does: SQLITE_PERM, BUSY, LOCKED, READONLY, IOERR, FULL, CANTOPEN, PROTOCOL, NOLFS
_THE_DISK = frozenset((3, 5, 6, 8, 10, 13, 14, 15, 22))
_DAMAGED = ("vtable constructor", "no such", "malformed", "corrupt", "fts5")  # in messages, where there is no code


def is_the_disk(err: BaseException) -> bool:
    """The disk is full, cannot be written to, or others hold the file: what is in it may be well."""
    if not isinstance(err, sqlite3.OperationalError):
        return False
    code = getattr(err, "sqlite_errorcode", None)  # since Python 3.11
    if code is not None and code & 0xFF != 1:  # the rest of it says more; 1: an error in SQL, which ours has not
        return code & 0xFF in _THE_DISK
    return not any(sign in str(err) for sign in _DAMAGED)


_REFUSED = frozenset((3, 8, 14))  # of these: SQLITE_PERM, READONLY, CANTOPEN
_SAID_REFUSED = ("permission denied", "readonly", "unable to open")


def is_refused(err: BaseException) -> bool:
    """A file may not be written to, or cannot be opened."""
    if not isinstance(err, sqlite3.OperationalError):
        return False
    code = getattr(err, "sqlite_errorcode", None)  # as above
    return code & 0xFF in _REFUSED if code is not None else any(sign in str(err) for sign in _SAID_REFUSED)


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """A transaction that has the right to write from its beginning; taken back where an error leaves it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite took it back itself where the disk is full
            with contextlib.suppress(sqlite3.DatabaseError):
                db.execute("ROLLBACK")
        raise


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def statements() -> list[str]:
    return [statement for statement in SCHEMA.split(";\n") if statement.strip()]


def is_whole(row: Sequence[Any]) -> bool:
    """A document's columns are what was put there."""
    return bool(seal(*row[:-1]) == row[-1])


def spans_of(db: sqlite3.Connection, document: int, vocabulary: str) -> list[Any]:
    return db.execute(
        f"SELECT {SPAN} FROM spans WHERE document = ? AND vocabulary = ? ORDER BY ordinal", (document, vocabulary)
    ).fetchall()


def seal_of_members(db: sqlite3.Connection, collection: str) -> str:
    """The seal of a collection: its documents."""
    rows = db.execute("SELECT document FROM members WHERE collection = ? ORDER BY document", (collection,)).fetchall()
    return seal(collection, rows)


def seal_collection(db: sqlite3.Connection, collection: str) -> None:
    db.execute("UPDATE collections SET seal = ? WHERE name = ?", (seal_of_members(db, collection), collection))


def all_that_can_be_read(db: sqlite3.Connection, table: str, columns: str, key: str) -> list[tuple[Any, ...]]:
    """The rows of a damaged table, from both of its ends.

    Args:
        key: its row id. note: pages that lead back to themselves would give the same rows for ever
    """
    found: dict[int, tuple[Any, ...]] = {}
    for order, sign in (("ASC", 1), ("DESC", -1)):
        before: int | None = None
        with contextlib.suppress(sqlite3.DatabaseError, UnicodeError, OverflowError, MemoryError):
            for number, *row in db.execute(f"SELECT {key}, {columns} FROM {table} ORDER BY {key} {order}"):
                if before is not None and sign * (number - before) <= 0:
                    break
                before = number
                found[number] = tuple(row)
    return [found[number] for number in sorted(found)]
