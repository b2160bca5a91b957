"""An index that is made: where there is none, and in place of a damaged one, with what is whole in that.

It is made under another name, and gets its own when it is whole, so that a process that is killed loses nothing. One process at
a time does so. What is damaged is kept beside it: the texts in it may be what somebody needs.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..loaders.document import printable
from ..text import counted
from .schema import (
    BUSY_SECONDS,
    DOCUMENT,
    TABLES,
    VERSION,
    all_that_can_be_read,
    is_whole,
    seal,
    seal_collection,
    statements,
    text_of,
    transaction,
)
from .store import ChunkStore, sync_folder

LEAST_BYTES = 100  # of a database: its header
HOLD_SECONDS = 5.0  # waited for those that write to a damaged index
_SIDES = ("-wal", "-shm", "-journal")  # what SQLite writes beside a database


@dataclass
class _Made:
    """What has come into a new index: numbers of documents and kept chunks, and names of documents that could not be read."""

    n_documents: int = 0
    n_chunks: int = 0
    lost: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = []
        if self.n_documents:
            parts.append(f"the {counted(self.n_documents, 'document')} that could be read")
        if self.n_chunks:
            parts.append(counted(self.n_chunks, "kept chunk"))
        said = f" with {' and '.join(parts)}" if parts else ""
        if self.lost:
            names = ", ".join(self.lost[:3]) + (f" and {len(self.lost) - 3} more" if len(self.lost) > 3 else "")
            return f"{said}; add again what could not: {names}"
        return said if self.n_documents else f"{said}; add the documents again"


def identity(path: Path) -> tuple[int, int] | None:
    """Which file has a name just now; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def is_there(path: Path) -> bool:
    """Whether there is an index, or what once was one. What is shorter is none: one that is being made has another name."""
    try:
        return path.stat().st_size >= LEAST_BYTES
    except FileNotFoundError:
        return False


