"""Files as documents of the library: their text is taken out in a thread of its own, and the model reads them in the background."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError, DocumentError, MesaError
from ..library.library import Document, Library
from ..library.store import LibraryError
from ..reading.shelf import Catalogue, Piece, Shelf
from .engine import Engine, Stopped
from .problems import Problem
from .records import FileRow, Records, StoreRow, new_file_id

log = logging.getLogger("mesa_gguf.server")

PASTED = ".pasted"  # the collection of texts that came in messages, which is shown nowhere
MAX_PASTED = 64  # of them are kept
TAKEN_AT_ONCE = 2  # files that came in messages: each is taken apart in a process of its own
MAX_TEXT = 200_000  # characters of a document's text in one answer

State = Literal["waiting", "loading", "reading", "ready", "error"]


@dataclass
class Progress:
    """How far a file is.

    Attributes:
        chunks, tokens: of it; None before its text is there.
        tokens_read: of its chunks that are kept.
        notes: what was noticed while it was read, a line each.
    """

    state: State = "waiting"
    chunks: int | None = None
    tokens: int | None = None
    tokens_read: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Unread:
    """What is not read yet of a file.

    Attributes:
        keys: of all chunks of the file: none is dropped for another one.
    """

    pieces: list[Piece]
    keys: list[str]


class Documents:
    """The files of a server, and the documents of the library that they are.

    Args:
        library: takes the documents.
        records: of files and vector stores.
        open_catalogue: makes the catalogue that the loader's thread cuts by, with a vocabulary of its own.
        shelf: of the model's thread; None: this model reads no documents, for the reason given.
    """

    def __init__(
        self,
        library: Library,
        records: Records,
        shelf: Shelf | None,
        open_catalogue: Callable[[], Catalogue],
        reason: str = "",
    ) -> None:
        self.library, self.records, self.shelf, self.reason = library, records, shelf, reason
        self.wake: Callable[[], None] = lambda: None  # tells the engine that there is something to read
        self._open_catalogue = open_catalogue
        self._read_with = ""
        if shelf is not None:
            preamble = repr(shelf.catalogue.preamble)
            self._read_with = hashlib.sha256(f"{shelf.llm.chunk_origin}:{preamble}".encode()).hexdigest()
        self._lock = threading.RLock()
        self._progress: dict[str, Progress] = {}
        self._to_load: queue.Queue[str | None] = queue.Queue()
        self._to_read: OrderedDict[str, _Unread] = OrderedDict()  # what is not read yet of each file
        self._to_complete: OrderedDict[int, None] = (
            OrderedDict()
        )  # documents that may lack what an embedding model says of them
        self._completing: Iterator[Piece] | None = None  # chunks of one of them
        self._gone: set[int] = set()  # documents that the model's thread may forget
        self._known: dict[int, Document] = {}
        self._meeting = threading.Lock()
        self._adding = 0  # documents that are in the library already, or just now, and noted nowhere yet
        self._speed: float | None = None  # tokens a second
        self.turns = asyncio.Semaphore(
            TAKEN_AT_ONCE
        )  # to take a file in that came in a message; who waits keeps no thread
        self._loader = threading.Thread(target=self._load_all, name="mesa-loader", daemon=True)

    def start(self) -> None:
        """Begin to load and read, first what was not done when the server was stopped."""
        self.records.sweep()
        self.meet_library()
        for row in self.records.files():
            self._begin(row)
        self._loader.start()

    def close(self) -> None:
        self._to_load.put(None)
        if self._loader.is_alive():
            self._loader.join(5.0)

    def _begin(self, row: FileRow) -> None:
        if row.error is not None:
            self._progress[row.id] = Progress("error")
        elif row.document is not None and not row.has_content and row.read_with is None:
            # it was in the library before: it is read when it is asked about
            self._progress[row.id] = Progress("ready")
            self._complete(row.document)
        else:
            self._progress[row.id] = Progress("waiting")
            self._to_load.put(row.id)

    def require(self) -> Shelf:
        """The shelf.

        Raises:
            Problem: this model reads no documents.
        """
        if self.shelf is None:
            raise Problem(400, f"this model reads no documents: {self.reason}", "no_documents")
        return self.shelf

    #
    # files
    #

    def add(self, row: FileRow) -> None:
        """Load and read a file that was just noted."""
        with self._lock:
            self._progress[row.id] = Progress("waiting")
        self._to_load.put(row.id)

    def file(self, file_id: str) -> FileRow:
        """A file by its id.

        Raises:
            Problem: there is none.
        """
        row = self.records.file(file_id)
        if row is None:
            raise Problem(404, f"there is no file {file_id}", "not_found", param="file_id")
        return row

    def loaded(self, file_id: str) -> Document | None:
        """The document of a file; None while its text is not there yet.

        Raises:
            Problem: there is no such file, or its text cannot be taken out.
        """
        row = self.file(file_id)
        if row.error is not None:
            raise Problem(400, f"{row.filename} cannot be asked about: {row.error}", "file_error")
        if row.document is None and self.progress(file_id).state == "error":  # a disk that is full
            reason = "; ".join(self.progress(file_id).notes)
            raise Problem(503, f"{row.filename} cannot be asked about: {reason}", "file_error")
        return None if row.document is None else self.document(row)

    def document(self, row: FileRow) -> Document:
        """The document of a file that is loaded.

        Raises:
            Problem: it is not in the library any more.
        """
        assert row.document is not None
        found = self._document(row.document)
        if found is None:
            raise Problem(404, f"{row.filename} is not in the library any more", "not_found")
        return found

    def _document(self, number: int) -> Document | None:
        """A document by its number, from memory where it was asked for before; another process may have removed it since."""
        if number not in self._known:
            row = self.library.index.document(number)
            if row is None:
                return None
            self._known[number] = Document._of(row)
        return self._known[number]

    def check_there(self, documents: Sequence[Document]) -> None:
        """Raise Problem where a document was deleted since it was asked about."""
        there = set(self.library.index.document_numbers())
        for document in documents:
            if document.id not in there:
                raise Problem(404, f"{document.name} was deleted", "not_found")

    @contextlib.contextmanager
    def _adds(self) -> Iterator[None]:
        """Within this a document is added to the library, and noted."""
        with self._meeting:
            self._adding += 1
        try:
            yield
        finally:
            with self._meeting:
                self._adding -= 1

    def progress(self, file_id: str) -> Progress:
        return self._progress.get(file_id) or Progress()

    def seconds_left(self, file_id: str) -> float | None:
        """Until a file is read, with those before it; None while no speed is known."""
        with self._lock:
            if file_id not in self._to_read or self._speed is None:
                return None
            n_tokens = 0
            for name, unread in self._to_read.items():
                n_tokens += sum(len(piece.tokens) for piece in unread.pieces)
                if name == file_id:
                    break
        return round(n_tokens / self._speed, 1)

    def remove(self, row: FileRow) -> None:
        """Forget a file, and its document where nothing else has it."""
        with self._lock:
            self._to_read.pop(row.id, None)
            self._progress.pop(row.id, None)
            row = self.records.file(row.id) or row  # its text may have come since it was looked up
            stores = self.records.stores_of(row.id)
            self.records.remove_file(row.id)
            if row.document is None:
                return
            if not self._drop_unused(row.document):
                for store in stores:
                    self._leave_collection(store, row.document)

    def _drop_unused(self, number: int) -> bool:
        """Take a document that no file has out of the library; whether it was one."""
        if self.records.files_of(number):
            return False
        self.library.index.remove_document(number)
        self._known.pop(number, None)
        self._gone.add(number)
        return True

    def meet_library(self) -> None:
        """Take in what was put into the library, and taken out of it, beside the server."""
        with self._meeting:
            files = {row.document: row for row in self.records.files() if row.document is not None}
            there = self.library.index.document_numbers()
            for number in sorted(set(there) - set(files) - set(self.library.index.document_numbers(PASTED))):
                document = self._document(number) if self._adding == 0 else None
                if document is not None:
                    row = self.records.add_file(
                        new_file_id(), document.name, has_content=False, document=number, n_bytes=document.n_chars
                    )
                    files[number] = row
                    self._progress[row.id] = Progress("ready")
                    self._complete(number)
            for number in set(files) - set(there):
                for row in self.records.files_of(number):
                    if row.error is None:
                        self.records.note_file(row.id, error="it is not in the library any more")
                        self._progress[row.id] = Progress("error")
                self._known.pop(number, None)
            stores = {store.name: store for store in self.records.stores()}
            for name, _ in self.library.index.collections():
                if name == PASTED:
                    continue
                store = stores.get(name) or self.records.add_store(name)
                members = {row.document for row, _ in self.records.members(store)}
                for number in self.library.index.document_numbers(name):
                    if number in files and number not in members:
                        self.records.add_member(store, files[number].id)

    #
    # vector stores
    #

    def store(self, name: str) -> StoreRow:
        """A vector store by id or name.

        Raises:
            Problem: there is none.
        """
        store = self.records.store(name)
        if store is None:
            self.meet_library()
            store = self.records.store(name)
        if store is None:
            raise Problem(404, f"there is no vector store {name}", "not_found", param="vector_store_id")
        return store

    def make_collection(self, store: StoreRow) -> None:
        """The library's collection of a vector store, which is empty yet."""
        self.library.index.add_to_collection(store.name, [])

    def join_store(self, store: StoreRow, row: FileRow) -> float:
        with self._lock:
            row = self.file(row.id)  # its text may have come since it was looked up, or it was deleted
            created = self.records.add_member(store, row.id)
            if row.document is not None:
                self.library.index.add_to_collection(store.name, [row.document])
        return created

    def leave_store(self, store: StoreRow, row: FileRow) -> bool:
        there = self.records.remove_member(store, row.id)
        if row.document is not None:
            self._leave_collection(store, row.document)
        return there

    def _leave_collection(self, store: StoreRow, document: int) -> None:
        if all(other.document != document for other, _ in self.records.members(store)):
            self.library.index.remove_from_collection(store.name, document)

    def remove_store(self, store: StoreRow) -> None:
        self.records.remove_store(store)
        self.library.index.remove_collection(store.name)

    #
    # texts that came in messages
    #

    def take_in(self, data: bytes, name: str) -> Document:
        """Bytes that came in a message as a document of the library, known by its content."""
        with self._adds():
            document = self.library.add_bytes(data, name, collection=PASTED)
        self._keep_few_pasted()
        return document

    def take_in_text(self, text: str, name: str | None = None) -> Document:
        """A text that came in a message as a document of the library, known by its content."""
        name = name or f"pasted-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt"
        with self._adds():
            document = self.library.add_text(text, name, collection=PASTED)
        self._keep_few_pasted()
        return document

    def _keep_few_pasted(self) -> None:
        numbers = self.library.index.document_numbers(PASTED)
        for number in numbers[:-MAX_PASTED]:
            if not self.records.files_of(number) and len(self.library.index.collections_of(number)) == 1:
                self.library.index.remove_document(number)
                self._gone.add(number)

    #
    # the loader's thread
    #

    def _load_all(self) -> None:
        catalogue: Catalogue | None = None
        while True:
            file_id = self._to_load.get()
            if file_id is None:
                return
            try:
                if catalogue is None and self.shelf is not None:
                    catalogue = self._open_catalogue()
                self._load(file_id, catalogue)
            except Exception as err:
                if not isinstance(err, MesaError):
                    log.exception("a file cannot be loaded")
                # note: a full disk passes, a damaged file does not: the former is tried again at the next start
                message = str(err) if isinstance(err, MesaError) else "it cannot be loaded: the server's log says why"
                with contextlib.suppress(LibraryError):
                    if isinstance(err, (DocumentError, ConfigError)) or not isinstance(err, (LibraryError, OSError)):
                        self.records.note_file(file_id, error=message)
                with self._lock:
                    if file_id in self._progress:
                        self._progress[file_id] = Progress("error", notes=[message])

    def _load(self, file_id: str, catalogue: Catalogue | None) -> None:
        row = self.records.file(file_id)
        if row is None or self.shelf is None or catalogue is None:
            return
        progress = self._progress.setdefault(file_id, Progress())
        progress.state = "loading"
        if row.document is None:
            content = self.records.content(row)
            if content is None:
                raise DocumentError("its bytes are gone from the server's folder: upload it again")
            found = self._taken_in(row, content.read_bytes())
            if found is None:
                return
            document = found
        else:
            document = self.document(row)
        pieces = [catalogue.piece(document, span) for span in catalogue.rows(document)]
        catalogue.forget(document.id)
        if not pieces:
            raise DocumentError(f"{row.filename} has no text")
        keys = [self.shelf.key(piece) for piece in pieces]
        missing = [piece for key, piece in zip(keys, pieces) if key not in self.library.store]
        tokens = sum(len(piece.tokens) for piece in pieces)
        with self._lock:
            if file_id not in self._progress:
                return  # it was deleted meanwhile
            progress.chunks, progress.tokens = len(pieces), tokens
            progress.tokens_read = tokens - sum(len(piece.tokens) for piece in missing)
            if missing:
                progress.state = "reading"
                self._to_read[file_id] = _Unread(missing, keys)
        if not missing:
            self._done(file_id)
        if len(missing) < len(pieces):
            self._complete(document.id)
        self.wake()

    def _taken_in(self, row: FileRow, data: bytes) -> Document | None:
        """A file's document, noted as such; None where the file was deleted while its text was taken out."""
        with self._adds():
            while True:
                document = self.library.add_bytes(data, row.filename)
                with self._lock:
                    if self.records.file(row.id) is None:
                        self._drop_unused(document.id)
                        return None
                    # another file of the same content may have been deleted just now, and the document with it
                    if document.id in self.library.index.document_numbers():
                        self.records.note_file(row.id, document=document.id)
                        for store in self.records.stores_of(row.id):
                            self.library.index.add_to_collection(store.name, [document.id])
                        return document

    def _done(self, file_id: str) -> None:
        with contextlib.suppress(LibraryError):  # a disk that is full: it is looked at again at the next start
            self.records.note_file(file_id, read_with=self._read_with)
        with self._lock:
            if file_id in self._progress:
                self._progress[file_id].state = "ready"

    def _complete(self, number: int) -> None:
        """See, when there is nothing else to do, what lies beside the chunks of a document that were kept before."""
        with self._lock:
            self._to_complete[number] = None
        self.wake()

    #
    # the model's thread
    #

    def pending(self) -> bool:
        return bool(self._to_read or self._to_complete or self._completing is not None)

    def step(self, engine: Engine) -> None:
        """Read one chunk of the file that was uploaded first; where all are read, look at what lies beside one that is kept."""
        shelf = self.require()
        if not self._to_read:
            self._complete_one(shelf)
            return
        with self._lock:
            if not self._to_read:
                return
            file_id, unread = next(iter(self._to_read.items()))
            piece = unread.pieces[0]
            self.forget_gone(shelf)
        begin = time.perf_counter()
        try:
            n_computed, notes = shelf.read([piece], ahead=unread.keys)
        except Stopped:
            raise
        except Exception as err:
            if not isinstance(err, MesaError):
                log.exception("a chunk cannot be read")
            n_computed, notes = 0, [str(err) if isinstance(err, MesaError) else "a chunk cannot be read"]
        seconds = time.perf_counter() - begin
        shelf.release()
        engine.metrics.computed.labels("document").inc(n_computed)
        with self._lock:
            if n_computed:
                now = n_computed / max(seconds, 1e-9)
                self._speed = now if self._speed is None else self._speed + 0.2 * (now - self._speed)
            progress = self._progress.get(file_id)
            now_unread = self._to_read.get(file_id)
            if progress is None or now_unread is None:
                return  # it was deleted meanwhile
            left = now_unread.pieces
            left.pop(0)
            if notes:  # what cannot be kept need not be read ahead
                progress.notes += [note for note in notes if note not in progress.notes]
                left.clear()
            else:
                progress.tokens_read += len(piece.tokens)
            if not left:
                del self._to_read[file_id]
                if notes:
                    progress.state = "ready"
        if not left and not notes:
            self._done(file_id)
        engine.metrics.documents.set(len(self._to_read))

    def _complete_one(self, shelf: Shelf) -> None:
        """Make what the embedding model says of one chunk that is kept, where that is lacking."""
        if shelf.catalogue.embeddings is None:
            self._to_complete.clear()
            return
        try:
            if self._completing is None:
                with self._lock:
                    if not self._to_complete:
                        return
                    number, _ = self._to_complete.popitem(last=False)
                document = self._document(number)
                self._completing = shelf.catalogue.kept_pieces(document) if document is not None else None
                return
            piece = next(self._completing, None)
            if piece is None:
                self._completing = None
            elif not shelf.complete(piece):  # there is no room for any
                self._completing = None
                self._to_complete.clear()
        except MesaError:  # it was removed, or is damaged: whoever asks is told
            self._completing = None

    def forget_gone(self, shelf: Shelf) -> None:
        """What the model's thread remembers of documents that were removed."""
        while self._gone:
            shelf.catalogue.forget(self._gone.pop())

    #
    # as JSON
    #

    def described(self, row: FileRow) -> dict[str, Any]:
        """A file as OpenAI has it, and what more there is to say."""
        progress = self.progress(row.id)
        kind = title = characters = None
        notes = list(progress.notes)
        state = "error" if row.error is not None else progress.state
        if row.document is not None and row.error is None:
            with contextlib.suppress(Problem):
                document = self.document(row)
                kind, title, characters = document.kind, document.title, document.n_chars
                notes = [*document.notes, *notes]
        status = "error" if state == "error" else "processed" if state == "ready" else "uploaded"
        reason = row.error or (progress.notes[0] if state == "error" and progress.notes else None)
        return {
            "id": row.id, "object": "file", "filename": row.filename, "bytes": row.bytes, "created_at": int(row.created),
            "purpose": row.purpose, "status": status, "status_details": reason,
            "mesa": {
                "state": state, "kind": kind, "title": title, "characters": characters, "notes": notes, "chunks": progress.chunks,
                "tokens": progress.tokens, "tokens_read": progress.tokens_read, "seconds_left": self.seconds_left(row.id),
                "has_content": row.has_content, "collections": [store.name for store in self.records.stores_of(row.id)],
            },
        }  # fmt: skip

    def text(self, row: FileRow, start: int, stop: int | None) -> dict[str, Any]:
        """Characters of a document's text, with its places."""
        if row.document is None:
            raise Problem(
                409 if row.error is None else 400, row.error or f"{row.filename} is not loaded yet", "not_loaded"
            )
        found = self.library.index.document(row.document)
        if found is None:
            raise Problem(404, f"{row.filename} is not in the library any more", "not_found")
        n = len(found.text)
        start = min(start, n)
        end = min(n if stop is None else max(stop, start), start + MAX_TEXT, n)
        places = [(at, page, heading) for at, page, heading in found.places if at < max(end, start + 1)]
        first = max((i for i, (at, _, _) in enumerate(places) if at <= start), default=0)
        return {
            "file_id": row.id, "filename": row.filename, "kind": found.kind, "start": start, "stop": end, "characters": n,
            "text": found.text[start:end],
            "places": [{"start": at, "page": page, "heading": heading} for at, page, heading in places[first:]],
        }  # fmt: skip

    def store_described(self, store: StoreRow) -> dict[str, Any]:
        counts = {"in_progress": 0, "completed": 0, "failed": 0, "cancelled": 0}
        for row, _ in self.records.members(store):
            counts[_status_in_store(row)] += 1
        return {
            "id": store.id, "object": "vector_store", "name": store.name, "created_at": int(store.created), "status": "completed",
            "usage_bytes": sum(row.bytes for row, _ in self.records.members(store)), "metadata": {}, "last_active_at": None,
            "file_counts": {**counts, "total": sum(counts.values())},
        }  # fmt: skip

    @staticmethod
    def member_described(store: StoreRow, row: FileRow, created: float) -> dict[str, Any]:
        error = None if row.error is None else {"code": "unsupported_file", "message": row.error}
        return {
            "id": row.id, "object": "vector_store.file", "vector_store_id": store.id, "created_at": int(created),
            "status": _status_in_store(row), "usage_bytes": row.bytes, "last_error": error,
        }  # fmt: skip


def _status_in_store(row: FileRow) -> Literal["failed", "completed", "in_progress"]:
    return "failed" if row.error is not None else "completed" if row.document is not None else "in_progress"
