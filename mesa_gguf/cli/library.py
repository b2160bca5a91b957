"""``mesa-gguf library``: the documents that are kept."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MesaError, PromptError
from ..library.budget import UNLIMITED
from ..library.library import Document, Library, check_name
from ..library.renewal import is_there
from ..library.store import EMBEDDINGS, LibraryError
from ..loaders.document import printable
from ..loaders.folder import is_library
from ..model.hub import find_model
from ..paths import expanded
from ..reading.text import source_name
from ..text import counted
from . import output
from .options import (
    CollectionOption,
    EmbeddingModelOption,
    EmbeddingPassage,
    EmbeddingQuery,
    Encoding,
    JsonOption,
    LibraryOption,
    Plain,
    Threads,
    TypeK,
    TypeV,
    bytes_of,
    kv_type_of,
    open_embedding,
    option,
)

if TYPE_CHECKING:
    from ..library.index import KeptRow
    from ..library.library import Report
    from ..reading.embeddings import EmbeddingModel
    from ..reading.shelf import Shelf

library_app = typer.Typer(
    help="Show and look after the documents that are kept, and what models have read of them.",
    epilog="""\
Examples:\n
  mesa-gguf library add report.pdf papers/ -m model.gguf --collection work\n
  mesa-gguf library list\n
  mesa-gguf library remove --collection work\n
  mesa-gguf library budget 20GB\n
  mesa-gguf library prune --budget 2GB
