"""An index that can only be read, as on a read-only disk or in somebody else's folder: a copy of it takes its place, and goes with the process.

SQLite reads a database with write-ahead logging only where the files beside it are there or can be made, or where nobody writes to it;
and a question notes how documents are cut, and what is not kept. A copy that may be written to needs none of that to be known elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .renewal import files_of
from .schema import BUSY_SECONDS, is_refused


def why_read_only(path: Path) -> str | None:
    """Why an index that is there cannot be written to; None where it can. SQLite needs the folder too."""
    effective = os.access in os.supports_effective_ids
    if all(os.access(place, os.W_OK, effective_ids=effective) for place in (path.parent, path)):
        return None
    is_disk = hasattr(os, "statvfs") and os.statvfs(path).f_flag & os.ST_RDONLY
    return os.strerror(errno.EROFS if is_disk else errno.EACCES)


def copied(path: Path) -> sqlite3.Connection:
    """A copy of an index as it is at one moment, in a temporary file without a name, or in memory where there is no place for one.

    Raises:
        sqlite3.DatabaseError, OSError: it is damaged, or cannot be read.
    """
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        copy = sqlite3.connect("" if _has_temporary() else ":memory:", isolation_level=None, check_same_thread=False)
        try:
            with _opened(path) as source:
                source.backup(copy)
            return copy
        except BaseException as err:
            copy.close()
            if not isinstance(err, _Changed) or time.monotonic() > give_up:
                raise
        time.sleep(0.05)


class _Changed(sqlite3.OperationalError):
    """It was written to while it was copied."""


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    uri = path.resolve().as_uri()
    with contextlib.ExitStack() as stack:
        try:
            db = sqlite3.connect(f"{uri}?mode=ro", timeout=BUSY_SECONDS, uri=True)
            stack.callback(db.close)
            db.execute("SELECT 1 FROM sqlite_master").fetchone()
        except sqlite3.OperationalError as err:
            if not is_refused(err):
                raise
        else:
            yield db
            return
        # what whoever writes has open would be there: so nobody does. What a process that was killed left is looked at in a copy
        before = _state(path)
        if any(size for name, size, _ in before if name != path.name):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mesa-")))
            for name, _, _ in before:
                shutil.copyfile(path.with_name(name), folder / name)
            source = sqlite3.connect(folder / path.name)
        else:
            source = sqlite3.connect(f"{uri}?immutable=1", uri=True)
        with contextlib.closing(source):
            try:
                yield source
            finally:  # what is read meanwhile may look damaged
                if _state(path) != before:
                    raise _Changed(f"{path}: was written to while it was copied")


def _state(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of an index's files that hold what is in it."""
    found = []
    for file in files_of(path):
        if not file.name.endswith("-shm"):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                found.append((file.name, status.st_size, status.st_mtime_ns))
    return found


def _has_temporary() -> bool:
    try:
        return bool(tempfile.gettempdir())
    except FileNotFoundError:
        return False
