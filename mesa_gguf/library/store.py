"""Kept chunks on disk: one immutable file each, named by what it is of.

A file is a header (magic, version, key, number of tokens, length and SHA-256 of what follows) and the rows that
`MesaLlama.save_chunk` gave. It is written to a temporary name, synced and linked to its own: a name that is there holds a whole
file, whatever killed the process. What is damaged all the same is found by its checksum and taken away; the chunk is then read again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import MesaError

MAGIC = b"MESACHNK"
VERSION = 1
HEADER = struct.Struct("<8sII32sQQ32s")  # magic, version, header bytes, key, tokens, payload bytes, its SHA-256
SUFFIX = ".chunk"
TEMPORARY = ".new"
EMBEDDINGS = "embeddings"  # stands behind a model's fingerprint in the index, for vectors that it made
ORPHAN_SECONDS = 3600.0  # a temporary file that is older belongs to a process that is gone


class LibraryError(MesaError):
    """The library on disk cannot be used: no place, no permission, or of a future version."""


def cannot_be_kept(path: Path, err: OSError) -> LibraryError:
    """The error to raise where a library's folder cannot be made or written to."""
    return LibraryError(f"{path}: the library cannot be kept there: {err.strerror}: name another folder for it")


@dataclass(frozen=True)
class ChunkFile:
    """What lies in the store under a key."""

    key: str
    size: int


@dataclass(frozen=True)
class ChunkHead:
    """What the header of a chunk's file says."""

    key: str
    n_tokens: int
    size: int


def chunk_key(*parts: object, tokens: Sequence[int], preamble: Sequence[int]) -> str:
    """The name of a chunk's rows: 64 hex digits that stand for all that they depend on.

    Args:
        parts: of the model and its context: fingerprint, adapter, RoPE, KV types.
        preamble: the token ids of the first chunk.
        tokens: the chunk's own.
    """
    digest = hashlib.sha256(repr((VERSION, parts)).encode())
    for ids in (preamble, tokens):
        digest.update(struct.pack(f"<Q{len(ids)}i", len(ids), *ids))
    return digest.hexdigest()