""",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Names = Annotated[list[str], typer.Argument(metavar="FILE...", help="Files or folders to add.")]
DocumentName = Annotated[str, typer.Argument(metavar="DOCUMENT", help="The number or the name of a document.")]
Budget = Annotated[
    str | None,
    option(
        "--budget",
        metavar="SIZE",
        help="What kept chunks may take now: bytes, or a size such as 500MB or 2GiB. Default: the library's own budget.",
    ),
]


@library_app.command("add")
def add(
    files: Names,
    model: Annotated[
        str | None,
        option("-m", "--model", metavar="MODEL", help="Read the documents with this model now, ahead of any question."),
    ] = None,
    collection: CollectionOption = None,
    encoding: Encoding = None,
    plain: Plain = False,
    type_k: TypeK = "f16",
    type_v: TypeV = "f16",
    threads: Threads = None,
    embedding_model: EmbeddingModelOption = None,
    embedding_query: EmbeddingQuery = None,
    embedding_passage: EmbeddingPassage = None,
    library: LibraryOption = None,
) -> None:
    """Add documents, and with --model read them ahead of time, and embed them. A reading that was interrupted goes on where it stopped."""
    from ..model.header import check_model

    path = None if model is None else find_model(model)
    if path is not None:
        check_model(path)  # before work is spent
    elif any(value is not None for value in (embedding_model, embedding_query, embedding_passage)):
        raise PromptError(
            "the chunks that --embedding-model embeds are those of the model that answers: name that one with -m"
        )
    kv_types = kv_type_of(type_k), kv_type_of(type_v)
    prefixes = embedding_query, embedding_passage
    with (
        contextlib.nullcontext()
        if path is None
        else open_embedding(embedding_model, *prefixes, threads=threads) as embedding,
        open_library(library, writes=True) as opened,
    ):
        found, n_failed = add_files(opened, files, collection, encoding)
        for document in found:
            output.write(f"{document.id}  {document.name}  {document.kind}, {document.n_chars} characters\n")
            say_notes(document)
        if path is not None and found:
            _read(opened, found, path, plain, kv_types, threads, embedding)
    if n_failed:
        raise typer.Exit(output.EXIT_USER_ERROR)


def _read(
    library: Library,
    documents: list[Document],
    path: Path,
    plain: bool,
    kv_types: tuple[int, int],
    threads: int | None,
    embedding: EmbeddingModel | None,
) -> None:
    from ..reading.prompts import PromptForm
    from ..reading.reader import context_for, load_model, load_vocabulary
    from ..reading.shelf import Catalogue, Shelf

    form = PromptForm(load_vocabulary(path), plain=plain)
    catalogue = Catalogue(form.vocabulary, form, library, embedding)
    n_ctx = context_for(len(catalogue.preamble) + catalogue.chunk_tokens, 8)
    type_k, type_v = kv_types
    llm = load_model(path, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, type_k=type_k, type_v=type_v)
    with contextlib.closing(llm), kept_if_interrupted(": the same command goes on where it stopped"):
        read_ahead(Shelf(llm, catalogue), documents)


def read_ahead(
    shelf: Shelf, documents: Sequence[Document], *, bar: bool = True, check: Callable[[], None] | None = None
) -> None:
    """Read documents now, and tell what it takes and what was done.

    Args:
        check: called after each chunk; what it raises ends the reading there.
    """
    from ..model.inspection import format_bytes

    catalogue, library = shelf.catalogue, shelf.library
    pieces = {d.id: [catalogue.piece(d, row) for row in catalogue.rows(d)] for d in documents}
    every = [piece for own in pieces.values() for piece in own]

    # of each document, by the names of its chunks: the same text is kept once
    lengths = {number: {shelf.key(piece): len(piece.tokens) for piece in own} for number, own in pieces.items()}

    def kept(own: dict[str, int]) -> int:
        return sum(n for key, n in own.items() if key in library.store)

    n_tokens = sum(len(piece.tokens) for piece in every)
    n_before = {number: kept(own) for number, own in lengths.items()}
    n_different = sum({key: n for own in lengths.values() for key, n in own.items()}.values())
    size = shelf.llm.chunk_size(1000) * n_different // 1000
    texts = {piece.text for piece in every}
    n_embedded = catalogue.embeddings.n_kept(texts) if catalogue.embeddings is not None else 0
    output.say(
        f"{counted(n_tokens, 'token')} in {counted(len(every), 'chunk')}, "
        f"about {format_bytes(size)} on disk; the budget is {_said_budget(library)}"
    )
    with output.reading_bar(bar) as moved:

        def progress(n_done: int, n_all: int) -> None:
            if moved is not None:
                moved(n_done, n_all)
            if check is not None:
                check()

        _, notes = shelf.read(every, progress, ahead=())
    for document in documents:
        own = lengths[document.id]
        before, now, n_all = n_before[document.id], kept(own), sum(own.values())
        line = f"{document.name}: {counted(len(pieces[document.id]), 'chunk')}, {counted(now - before, 'token')} computed, {before} kept before"
        output.write(f"{line}, {n_all - now} not read\n" if now < n_all else f"{line}\n")
    if catalogue.embeddings is not None:
        n_now = catalogue.embeddings.n_kept(texts) - n_embedded
        name = catalogue.embeddings.model.path.name
        output.write(f"{name}: {counted(n_now, 'chunk')} embedded, {n_embedded} kept before\n")
    for note in notes:
        output.say(f"mesa-gguf: {note}")


@library_app.command("list")
def list_(collection: CollectionOption = None, as_json: JsonOption = False, library: LibraryOption = None) -> None:
    """List the documents, the collections, and the bytes that are kept of each model."""

    with open_library(library, begins=False) as opened:
        documents = opened.documents(collection)
        kept: dict[str, list[KeptRow]] = {}
        for row in opened.index.kept():
            kept.setdefault(row.model, []).append(row)
        names = _model_names(opened)
        names[""] = "a model that is not known"  # of an index that was lost
        models: list[dict[str, Any]] = [
            {
                "model": names.get(model.partition(":")[0], model[:12]),
                "chunks": sum(row.n_tokens > 0 for row in rows),
                "embedded": len(rows) if model.partition(":")[2] == EMBEDDINGS else 0,
                "bytes": sum(row.size for row in rows),
            }
            for model, rows in kept.items()
        ]
        cuts = opened.index.cuts()
        shown = [
            {
                **asdict(document),
                "collections": opened.index.collections_of(document.id),
                "cuts": [
                    {
                        "model": names.get(cut.partition(":")[0], cut.partition(":")[0][:12]),
                        "chunks": n_chunks,
                        "tokens": n_tokens,
                    }
                    for cut, n_chunks, n_tokens in cuts.get(document.id, [])
                ],
            }
            for document in documents
        ]
        if as_json:
            collections = [{"name": name, "documents": n} for name, n in opened.index.collections()]
            output.write_json(
                {"documents": shown, "collections": collections, "models": models, "budget": _limit_of(opened)}
            )
            return
        if not shown:
            output.write("no documents: mesa-gguf library add FILE adds one\n")
        n_called = Counter(about["name"] for about in shown)
        for about in shown:
            line = f"{about['id']}  {about['name']}  {about['kind']}, {about['n_chars']} characters"
            if n_called[about["name"]] > 1 and about["source"]:
                line += f", {about['source']}"
            if about["collections"]:
                line += f", in {', '.join(about['collections'])}"
            output.write(f"{line}\n")
            for cut in about["cuts"]:
                said = f"{counted(cut['chunks'], 'chunk')} of {counted(cut['tokens'], 'token')}"
                output.write(f"    {said} for {cut['model']}\n")
        for name, n in opened.index.collections():
            output.write(f"collection {name}: {counted(n, 'document')}\n")
        for about in models:
            n, what = (about["embedded"], "embedded") if about["embedded"] else (about["chunks"], "kept")
            output.write(f"{about['model']}: {_kept(n, about['bytes'], what)}\n")
        output.write(f"budget: {_said_budget(opened)} in {opened.folder}\n")


def _model_names(library: Library) -> dict[str, str]:
    """The names of models, by fingerprint; it stands behind those that several have, as where a file was replaced."""
    names = {model.partition(":")[0]: name for model, name in library.index.model_names().items()}
    n_called = Counter(names.values())
    return {model: f"{name} ({model[:12]})" if n_called[name] > 1 else name for model, name in names.items()}


@library_app.command("show")
def show(document: DocumentName, as_json: JsonOption = False, library: LibraryOption = None) -> None:
    """Print the text of a document as it was loaded."""
    with open_library(library, begins=False) as opened:
        found = _find(opened, document)
        text = opened.text(found)
        if as_json:
            output.write_json({**asdict(found), "text": text})
        else:
            output.write(text if text.endswith("\n") else f"{text}\n")


@library_app.command("remove")
def remove(
    documents: Annotated[
        list[str] | None, typer.Argument(metavar="DOCUMENT...", help="Numbers or names of documents.")
    ] = None,
    collection: Annotated[
        str | None,
        option(
            "--collection",
            metavar="NAME",
            help="Forget this collection, and keep its documents; with documents, take those out of it.",
        ),
    ] = None,
    library: LibraryOption = None,
) -> None:
    """Forget documents, or a collection. Chunks stay until their place is needed, or prune is called."""
    with open_library(library, writes=True, begins=False) as opened:
        each = {found.id: found for found in (_find(opened, name) for name in documents or ())}
        found = list(each.values())
        if collection is None:
            if not found:
                raise PromptError("nothing to remove: name documents, or a collection with --collection")
            for document in found:
                opened.remove(document)
                output.write(f"removed {document.name}\n")
        elif found:
            for document in found:
                opened.take_out(document, collection)
                output.write(f"{document.name} is not in {collection} any more\n")
        else:
            opened.remove_collection(collection)
            output.write(f"removed the collection {collection}; its documents stay\n")


@library_app.command("verify")
def verify(as_json: JsonOption = False, library: LibraryOption = None) -> None:
    """Compare every kept chunk with its checksum. What is damaged is removed, and read again when it is needed."""
    with open_library(library, begins=False) as opened:
        _report(opened.verify(), as_json, _SAID if opened.read_only is None else _SAID | _SAID_READ_ONLY)


@library_app.command("prune")
def prune(budget: Budget = None, as_json: JsonOption = False, library: LibraryOption = None) -> None:
    """Remove the chunks that were not used for longest, until what is kept fits into a budget."""
    n_bytes = None if budget is None else bytes_of("--budget", budget)
    with open_library(library, writes=True, begins=False) as opened:
        _report(opened.prune(n_bytes), as_json, _SAID)


@library_app.command("budget")
def budget(
    size: Annotated[
        str | None,
        typer.Argument(
            metavar="SIZE",
            help="Bytes, or a size such as 20GB or 2GiB; unlimited or none: no limit; default: a fifth of the free disk.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    library: LibraryOption = None,
) -> None:
    """Say what kept chunks may take, or set it with a size, for this library from now on."""
    from ..model.inspection import format_bytes

    word = (size or "").strip().lower()
    limit = None if size is None else _SIZES[word] if word in _SIZES else bytes_of("budget", word)
    with open_library(library, writes=size is not None, begins=size is not None) as opened:
        if size is not None:
            opened.set_budget(limit)
        n_kept = opened.index.kept_bytes()
        if as_json:
            output.write_json({"budget": _limit_of(opened), "is_set": opened.has_own_budget, "bytes": n_kept})
            return
        whence = "set" if opened.has_own_budget else "a fifth of the free disk"
        said = f"budget: {_said_budget(opened)} ({whence}) in {opened.folder}; {format_bytes(n_kept)} are kept\n"
        output.write(said)
        if n_kept > opened.budget:
            output.say(
                "more is kept than that: what was not used for longest goes when more is read, or by mesa-gguf library prune"
            )


_SIZES = {"unlimited": UNLIMITED, "none": UNLIMITED, "default": None}


def _limit_of(library: Library) -> int | None:
    """A library's budget as JSON has it; None: there is no limit."""
    return library.budget if library.budget < UNLIMITED else None


