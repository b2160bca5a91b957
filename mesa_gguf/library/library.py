"""`Library`: documents and the chunks of them that models have read, in a folder.

In short::

    library = Library()
    report = library.add("report.pdf", collection="work")
    print([document.name for document in library.documents("work")])
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DocumentError, MesaError, PromptError
from ..loaders import LoadedDocument, Place, load_bytes, walk
from ..loaders.document import printable
from ..paths import expanded, has_home, user_data_folder
from .budget import budget_of, set_budget
from .copying import why_read_only
from .index import DocumentRow, Index, damaged_document
from .renewal import is_there
from .store import ChunkStore, LibraryError, cannot_be_kept

ENVIRONMENT = "MESA_LIBRARY"
SHARE_OF_DISK = 0.2  # of what is free when the library is opened, and what it holds itself
_ADDRESS = re.compile(r"(?:https?|ftp)://", re.IGNORECASE)


@dataclass(frozen=True)
class Document:
    """A document of a library.

    Attributes:
        name: the file's, without its folder.
        source: the file that it was read from; None where there was none.
        kind: "pdf", "html", "text" and so on.
        n_chars: of its text.
        notes: what was noticed when it was loaded, a line each.
    """

    id: int
    name: str
    source: str | None
    kind: str
    title: str
    n_chars: int
    notes: tuple[str, ...] = ()

    @classmethod
    def _of(cls, row: DocumentRow) -> Document:
        return cls(row.id, row.name, row.source, row.kind, row.title, len(row.text), tuple(row.notes))


@dataclass
class Report:
    """What `verify` or `prune` did.

    Attributes:
        n_chunks, n_bytes: kept chunks that are there, afterwards.
        damaged: keys of files that were damaged and are gone; their chunks are read again when they are asked for. What is kept beside a
            chunk is a file too.
        missing: keys of files that the index had and the disk has not.
        unknown: keys of files that the index had not, and now has.
        dropped: keys of files that were removed to keep to the budget.
        documents: names of documents whose text in the index is damaged; they can be read when their files are added again.
    """

    n_chunks: int = 0
    n_bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)


def default_folder() -> Path:
    """The folder of the environment variable MESA_LIBRARY, or the user's data folder."""
    given = os.environ.get(ENVIRONMENT, "")
    if given.strip():
        return expanded(given)
    return user_data_folder() / "library"