class ChunkStore:
    """Chunk files in a folder, by key. Several processes may use it at the same time.

    Args:
        read_only: nothing is written to the folder, which may not be there.

    Raises:
        LibraryError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self.folder, self.read_only = folder, read_only
        self._useless: set[str] = set()  # keys of damaged files that cannot be taken away
        if not read_only:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as err:
                raise cannot_be_kept(folder, err) from None
        if folder.exists() and not os.access(folder, os.R_OK | os.X_OK):
            raise LibraryError(
                f"{folder}: kept chunks cannot be read: make the folder readable, or use another library"
            )
        if not read_only:
            self._sweep()

    @property
    def rights(self) -> int:
        """The folder's mode, which what is written to the library has too: for its user alone, unless somebody changed that."""
        return stat.S_IMODE(self.folder.stat().st_mode)

    def path(self, key: str) -> Path:
        """Where the file of a key is, if it is there."""
        if not _is_key(key):
            raise ValueError(f"{key!r} is no key")
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    def __contains__(self, key: str) -> bool:
        with contextlib.suppress(OSError):  # it cannot be looked at: then it is not there
            return _is_key(key) and key not in self._useless and self.path(key).is_file()
        return False

    def get(self, key: str, n_tokens: int) -> bytes | None:
        """The rows of a chunk; None if they are not there, or damaged: then the file is taken away."""
        if not _is_key(key):  # a damaged index asks for it
            return None
        path = self.path(key)
        try:
            with path.open("rb") as file:
                head = file.read(HEADER.size)
                rows = self._checked(head, file.read(), key, n_tokens)
        except FileNotFoundError:
            return None
        except OSError:  # a folder, a link in a circle, a bad block: read it again
            rows = None
        if rows is None:
            self.clear(key)
        return rows

    def part(self, key: str, n_tokens: int, ranges: Sequence[tuple[int, int]]) -> bytes | None:
        """Some of the bytes of a chunk's rows, not checked, as that would read all of them; None if they are not there.

        Args:
            ranges: offset and size of each part.
        """
        head = self.head(key)
        if head is None or head.n_tokens != n_tokens:
            return None
        try:
            with self.path(key).open("rb") as file:
                found = []
                for offset, size in ranges:
                    file.seek(HEADER.size + offset)
                    found.append(file.read(size))
        except OSError:
            return None
        return b"".join(found) if all(len(part) == size for part, (_, size) in zip(found, ranges)) else None

    def clear(self, key: str) -> None:
        """Make room for a chunk whose file is damaged, whatever it is; where that is not possible, it is not there from now on."""
        path = self.path(key)
        self._useless.add(key)
        if self.read_only:
            return
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}.damaged"))
            else:
                path.unlink(missing_ok=True)
            self._useless.discard(key)

    @staticmethod
    def _checked(head: bytes, rows: bytes, key: str, n_tokens: int) -> bytes | None:
        if len(head) != HEADER.size:
            return None
        magic, version, size, own_key, tokens, n_bytes, checksum = HEADER.unpack(head)
        expected = (MAGIC, VERSION, HEADER.size, bytes.fromhex(key), n_tokens, len(rows))
        if (magic, version, size, own_key, tokens, n_bytes) != expected:
            return None
        return rows if hashlib.sha256(rows).digest() == checksum else None

    def put(self, key: str, n_tokens: int, rows: bytes) -> int:
        """Keep the rows of a chunk; what is there already stays as it is. Returns the file's bytes.

        Raises:
            LibraryError: the disk is full, or cannot be written to. Nothing is left behind.
        """
        path = self.path(key)
        checksum = hashlib.sha256(rows).digest()
        head = HEADER.pack(MAGIC, VERSION, HEADER.size, bytes.fromhex(key), n_tokens, len(rows), checksum)
        temporary = path.with_name(f"{key}.{os.getpid()}.{secrets.token_hex(4)}{TEMPORARY}")
        try:
            _make_folder(path.parent, self.rights)
            try:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with open(descriptor, "wb") as file:
                    file.write(head)
                    file.write(rows)
                    file.flush()
                    os.fsync(file.fileno())
                if self.rights & 0o077:
                    temporary.chmod(self.rights & 0o666)
                try:
                    _publish(temporary, path)
                    self._useless.discard(key)
                except FileExistsError:
                    if key in self._useless:
                        raise
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
            sync_folder(path.parent)
        except OSError as err:
            full = ": free some, or give the library a smaller budget" if err.errno == errno.ENOSPC else ""
            raise LibraryError(f"{path.parent}: a chunk cannot be kept: {err.strerror}{full}") from None
        return HEADER.size + len(rows)

    def remove(self, key: str) -> bool:
        """Take a chunk away; whether it was there."""
        if not _is_key(key):
            return False
        try:
            self.path(key).unlink()
        except FileNotFoundError:
            return False
        except OSError as err:
            raise LibraryError(f"{self.path(key)}: cannot be removed: {err.strerror}") from None
        return True

    def files(self) -> Iterator[ChunkFile]:
        """All chunks that are there, in the order of their keys."""
        for path in sorted(self.folder.glob(f"??/*{SUFFIX}")):
            key = path.name.removesuffix(SUFFIX)
            with contextlib.suppress(OSError, ValueError):
                if path == self.path(key):
                    yield ChunkFile(key, path.stat().st_size)

    def head(self, key: str) -> ChunkHead | None:
        """What the header of a chunk's file says; None where there is none, or it is not of that file, which is damaged then."""
        if not _is_key(key):
            return None
        path = self.path(key)
        try:
            with path.open("rb") as file:
                head = file.read(HEADER.size)
                size = os.fstat(file.fileno()).st_size
        except OSError:
            return None
        if len(head) != HEADER.size:
            return None
        magic, version, n_head, own_key, n_tokens, n_bytes, _ = HEADER.unpack(head)
        if (magic, version, n_head, own_key) != (MAGIC, VERSION, HEADER.size, bytes.fromhex(key)):
            return None
        return ChunkHead(key, n_tokens, size) if size == HEADER.size + n_bytes and n_tokens < 2**31 else None

    def heads(self) -> Iterator[ChunkHead]:
        """Those of all chunks that are there, in the order of their keys; damaged ones are left out."""
        for file in self.files():
            if (head := self.head(file.key)) is not None:
                yield head

    def _sweep(self) -> None:
        """Take away what processes that were killed left half written."""
        for path in self.folder.glob(f"??/*{TEMPORARY}"):
            with contextlib.suppress(OSError):
                # note: the clock may jump; a file of the future is an orphan when it is as far away
                if abs(time.time() - path.stat().st_mtime) > ORPHAN_SECONDS:
                    path.unlink()


def _is_key(key: object) -> bool:
    return isinstance(key, str) and len(key) == 64 and set(key) <= set("0123456789abcdef")


def _make_folder(folder: Path, rights: int) -> None:
    if not folder.is_dir():
        folder.mkdir(mode=0o700, exist_ok=True)
        if rights & 0o077:
            folder.chmod(rights)


def _publish(temporary: Path, path: Path) -> None:
    """Give a whole file its name, unless the name is there."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    with contextlib.suppress(OSError):  # not everywhere can a folder be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