def _said_budget(library: Library) -> str:
    from ..model.inspection import format_bytes

    limit = _limit_of(library)
    return "unlimited" if limit is None else format_bytes(limit)


# what is said of the files that `Report` names: a chunk may have another one beside it
_SAID = {
    "damaged": "removed as damaged",
    "missing": "gone from the disk",
    "unknown": "added to the index",
    "dropped": "removed to keep to the budget",
}


_SAID_READ_ONLY = {"damaged": "damaged", "unknown": "not in the index"}


def _kept(n_chunks: int, n_bytes: int, what: str = "kept") -> str:
    from ..model.inspection import format_bytes

    return f"{counted(n_chunks, 'chunk')} {'is' if n_chunks == 1 else 'are'} {what}, {format_bytes(n_bytes)}"


def _report(report: Report, as_json: bool, words: Mapping[str, str]) -> None:
    if as_json:
        output.write_json(asdict(report))
        return
    parts = [_kept(report.n_chunks, report.n_bytes)]
    for name, said in words.items():
        if keys := getattr(report, name):
            parts.append(f"{counted(len(keys), 'file')} {said}")
    output.write("; ".join(parts) + "\n")
    for name in report.documents:
        output.write(f"{name} is damaged in the index: add its file again\n")


def add_file(library: Library, file: str, collection: str | None, encoding: str | None) -> list[Document]:
    """Add a file, or what can be read in a folder; what cannot is told."""
    if not file:  # Path("") is the current folder
        raise PromptError("a file's name is empty: give the file or the folder, or . for the current folder")
    if not expanded(file).is_dir():
        return [library.add(file, collection=collection, encoding=encoding)]
    documents, notes = library.add_folder(file, collection=collection)
    for note in notes:
        output.say(f"mesa-gguf: {note}")
    return documents


