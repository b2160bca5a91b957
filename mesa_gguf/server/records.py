"""What the server keeps besides the library: files that were uploaded, vector stores, and the page's conversations.

A folder in the library's: ``server.sqlite3``, and ``files/``, the bytes of a file under its id. A name that a client gives is never
part of a path.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PromptError
from ..library.schema import transaction
from ..library.store import LibraryError

VERSION = 1
MAX_CONVERSATION = 4 * 1024 * 1024  # bytes
MAX_CONVERSATIONS = 2000
_CONVERSATION_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

_SCHEMA = """
CREATE TABLE files (
    id TEXT PRIMARY KEY,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created REAL NOT NULL,
    has_content INTEGER NOT NULL,
    document INTEGER,
    error TEXT,
    read_with TEXT
);
CREATE INDEX files_by_document ON files (document);
CREATE TABLE stores (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, created REAL NOT NULL);
CREATE TABLE members (
    store TEXT NOT NULL REFERENCES stores (id) ON DELETE CASCADE,
    file TEXT NOT NULL REFERENCES files (id) ON DELETE CASCADE,
    created REAL NOT NULL,
    PRIMARY KEY (store, file)
);
CREATE TABLE conversations (id TEXT PRIMARY KEY, title TEXT NOT NULL, updated REAL NOT NULL, bytes INTEGER NOT NULL, body BLOB NOT NULL);
"""


@dataclass(frozen=True)
class FileRow:
    """A file.

    Attributes:
        has_content: its bytes are kept here; not those of a document that was in the library already.
        document: of the library, once its text was taken out.
        error: why it could not be.
        read_with: the model and preamble that read all of it.
    """

    id: str
    filename: str
    purpose: str
    bytes: int
    created: float
    has_content: bool
    document: int | None
    error: str | None
    read_with: str | None


@dataclass(frozen=True)
class StoreRow:
    """A vector store: a collection of the library of the same name."""

    id: str
    name: str
    created: float


class Records:
    """The records in a folder. May be used by several threads.

    Raises:
        LibraryError: the folder cannot be used, is of a newer version, or another server uses it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        try:
            (folder / "files").mkdir(mode=0o700, parents=True, exist_ok=True)
            self._claim = self._claimed()
            for left in (folder / "files").glob("*.part"):  # of a process that was killed
                left.unlink()
            self._db = sqlite3.connect(
                folder / "server.sqlite3", timeout=60, isolation_level=None, check_same_thread=False
            )
            (folder / "server.sqlite3").chmod(0o600)
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                with self._writing() as db:
                    for statement in filter(str.strip, _SCHEMA.split(";\n")):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {VERSION}")
        except OSError as err:
            raise LibraryError(f"{folder}: the server's records cannot be kept there: {err.strerror}") from None
        except sqlite3.DatabaseError as err:
            raise self._unusable(err) from None
        if version > VERSION:
            raise LibraryError(f"{folder}: these records are of a newer mesa-gguf: update it, or use another folder")

    def _claimed(self) -> sqlite3.Connection:
        """A lock that ends with this process, however it ends: two servers would sweep each other's uploads away."""
        claim = sqlite3.connect(self.folder / "lock.sqlite3", timeout=0, isolation_level=None, check_same_thread=False)
        try:
            claim.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as err:
            claim.close()
            if "locked" not in str(err):
                raise
            raise LibraryError(
                f"{self.folder}: another server uses this library: end it, or use another library"
            ) from None
        return claim

    def close(self) -> None:
        with self._lock:
            self._db.close()
            self._claim.close()

    def _unusable(self, err: Exception) -> LibraryError:
        what = "the disk is full" if "full" in str(err) else f"{err}"
        return LibraryError(f"{self.folder}: the server's records cannot be used: {what}")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                with transaction(self._db):
                    yield self._db
            except sqlite3.DatabaseError as err:
                raise self._unusable(err) from None

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.DatabaseError as err:
                raise self._unusable(err) from None

    #
    # files
    #

    def new_path(self, file_id: str) -> Path:
        """Where the bytes of a file go while they come."""
        return self._path(file_id).with_suffix(".part")

    def _path(self, file_id: str) -> Path:
        if not re.fullmatch(r"file-[0-9a-f]{24}", file_id):
            raise ValueError(f"{file_id!r} is no id of a file")
        return self.folder / "files" / file_id

    def add_file(
        self,
        file_id: str,
        filename: str,
        *,
        purpose: str = "user_data",
        n_bytes: int = 0,
        has_content: bool = True,
        document: int | None = None,
    ) -> FileRow:
        """Note a file whose bytes are at `new_path`, if it has any. When this returns, a crash loses nothing of it."""
        if has_content:
            new, path = self.new_path(file_id), self._path(file_id)
            with new.open("rb") as file:
                os.fsync(file.fileno())
            new.rename(path)
        with self._writing() as db:
            db.execute(
                "INSERT INTO files (id, filename, purpose, bytes, created, has_content, document) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (file_id, filename, purpose, n_bytes, time.time(), has_content, document),
            )
        row = self.file(file_id)
        assert row is not None
        return row

    @staticmethod
    def _file(row: Sequence[Any]) -> FileRow:
        file_id, filename, purpose, n_bytes, created, has_content, document, error, read_with = row
        return FileRow(file_id, filename, purpose, n_bytes, created, bool(has_content), document, error, read_with)

    def file(self, file_id: str) -> FileRow | None:
        rows = self._rows("SELECT * FROM files WHERE id = ?", (file_id,))
        return self._file(rows[0]) if rows else None

    def files(self) -> list[FileRow]:
        """All files, oldest first."""
        return [self._file(row) for row in self._rows("SELECT * FROM files ORDER BY created, id")]

    def files_of(self, document: int) -> list[FileRow]:
        rows = self._rows("SELECT * FROM files WHERE document = ? ORDER BY created, id", (document,))
        return [self._file(row) for row in rows]

    def content(self, row: FileRow) -> Path | None:
        """The file of its bytes."""
        path = self._path(row.id) if row.has_content else None
        return path if path is not None and path.is_file() else None

    def note_file(
        self, file_id: str, *, document: int | None = None, error: str | None = None, read_with: str | None = None
    ) -> None:
        """What became of a file; what is not given stays."""
        with self._writing() as db:
            db.execute(
                "UPDATE files SET document = coalesce(?, document), error = ?, read_with = coalesce(?, read_with) WHERE id = ?",
                (document, error, read_with, file_id),
            )

    def remove_file(self, file_id: str) -> None:
        with self._writing() as db:
            db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        with contextlib.suppress(OSError):
            self._path(file_id).unlink()

    def sweep(self) -> None:
        """Take away bytes that no file has: of a process that was killed between the two."""
        known = {row.id for row in self.files()}
        for path in (self.folder / "files").iterdir():
            if path.suffix != ".part" and path.name not in known:
                with contextlib.suppress(OSError):
                    path.unlink()

    #
    # vector stores
    #

    def add_store(self, name: str) -> StoreRow:
        with self._writing() as db:
            if db.execute("SELECT 1 FROM stores WHERE name = ?", (name,)).fetchone():
                raise PromptError(f"there is a vector store {name} already")
            store = StoreRow(f"vs_{secrets.token_hex(12)}", name, time.time())
            db.execute("INSERT INTO stores VALUES (?, ?, ?)", (store.id, store.name, store.created))
        return store

    def stores(self) -> list[StoreRow]:
        return [StoreRow(*row) for row in self._rows("SELECT id, name, created FROM stores ORDER BY created, id")]

    def store(self, name: str) -> StoreRow | None:
        """A vector store by its id or name."""
        rows = self._rows(
            "SELECT id, name, created FROM stores WHERE id = ? OR name = ? ORDER BY id <> ?", (name, name, name)
        )
        return StoreRow(*rows[0]) if rows else None

    def remove_store(self, store: StoreRow) -> None:
        with self._writing() as db:
            db.execute("DELETE FROM stores WHERE id = ?", (store.id,))

    def add_member(self, store: StoreRow, file_id: str) -> float:
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO members VALUES (?, ?, ?)", (store.id, file_id, time.time()))
            (created,) = db.execute(
                "SELECT created FROM members WHERE store = ? AND file = ?", (store.id, file_id)
            ).fetchone()
        return float(created)

    def members(self, store: StoreRow) -> list[tuple[FileRow, float]]:
        """The files of a vector store, and when they were added."""
        rows = self._rows(
            "SELECT f.*, m.created FROM members m JOIN files f ON f.id = m.file WHERE m.store = ? ORDER BY m.created, f.id",
            (store.id,),
        )
        return [(self._file(row[:-1]), row[-1]) for row in rows]

    def stores_of(self, file_id: str) -> list[StoreRow]:
        rows = self._rows(
            "SELECT s.id, s.name, s.created FROM members m JOIN stores s ON s.id = m.store WHERE m.file = ? ORDER BY s.name",
            (file_id,),
        )
        return [StoreRow(*row) for row in rows]

    def remove_member(self, store: StoreRow, file_id: str) -> bool:
        with self._writing() as db:
            return db.execute("DELETE FROM members WHERE store = ? AND file = ?", (store.id, file_id)).rowcount > 0

    #
    # conversations
    #

    def conversations(self) -> list[dict[str, Any]]:
        rows = self._rows("SELECT id, title, updated, bytes FROM conversations ORDER BY updated DESC, id")
        return [dict(zip(("id", "title", "updated_at", "bytes"), row)) for row in rows]

    def conversation(self, number: str) -> bytes | None:
        rows = self._rows("SELECT body FROM conversations WHERE id = ?", (number,))
        return bytes(rows[0][0]) if rows else None

    def put_conversation(self, number: str, body: bytes) -> dict[str, Any]:
        """Keep a conversation, in place of the one before.

        Raises:
            PromptError: it is no JSON object, or too large, or there are too many.
        """
        if not _CONVERSATION_ID.fullmatch(number):
            raise PromptError("the id of a conversation is 1 to 64 letters, digits, - or _")
        if len(body) > MAX_CONVERSATION:
            raise PromptError(f"a conversation has at most {MAX_CONVERSATION} bytes, this one {len(body)}")
        try:
            value = json.loads(body.decode(), parse_constant=_no_number)  # without them: UTF-16 is taken, and NaN
        except (ValueError, RecursionError) as err:
            raise PromptError(f"the conversation is no JSON: {err}") from None
        if not isinstance(value, dict):
            raise PromptError("the conversation must be a JSON object")
        title = value.get("title")
        title = title.encode("utf-8", "replace").decode()[:200] if isinstance(title, str) else ""
        now = time.time()
        with self._writing() as db:
            (n,) = db.execute("SELECT count(*) FROM conversations WHERE id <> ?", (number,)).fetchone()
            if n >= MAX_CONVERSATIONS:
                raise PromptError(f"there are {n} conversations already: delete some")
            db.execute(
                "INSERT OR REPLACE INTO conversations VALUES (?, ?, ?, ?, ?)", (number, title, now, len(body), body)
            )
        return {"id": number, "updated_at": now, "bytes": len(body)}

    def remove_conversation(self, number: str) -> bool:
        with self._writing() as db:
            return db.execute("DELETE FROM conversations WHERE id = ?", (number,)).rowcount > 0


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def new_file_id() -> str:
    return f"file-{secrets.token_hex(12)}"