def renew(
    path: Path, store: ChunkStore | None, opened: tuple[int, int] | None, why: BaseException | None
) -> str | None:
    """Make an index, unless another process was faster: one line on what was found and done, if there is anything to say.

    Args:
        store: where kept chunks are, which a new index has too.
        opened: the file that was found to be damaged; None: there is none.
        why: what is wrong with it.

    Raises:
        sqlite3.Error, OSError: the disk is full, or cannot be written to. Then everything is as it was.
    """
    with _alone(path):
        if is_there(path) and (why is None or identity(path) != opened):
            return None  # another process was faster
        size = path.stat().st_size if path.exists() else None
        new = path.with_name(f"{path.name}.new")
        with _held(path) if size else contextlib.nullcontext():
            # finished by a process that was killed when it had set the damaged one aside
            made = None if size is None and _is_finished(new) else _make(new, store, path if size else None)
            aside = _set_aside(path) if size else None
            _remove(path)
            os.replace(new, path)
            sync_folder(path.parent)
    if made is None:
        return f"{path}: the index was damaged, and another process that mended it was ended: what it could read is in a new one"
    if size is None:
        return f"{path}: there was no index beside kept chunks: a new one was begun{made}" if made.n_chunks else None
    reason = why or f"it has {size} bytes"
    where = f"it is now {aside.name}, and " if aside is not None else ""
    return f"{path}: the index was damaged ({reason}): {where}a new one was begun{made}"


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process, and one thread, at a time. note: SQLite's lock of a file beside the index, which goes with its process."""
    lock = sqlite3.connect(f"{path}.lock", timeout=BUSY_SECONDS, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
        yield
    finally:
        lock.close()


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Nobody writes to a damaged index that is still open somewhere, if it can be held: what is written comes too late for the new one.

    note: not on Windows, where a file that is open cannot get another name
    """
    with contextlib.ExitStack() as held:
        if os.name != "nt":
            with contextlib.suppress(sqlite3.DatabaseError):
                db = sqlite3.connect(path, timeout=HOLD_SECONDS, isolation_level=None)
                held.callback(db.close)
                db.execute("BEGIN IMMEDIATE")
        yield


def _is_finished(new: Path) -> bool:
    """Whether an index was made to its end: its version comes last, in one step with all that is in it."""
    if not is_there(new):
        return False
    db = sqlite3.connect(f"{new.resolve().as_uri()}?mode=ro", uri=True)
    try:
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        return bool(db.execute("PRAGMA user_version").fetchone()[0] == VERSION and names >= TABLES)
    except sqlite3.DatabaseError:
        return False
    finally:
        db.close()


def _make(new: Path, store: ChunkStore | None, damaged: Path | None) -> _Made:
    _remove(new)
    made = _Made()
    db = sqlite3.connect(new, isolation_level=None)
    try:
        new.chmod(0o600 if store is None else store.rights & 0o666)
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA synchronous = FULL")
        with transaction(db):
            for statement in statements():
                db.execute(statement)
            for head in () if store is None else store.heads():
                # used: nobody knows. Whose they are is noted when they are used
                db.execute("INSERT INTO kept VALUES (?, '', ?, ?, 0)", (head.key, head.n_tokens, head.size))
                made.n_chunks += head.n_tokens > 0
            numbers = _salvage(db, damaged, made) if damaged is not None else None
            if numbers is None and (made.n_chunks or damaged is not None):
                numbers = int(time.time()), int(time.time())  # past any that was given: they mean something to others
            if numbers is not None:
                for table, number in zip(("documents", "spans"), numbers):
                    db.execute("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
                    db.execute("INSERT INTO sqlite_sequence VALUES (?, ?)", (table, number))
            db.execute(f"PRAGMA user_version = {VERSION}")
    except BaseException:
        db.close()
        new.unlink(missing_ok=True)
        raise
    db.close()
    return made


def _salvage(db: sqlite3.Connection, damaged: Path, made: _Made) -> tuple[int, int] | None:
    """Bring what is whole in a damaged index into a new one: the last numbers that were given to documents and chunks, where known."""
    source = sqlite3.connect(f"{damaged.resolve().as_uri()}?mode=ro", uri=True)
    source.text_factory = text_of
    try:
        there = set()
        for row in all_that_can_be_read(source, "documents", DOCUMENT, "id"):
            if not is_whole(row):
                made.lost.append(printable(str(row[1]))[:80])
                continue
            with contextlib.suppress(sqlite3.IntegrityError):
                db.execute(f"INSERT INTO documents ({DOCUMENT}) VALUES ({', '.join('?' * len(row))})", row)
                there.add(row[0])
        made.n_documents = len(there)
        for name, added in all_that_can_be_read(source, "collections", "name, added", "rowid"):
            with contextlib.suppress(sqlite3.IntegrityError):
                db.execute("INSERT INTO collections (name, added) VALUES (?, ?)", (str(name), added))
        for name, document in all_that_can_be_read(source, "members", "collection, document", "rowid"):
            if document in there:
                db.execute("INSERT OR IGNORE INTO collections (name, added) VALUES (?, ?)", (str(name), 0.0))
                db.execute("INSERT OR IGNORE INTO members VALUES (?, ?)", (str(name), document))
        for (name,) in db.execute("SELECT name FROM collections").fetchall():
            seal_collection(db, name)
        for row in all_that_can_be_read(source, "preambles", "model, name, tokens, seal", "rowid"):
            if seal(*row[:3]) == row[3]:
                db.execute("INSERT OR IGNORE INTO preambles VALUES (?, ?, ?, ?)", row)
        for key, model, used in all_that_can_be_read(source, "kept", "key, model, used", "rowid"):
            if isinstance(model, str) and isinstance(used, int) and 0 <= used < 2**48:
                db.execute("UPDATE kept SET model = ?, used = ? WHERE key = ?", (model, used, str(key)))
        given = dict(all_that_can_be_read(source, "sqlite_sequence", "name, seq", "rowid"))
    finally:
        source.close()
    last, last_span = given.get("documents"), given.get("spans", 0)
    if not isinstance(last, int) or not isinstance(last_span, int) or max(last, last_span) > 2**48:
        return None
    return max(last, *there, 0), last_span


def _set_aside(path: Path) -> Path:
    """Give a damaged index another name, that no other one has."""
    stamp = f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    aside = next(
        path.with_name(name)
        for n in range(10_000)
        if not path.with_name(name := f"{stamp}{f'-{n}' * (n > 0)}").exists()
    )
    for file, other in zip(files_of(path), files_of(aside)):
        with contextlib.suppress(FileNotFoundError):
            file.replace(other)
    return aside


def files_of(path: Path) -> list[Path]:
    """A database's own file, and those that may be beside it."""
    return [path.with_name(f"{path.name}{side}") for side in ("", *_SIDES)]


def _remove(path: Path) -> None:
    for file in files_of(path):
        file.unlink(missing_ok=True)