def add_files(
    library: Library, files: Sequence[str], collection: str | None, encoding: str | None
) -> tuple[list[Document], int]:
    """Add what can be added, each document once, and tell of the rest; how many files and folders it is.

    Raises:
        PromptError, LibraryError: nothing can be.
    """
    if collection is not None:
        check_name(collection, "a collection's name")
    found: dict[int, Document] = {}
    n_failed = 0
    for file in files:
        try:
            documents = add_file(library, file, collection, encoding)
        except LibraryError:
            raise
        except MesaError as err:
            n_failed += 1
            output.say_error(err)
            continue
        if not documents:
            n_failed += 1
            output.say(f"mesa-gguf: {source_name(file)}: there is no document in this folder that can be read")
        found |= {document.id: document for document in documents}
    return list(found.values()), n_failed


def say_notes(document: Document) -> None:
    """Tell what was noticed when a document was loaded."""
    for note in document.notes:
        output.say(f"mesa-gguf: {document.name}: {note}")


@contextlib.contextmanager
def kept_if_interrupted(then: str = "") -> Iterator[None]:
    """Where Ctrl-C ends a reading, what is left of it is told, and what that means for the same command."""
    try:
        yield
    except KeyboardInterrupt:
        output.say(f"the chunks that were read are kept{then}")
        raise


@contextlib.contextmanager
def open_library(folder: str | None, *, writes: bool = False, begins: bool = True) -> Iterator[Library]:
    """The library in a folder; what had to be mended is told, when it is opened or where it comes to light, and that nothing is kept.

    Args:
        writes: it must be possible to write to it.
        begins: a folder that is named, and has no library yet, gets one.
    """
    if folder and not begins and not _has_library(expanded(folder)):
        raise LibraryError(
            f"{folder}: there is no library there: mesa-gguf library add FILE --library {folder} begins one"
        )
    with Library(folder) as opened:
        if writes:
            opened.check_writable()
        elif opened.read_only is not None:
            output.say(f"mesa-gguf: {opened.read_only}")
        if opened.mended is not None:
            output.say_once(f"mesa-gguf: {opened.mended}")
        try:
            yield opened
        finally:
            if opened.mended is not None:
                output.say_once(f"mesa-gguf: {opened.mended}")


def _has_library(folder: Path) -> bool:
    try:
        return folder.is_file() or is_library(folder) or is_there(folder / "index.sqlite3")
    except OSError:  # which is told where it is opened
        return True


def _find(library: Library, name: str) -> Document:
    documents = library.documents()
    called = printable(name)  # as names are kept
    found = [d for d in documents if name == str(d.id)] or [d for d in documents if d.name in (name, called)]
    if not found:
        raise PromptError(f"there is no document {called} in the library: mesa-gguf library list shows them")
    if len(found) > 1:
        numbers = ", ".join(str(d.id) for d in found)
        raise PromptError(f"several documents are called {name}: give one of the numbers {numbers}")
    return found[0]
