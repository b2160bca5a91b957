"""Packed files, as DOCX and EPUB are: read from memory, nothing is unpacked to disk, nothing beyond a limit is unpacked."""

from __future__ import annotations

import io
import posixpath
import zipfile
import zlib
from urllib.parse import unquote, urlsplit

from ..errors import DocumentError
from .document import MIB, Limits, beyond, one_line
from .formats import packed_kind


class Packed:
    """A ZIP file.

    Raises:
        DocumentError: it is damaged, locked, or beyond a limit.
    """

    def __init__(self, data: bytes, name: str, limits: Limits) -> None:
        self.name, self.data = name, data
        # note: zipfile makes an object of each member before one could count them
        n_members = data.count(b"PK\x01\x02")
        limits.check("members", n_members, f"{name} has about {n_members:,} members")
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, OSError) as err:
            raise DocumentError(f"{name} is a damaged ZIP file (as DOCX and EPUB are): {one_line(str(err))}") from None
        members = self._zip.infolist()
        limits.check("members", len(members), f"{name} has {len(members):,} members")
        unpacked = sum(member.file_size for member in members)
        limits.check("unpacked_bytes", unpacked, f"{name} unpacks to {unpacked:,} bytes")
        for member in members:
            ratio = member.file_size // max(member.compress_size, 1)
            if member.file_size > MIB and ratio > limits.ratio:
                raise beyond("ratio", f"{name} unpacks one member to {ratio:,} times its size", limits.ratio, ratio)
        self.members = frozenset(member.filename for member in members)
        self.infos = members

    @property
    def kind(self) -> str:
        """ "docx" or "epub".

        Raises:
            DocumentError: it is another packed file.
        """
        mimetype = self.read("mimetype")[:100].decode("latin-1").strip() if "mimetype" in self.members else ""
        kind = packed_kind(self.members, mimetype)
        if isinstance(kind, tuple):
            raise DocumentError(f"{self.name} is {kind[0]}, which is not read: {kind[1]}")
        return kind

    def read(self, member: str | zipfile.ZipInfo, size: int = -1) -> bytes:
        """A member's bytes, all or the first.

        Raises:
            DocumentError: it is not there, damaged or locked.
        """
        called = member if isinstance(member, str) else member.filename
        called = one_line(called)
        try:
            with self._zip.open(
                member
            ) as file:  # gives no more bytes than the directory says, which were counted above
                return file.read(size)
        except KeyError:
            raise DocumentError(f"{self.name} is damaged: its member {called} is missing") from None
        except RuntimeError:  # zipfile's word for it
            raise DocumentError(f"{self.name} is locked with a password: save it without one first") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, OSError) as err:
            raise DocumentError(f"{self.name}: its member {called} is damaged: {one_line(str(err))}") from None

    def resolve(self, base: str, link: str) -> str | None:
        """The member that a link in another means; None where it leads out of the file, or there is none.

        Args:
            base: the other's name.
        """
        try:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                return None
            path = posixpath.normpath(posixpath.join(posixpath.dirname(base), unquote(parts.path)))
        except ValueError:
            return None
        return path if path in self.members else None