class Library:
    """Documents that are kept, with their places and chunks.

    Args:
        folder: default: `default_folder`. It is made, readable by its user alone: rows of a cache reveal the text.
        budget: bytes that kept chunks may take; default: what `set_budget` set, else a fifth of the free disk. The text and the index
            do not count.

    A library that can only be read, as on a read-only disk or of somebody else, answers questions too: documents that are added to it are
    there as long as it is open, and no chunk is kept.

    Raises:
        LibraryError: the folder cannot be used, or is of a newer version.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, budget: int | None = None) -> None:
        if folder is not None and not str(folder).strip():
            raise LibraryError("the library's folder has no name")
        _check_budget(budget)
        self.folder = expanded(folder) if folder is not None else default_folder()
        if not has_home(self.folder):
            raise LibraryError(
                f"{self.folder}: there is no such home folder: give the whole path of the library's folder"
            )
        chunks, index = self.folder / "chunks", self.folder / "index.sqlite3"
        try:
            if self.folder.exists() and not self.folder.is_dir():
                raise LibraryError(f"{self.folder}: is a file: name a folder for the library")
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path, is_wrong, what in ((chunks, chunks.is_file(), "file"), (index, index.is_dir(), "folder")):
                if is_wrong:
                    raise LibraryError(f"{path}: is a {what}, which no library has there: move it away")
            reason = why_read_only(index) if is_there(index) else None
        except OSError as err:
            raise cannot_be_kept(self.folder, err) from None
        self.store = ChunkStore(chunks, read_only=reason is not None)
        self.index = Index(index, self.store, read_only=reason)
        self.store.read_only = self.index.read_only is not None
        self._budget = budget
        self._lost_budget: str | None = None
        try:
            budget_of(chunks)
        except ValueError as err:
            self._lost_budget = f"{chunks / 'budget'}: the library's budget is lost, as {err}: set it again"

    @property
    def budget(self) -> int:
        """Bytes that kept chunks may take; `UNLIMITED` where they may take all."""
        if self._budget is not None:
            return self._budget
        with contextlib.suppress(ValueError):
            kept = budget_of(self.store.folder)
            if kept is not None:
                return kept
        free = shutil.disk_usage(self.folder).free
        return int((free + self.index.kept_bytes()) * SHARE_OF_DISK)

    @property
    def has_own_budget(self) -> bool:
        """Whether its budget was set, by `set_budget`."""
        with contextlib.suppress(ValueError):
            return budget_of(self.store.folder) is not None
        return False

    def set_budget(self, budget: int | None) -> None:
        """Set the budget of this folder, for every process from now on. What was kept beyond it goes when something is kept, or by `prune`.

        Args:
            budget: bytes, or `UNLIMITED`; None: a fifth of the free disk again.

        Raises:
            LibraryError: it is no number of bytes, or the folder cannot be written to.
        """
        _check_budget(budget)
        self.check_writable()
        set_budget(self.store.folder, budget)
        self._lost_budget = None

    @property
    def mended(self) -> str | None:
        """What was damaged when the library was opened, and what was done about it, in one line."""
        return self.index.mended or self._lost_budget

    @property
    def read_only(self) -> str | None:
        """That nothing is kept, and why, in one line; None where the library can be written to."""
        reason = self.index.read_only
        return None if reason is None else f"{self.folder}: the library can only be read ({reason}): nothing is kept"

    def check_writable(self) -> None:
        """Raise LibraryError where the library can only be read."""
        if self.index.read_only is not None:
            raise LibraryError(
                f"{self.folder}: the library cannot be written to: {self.index.read_only}: name another folder, or change who may write to it"
            )

    def close(self) -> None:
        self.index.close()

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    #
    # documents
    #

    def add(
        self,
        file: str | os.PathLike[str],
        *,
        collection: str | None = None,
        encoding: str | None = None,
        password: str | None = None,
    ) -> Document:
        """Load a file into the library; one that is there already, by its bytes, is not loaded again.

        A file that has changed since takes the place of what it was. Its chunks that did not change are not read again.

        Raises:
            DocumentError: the file cannot be loaded; says why.
            LibraryError: the library cannot be written to.
        """
        if isinstance(file, str) and _ADDRESS.match(file):  # a path has lost one of the slashes
            raise DocumentError(
                f"{printable(file)} is an address: save it as a file; nothing is fetched from the network"
            )
        return self._add_file(expanded(file), None, collection=collection, encoding=encoding, password=password)

    def _add_file(
        self,
        path: Path,
        called: str | None,
        *,
        collection: str | None,
        encoding: str | None = None,
        password: str | None = None,
    ) -> Document:
        """`add`.

        Args:
            called: the file in messages; default: its path.
        """
        name = printable(str(path)) if called is None else called
        try:
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise DocumentError(f"{name} is no regular file")
            data = path.read_bytes()
        except DocumentError:
            raise
        except FileNotFoundError:
            raise DocumentError(f"{name}: there is no such file") from None
        except IsADirectoryError:
            raise DocumentError(f"{name}: is a folder: add what is in it") from None
        except (OSError, ValueError) as err:  # ValueError: a NUL in the name
            raise DocumentError(f"{name}: cannot be read: {getattr(err, 'strerror', None) or err}") from None
        source = printable(str(path.resolve()))
        return self._add(
            data,
            printable(path.name),
            source,
            collection,
            lambda: load_bytes(data, name, encoding=encoding, password=password),
            again=encoding is not None or password is not None,
        )

    def add_text(self, text: str, name: str, *, collection: str | None = None) -> Document:
        """Put a text into the library that is no file.

        Raises:
            PromptError: it is empty.
        """
        try:
            data = text.encode()
        except (AttributeError, UnicodeEncodeError):
            raise PromptError("the document is no text: it must be a str, without halves of characters") from None
        if not text.strip():
            raise PromptError("the document is empty")
        loaded = LoadedDocument(text.replace("\r\n", "\n").replace("\r", "\n"), (Place(0, None, ()),), "text")
        return self._add(data, name, None, collection, lambda: loaded)

    def add_bytes(
        self, data: bytes, name: str, *, collection: str | None = None, encoding: str | None = None
    ) -> Document:
        """Load what would be in a file, from a pipe for example.

        Raises:
            DocumentError: it cannot be loaded; says why.
        """
        return self._add(data, name, None, collection, lambda: load_bytes(data, name, encoding=encoding))

    def add_folder(
        self, folder: str | os.PathLike[str], *, collection: str | None = None
    ) -> tuple[list[Document], list[str]]:
        """Load what can be loaded in a folder: the documents, and a line for each file that could not be.

        Raises:
            DocumentError: there is no such folder.
            PromptError: the collection's name cannot be shown.
        """
        if collection is not None:
            check_name(collection, "a collection's name")
        given = expanded(folder)
        found = walk(given)
        documents, notes = [], list(found.notes)
        for path in found.files:
            try:
                called = printable((given / path.relative_to(given.resolve())).as_posix())  # as in the notes
                documents.append(self._add_file(path, called, collection=collection))
            except LibraryError:
                raise
            except MesaError as err:
                notes.append(str(err))
        return documents, notes

    def _add(
        self,
        data: bytes,
        name: str,
        source: str | None,
        collection: str | None,
        load: Callable[[], LoadedDocument],
        again: bool = False,
    ) -> Document:
        check_name(name, "a document's name")
        if collection is not None:
            check_name(collection, "a collection's name")
        digest = hashlib.sha256(data).hexdigest()
        found = self.index.find_document(digest, source)
        row = self.index.document(found) if found is not None else None
        again = again or (row is not None and not row.whole)
        if row is None or again or (source is not None and row.source != source):
            loaded = load()
            number = self.index.add_document(
                name=name,
                source=source,
                digest=digest,
                kind=loaded.kind,
                title=loaded.title or name,
                text=loaded.text,
                places=[(place.start, place.page, place.heading) for place in loaded.places],
                notes=loaded.notes,
                again=again,
            )
            row = self._row(number)
        if collection is not None:
            self.index.add_to_collection(collection, [row.id])
        return Document._of(row)

    def _row(self, number: int) -> DocumentRow:
        row = self.index.document(number)
        if row is None:
            raise LibraryError(f"document {number} is not in the library")
        if not row.whole:
            raise damaged_document(row)
        return row

    def documents(self, collection: str | None = None) -> list[Document]:
        """All documents, or those of a collection, in the order in which they were added.

        Raises:
            PromptError: there is no such collection.
        """
        if collection is not None:
            self._check_collection(collection)
        return [Document._of(row) for row in self.index.documents(collection)]

    def text(self, document: Document) -> str:
        """The text of a document."""
        return self._row(document.id).text

    def place(self, document: Document, offset: int) -> Place:
        """Page and headings of a place in a document's text."""
        row = self._row(document.id)
        found = Place(0, None, ())
        for start, page, heading in row.places:
            if start > offset:
                break
            found = Place(start, page, tuple(heading))
        return found

    def _check_collection(self, collection: str) -> None:
        check_name(collection, "a collection's name")
        if collection not in dict(self.index.collections()):
            known = ", ".join(name for name, _ in self.index.collections())
            raise PromptError(f"there is no collection {collection} in the library: it has {known or 'no collection'}")

    def remove_collection(self, collection: str) -> None:
        """Forget a collection. Its documents stay.

        Raises:
            PromptError: there is no such collection.
        """
        self.check_writable()
        self._check_collection(collection)
        self.index.remove_collection(collection)

    def take_out(self, document: Document, collection: str) -> None:
        """Take a document out of a collection. It stays in the library.

        Raises:
            PromptError: there is no such collection, or the document is not in it.
        """
        self.check_writable()
        self._check_collection(collection)
        if collection not in self.index.collections_of(document.id):
            raise PromptError(f"{document.name} is not in the collection {collection}")
        self.index.remove_from_collection(collection, document.id)

    def remove(self, document: Document) -> None:
        """Forget a document. Its chunks stay until the budget needs their place, or `prune` is called."""
        self.check_writable()
        self.index.remove_document(document.id)

    #
    # kept chunks
    #

    def keep(self, key: str, model: str, n_tokens: int, rows: bytes, *, in_use: Iterable[str] = ()) -> list[str]:
        """Keep a chunk's rows, within the budget; returns the keys that were dropped for it.

        Args:
            n_tokens: of the chunk; 0 for what is kept beside documents' chunks, and counts as none.
            in_use: keys that must not be dropped.

        Raises:
            LibraryError: the disk is full, or the chunk alone is larger than the budget.
        """
        if self.read_only is not None:
            raise LibraryError(self.read_only)
        need = len(rows) + 256
        if need > self.budget:
            raise LibraryError(f"chunks do not fit into the library's budget of {self.budget} bytes: they are not kept")
        dropped = self._shrink(self.budget - need, {*in_use, key})
        if self.index.kept_bytes() + need > self.budget:
            raise LibraryError(
                f"the library's budget of {self.budget} bytes is full of chunks that are read together: what does not fit is not kept"
            )
        size = self.store.put(key, n_tokens, rows)
        self.index.note_kept(key, model, n_tokens, size)
        return dropped

    def rows(self, key: str, n_tokens: int) -> bytes | None:
        """The kept rows of a chunk; None if they are not there."""
        rows = self.store.get(key, n_tokens)
        if rows is None:
            self.index.note_dropped([key])
        return rows

    def _shrink(self, budget: int, in_use: set[str]) -> list[str]:
        """Drop the chunks that were used least recently until what is left fits into a budget."""
        total = self.index.kept_bytes()
        if total <= budget:
            return []
        dropped = []
        for row in self.index.kept():
            if total <= budget:
                break
            if row.key in in_use:
                continue
            self.store.remove(row.key)
            dropped.append(row.key)
            total -= row.size
        self.index.note_dropped(dropped)
        return dropped

    def prune(self, budget: int | None = None) -> Report:
        """Keep to a budget now (default: the library's own), and bring index and disk in step."""
        self.check_writable()
        report = self._compare()
        report.dropped = self._shrink(self.budget if budget is None else budget, set())
        return self._counted(report)

    def verify(self) -> Report:
        """Read every kept chunk and compare its checksum; what is damaged goes, if it can, and is read again when it is asked for.

        The index is compared with its checksums too: damaged chunks and words are cut anew, damaged documents are named.
        """
        self.index.check()
        report = self._compare()
        report.documents = [row.name for row in self.index.documents() if not row.whole]
        self.index.check_words()
        gone = []
        for row in self.index.kept():
            if row.key not in self.store:  # another process took it away meanwhile
                gone.append(row.key)
            elif self.store.get(row.key, row.n_tokens) is None:
                report.damaged.append(row.key)
        self.index.note_dropped([*gone, *report.damaged])
        return self._counted(report)

    def _compare(self) -> Report:
        """Bring index and disk in step: what is damaged at first sight goes, and the index has all that is there."""
        report = Report()
        kept = {row.key: row for row in self.index.kept()}
        there = {file.key: self.store.head(file.key) for file in self.store.files()}
        for key, head in there.items():
            if head is None or (key in kept and kept[key].n_tokens != head.n_tokens):  # one of the two is damaged
                self.store.clear(key)
                report.damaged.append(key)
        # of a process that was killed before it had noted them, or of an index that was lost
        report.unknown = sorted(set(there) - set(kept) - set(report.damaged))
        report.missing = sorted(set(kept) - set(there))
        wrong = [key for key, head in there.items() if head and key in kept and kept[key].size != head.size]
        self.index.note_dropped([*report.missing, *report.damaged])
        self.index.note_found([*report.unknown, *wrong])
        return report

    def _counted(self, report: Report) -> Report:
        kept = self.index.kept()
        report.n_chunks, report.n_bytes = sum(row.n_tokens > 0 for row in kept), sum(row.size for row in kept)
        return report


def _check_budget(budget: object) -> None:
    if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 0):
        raise LibraryError(f"the library's budget is {budget!r}: it must be a number of bytes, 0 or more")


def check_name(name: object, what: str) -> None:
    """Raise PromptError for a name that a terminal or a list could not show."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise PromptError(f"{what} is {name!r}: it must be printable text")
