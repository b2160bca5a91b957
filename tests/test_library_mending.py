"""Indexes that are lost or damaged: a new one has what was whole, and the chunks that are kept; one line says so."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mesa_gguf import MesaLlama, PromptError, Reader, cli
from mesa_gguf.lab.documents import make_document
from mesa_gguf.library import index as indexing
from mesa_gguf.library import renewal, schema
from mesa_gguf.library.library import Document, Library
from mesa_gguf.library.store import HEADER, LibraryError
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.shelf import Catalogue

MADE = make_document(4712, 1500, n_facts=4)
FACT = MADE.facts[1]
KEY = "ab" * 32


@pytest.fixture(scope="module")
def filled(llm: MesaLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that has read a document, and has two more."""
    folder = tmp_path_factory.mktemp("filled")
    (folder / "log.txt").write_text(MADE.text, encoding="utf-8")
    with Library(folder / "library", budget=10**9) as library:
        document = library.add(folder / "log.txt", collection="work")
        for name in ("one", "two"):
            library.add_text(f"Nothing to see here, in {name}.", name)
        Reader(llm, library).ask(FACT.question, documents=[document], read="all", max_tokens=1).answer  # noqa: B018
    return folder


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(filled / "library", tmp_path / "library")
    return tmp_path / "library"


def opened(folder: Path) -> Library:
    return Library(folder, budget=10**9)


def chunk_files(folder: Path) -> set[str]:
    return {path.name.removesuffix(".chunk") for path in folder.glob("chunks/??/*.chunk")}


def n_chunks(folder: Path) -> int:
    """Of those files, without the ones beside chunks."""
    with opened(folder) as library:
        return sum(row.n_tokens > 0 for row in library.index.kept())


def remove(folder: Path) -> None:
    for path in folder.glob("index.sqlite3*"):
        path.unlink()


def empty(folder: Path) -> None:
    remove(folder)
    (folder / "index.sqlite3").touch()


def cut(folder: Path) -> None:
    os.truncate(folder / "index.sqlite3", 60)


def overwrite(folder: Path) -> None:
    (folder / "index.sqlite3").write_bytes(b"hello" * 1000)


@pytest.mark.parametrize(
    ("lose", "said"),
    [
        (remove, "there was no index beside kept chunks: a new one was begun"),
        (empty, r"the index was damaged \(it has 0 bytes\): a new one was begun"),
        (cut, r"the index was damaged \(it has 60 bytes\): it is now index.sqlite3.damaged-\S+, and a new one"),
        (overwrite, r"the index was damaged \(file is not a database\): it is now index.sqlite3.damaged-"),
    ],
)
def test_kept_chunks_outlive_the_index(
    llm: MesaLlama, folder: Path, filled: Path, lose: Callable[[Path], None], said: str
) -> None:
    chunks, n_kept = chunk_files(folder), n_chunks(folder)
    assert 0 < n_kept < len(chunks)
    lose(folder)
    with opened(folder) as library:
        assert library.mended is not None and library.mended.count("\n") == 0
        assert re.search(said, library.mended), library.mended
        assert library.mended.endswith(f"with {n_kept} kept chunks; add the documents again")
        assert {row.key for row in library.index.kept()} == chunks == chunk_files(folder)
        assert library.index.kept_bytes() == sum(path.stat().st_size for path in folder.glob("chunks/??/*.chunk"))
        for report in (library.verify(), library.prune()):
            assert report.n_chunks == n_kept and not (report.unknown or report.damaged or report.missing)
        document = library.add(filled / "log.txt")
        answer = Reader(llm, library).ask(FACT.question, documents=[document], read="all", max_tokens=1).answer
        assert answer.read is not None and answer.read.tokens_computed == 0
        assert all(row.model for row in library.index.kept())  # whose they are is known again
        assert library.prune(0).dropped and not chunk_files(folder)
    with opened(folder) as library:
        assert library.mended is None


def test_a_new_library_says_nothing(tmp_path: Path) -> None:
    with Library(tmp_path / "library") as library:
        assert library.mended is None and library.documents() == []
    assert stat.S_IMODE((tmp_path / "library").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "library" / "index.sqlite3").stat().st_mode) == 0o600


@pytest.mark.parametrize("look", ["verify", "prune", "ask", "add"])
def test_chunks_that_the_index_lost_sight_of(llm: MesaLlama, folder: Path, look: str) -> None:
    """As where a process is killed between the file and its row."""
    chunks, n_kept = chunk_files(folder), n_chunks(folder)
    with opened(folder) as library:
        library.index._db.execute("DELETE FROM kept")
        if look in ("verify", "prune"):
            report = getattr(library, look)()
            assert set(report.unknown) == chunks and report.n_chunks == n_kept
        else:
            (document,) = [d for d in library.documents() if d.name == "log.txt"]
            reader = Reader(llm, library)
            assert reader.shelf is not None
            if look == "ask":
                reader.ask(FACT.question, documents=[document], read="all", max_tokens=1).answer  # noqa: B018
            else:
                catalogue = reader.shelf.catalogue
                pieces = [catalogue.piece(document, row) for row in catalogue.rows(document)]
                assert reader.shelf.read(pieces) == (0, [])
                chunks &= {reader.shelf.key(piece) for piece in pieces}
        assert {row.key for row in library.index.kept()} == chunks <= chunk_files(folder)
        assert library.index.kept_bytes() > 0


def test_what_the_index_has_wrong_is_set_right(folder: Path) -> None:
    with opened(folder) as library:
        size = library.index.kept_bytes()
        library.index._db.execute("UPDATE kept SET size = 1 << 50")
        report = library.prune()
        assert library.index.kept_bytes() == size and report.dropped == []


@pytest.mark.parametrize("damage", ["cut", "magic", "length", "tokens", "many tokens", "folder"])
def test_files_that_are_no_chunks_are_not_noted(folder: Path, damage: str) -> None:
    path = sorted(folder.glob("chunks/??/*.chunk"))[0]
    data = bytearray(path.read_bytes())
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "cut":
        path.write_bytes(data[: HEADER.size - 3])
    else:
        at, bits = {"magic": (0, 1), "length": (56, 1), "tokens": (48, 1), "many tokens": (51, 128)}[damage]
        data[at] ^= bits
        path.write_bytes(data)
    if damage != "tokens":  # its header may be right, for all that one knows without the index
        remove(folder)
    with opened(folder) as library:
        report = library.verify()
        assert path.name.removesuffix(".chunk") in report.damaged and not path.exists()
        assert {row.key for row in library.index.kept()} == chunk_files(folder)


def test_documents_that_can_be_read_are_told_and_the_others_named(folder: Path) -> None:
    n_kept = n_chunks(folder)
    with opened(folder) as library:
        library.index._db.execute("UPDATE documents SET text = 'x' WHERE name = 'two'")
        library.index._db.execute("DROP TABLE spans")
    with opened(folder) as library:
        assert library.mended is not None
        assert library.mended.endswith(
            f"with the 2 documents that could be read and {n_kept} kept chunks; add again what could not: two"
        )
        assert [d.name for d in library.documents("work")] == ["log.txt"]
        assert sorted(d.name for d in library.documents()) == ["log.txt", "one"]
        assert all(row.model and row.used for row in library.index.kept())
        assert library.add_text("Something.", "three").id == 4  # no number comes twice


def test_damaged_names_are_shown_in_one_line(folder: Path) -> None:
    with opened(folder) as library:
        library.index._db.execute("UPDATE documents SET name = 't' || char(10, 27) || 'wo' WHERE name = 'two'")
        assert library.verify().documents == [r"t\n\x1bwo"]
        with pytest.raises(LibraryError, match=r"document \d+ \(t\\n\\x1bwo\) is damaged"):
            library.text(next(document for document in library.documents() if document.name == r"t\n\x1bwo"))
        library.index._db.execute("DROP TABLE spans")
    with opened(folder) as library:
        assert library.mended is not None and library.mended.endswith(r"; add again what could not: t\n\x1bwo")


@pytest.mark.parametrize("lose", [remove, overwrite])
def test_numbers_of_documents_that_are_lost_mean_nothing_else(folder: Path, lose: Callable[[Path], None]) -> None:
    with opened(folder) as library:
        before = {document.id for document in library.documents()}
    lose(folder)
    with opened(folder) as library:
        assert library.add_text("Something else.", "other").id not in before


#
# damage that comes to light later
#


def wreck(folder: Path, table: str) -> None:
    """Fill the root page of a table with what is no page, which nobody sees who does not look there."""
    path = folder / "index.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\x11" * size)


def add(library: Library, filled: Path) -> Document:
    return library.add(filled / "log.txt", encoding="utf-8")  # loaded again


USES: dict[str, Callable[[Library, Path], object]] = {
    "documents": lambda library, filled: library.documents(),
    "members": lambda library, filled: library.documents("work"),
    "collections": lambda library, filled: library.index.collections(),
    "spans": add,
    "words_data": add,
    "cuts": add,
    "kept": lambda library, filled: library.keep(KEY, "m", 3, b"rows"),
    "preambles": lambda library, filled: library.index.preamble("m", "name", [1]),
}


@pytest.mark.parametrize("table", USES)
def test_an_index_that_is_damaged_while_it_is_open(folder: Path, filled: Path, table: str) -> None:
    """It is mended, and goes on; what was asked for is done."""
    library = opened(folder)
    library.index._db.execute("PRAGMA cache_size = 0")
    wreck(folder, table)
    USES[table](library, filled)
    if library.mended is None:  # what is in memory answers still
        library.verify()
    assert library.mended is not None and "the index was damaged" in library.mended
    if table != "documents":
        assert sorted(document.name for document in library.documents()) == ["log.txt", "one", "two"]
    library.close()
    with opened(folder) as library:
        assert library.mended is None and library.verify().damaged == []


VALUES = ("NULL", "x'ff00'", "'words'", "9223372036854775807", "-1", "1e300", "''")
COLUMNS = [
    (table, column)
    for table, columns in (
        ("documents", "name source digest kind title text places notes added seal"),
        ("spans", "document vocabulary ordinal start stop n_tokens heading page_first page_last"),
        ("cuts", "document vocabulary seal"),
        ("collections", "name added seal"),
        ("members", "collection document"),
        ("kept", "key model n_tokens size used"),
        ("preambles", "model name tokens seal"),
    )
    for column in columns.split()
]


QUICK = [("kept", "key"), ("kept", "size"), ("spans", "n_tokens"), ("collections", "name")]


@pytest.mark.parametrize(
    ("table", "column", "values"),
    [
        *((*column, VALUES[:2]) for column in QUICK),
        *(pytest.param(*column, VALUES, marks=pytest.mark.slow) for column in COLUMNS),
    ],
    ids=str,
)
def test_values_that_make_no_sense(
    llm: MesaLlama,
    folder: Path,
    filled: Path,
    capsys: pytest.CaptureFixture[str],
    table: str,
    column: str,
    values: Sequence[str],
) -> None:
    """Bytes that are others may make a number of a text. What is shown is shown, what is asked is answered, or an error says why."""
    for value in values:
        with contextlib.closing(sqlite3.connect(folder / "index.sqlite3", isolation_level=None)) as db:
            rows = db.execute(f"SELECT max(rowid) FROM {table}").fetchone()
            with contextlib.suppress(sqlite3.IntegrityError):
                db.execute("PRAGMA ignore_check_constraints = ON")
                db.execute(f"UPDATE {table} SET {column} = {value} WHERE rowid = ?", rows)
        for command in (["list"], ["list", "--json"], ["list", "--collection", "work"], ["show", "log.txt"]):
            assert cli.main(["library", *command, "--library", str(folder)]) in (0, 2)
            assert capsys.readouterr().err.count("\n") <= 2
        with opened(folder) as library:
            reader = Reader(llm, library, cite_by="words")
            acts: tuple[Callable[[], object], ...] = (
                lambda reader=reader: reader.ask(FACT.question, read=300, max_tokens=1).answer,  # type: ignore[misc]
                library.verify,
                library.prune,
                lambda library=library: library.documents("work"),  # type: ignore[misc]
                lambda library=library: library.add(filled / "log.txt", collection="work", encoding="utf-8"),  # type: ignore[misc]
                lambda library=library: library.keep(KEY, "m", 3, b"rows"),  # type: ignore[misc]
            )
            for act in acts:
                said = ""
                try:
                    act()
                except (LibraryError, PromptError) as err:
                    said = str(err)
                assert "\n" not in said
            assert {row.key for row in library.index.kept()} == chunk_files(folder)


def test_the_advice_is_one(folder: Path, filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """verify and ask agree on a document whose bytes in the index are others: its file is to be added, and that helps."""
    path = folder / "index.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = path.read_bytes()
    assert MADE.text[100:140].encode() in data
    path.write_bytes(data.replace(MADE.text[100:140].encode(), b"\x00\xff" * 20))

    def run(*arguments: str) -> str:
        capsys.readouterr()
        run.code = cli.main([*arguments, "--library", str(folder)])  # type: ignore[attr-defined]
        return "".join(capsys.readouterr())

    said = run("library", "verify")
    assert "log.txt is damaged in the index: add its file again" in said
    said = run("ask", "--collection", "work", FACT.question, "--threads", "1")
    assert "(log.txt) is damaged in the library's index: add its file again" in said and run.code == 2  # type: ignore[attr-defined]
    said = run("ask", "-f", str(filled / "log.txt"), FACT.question, "--threads", "1")
    assert FACT.answer in said and run.code == 0  # type: ignore[attr-defined]
    assert "damaged" not in run("library", "verify")


#
# killed, and two at once
#


@pytest.mark.parametrize("place", ["make", "aside", "moved"])
def test_killed_while_an_index_is_mended(folder: Path, place: str) -> None:
    """The next process finds what was whole, whenever it happens."""
    with opened(folder) as library:
        library.index._db.execute("DROP TABLE spans")
    program = f"""
import os, sys
from types import SimpleNamespace
from mesa_gguf.library import renewal, schema
from mesa_gguf.library.library import Library
die = lambda *_: os._exit(9)
if {place!r} == "make":
    renewal.seal_collection = die
elif {place!r} == "aside":
    renewal._set_aside = die
else:
    renewal.os = SimpleNamespace(name=os.name, replace=die)
Library(sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", program, str(folder)], check=False, timeout=60)
    assert done.returncode == 9
    assert (folder / "index.sqlite3").exists() == (place != "moved")
    with opened(folder) as library:
        assert library.mended is not None and "damaged" in library.mended
        assert sorted(document.name for document in library.documents()) == ["log.txt", "one", "two"]
        assert {row.key for row in library.index.kept()} == chunk_files(folder)
    assert not list(folder.glob("*.new*"))


def _open_and_add(folder: str, number: int, ready: object) -> None:
    ready.wait(60)  # type: ignore[attr-defined]
    with Library(folder, budget=10**9) as library:
        library.add_text(f"By process {number}.", f"by {number}")


@pytest.mark.parametrize("lose", [pytest.param("damage", marks=pytest.mark.slow), "remove"])
def test_several_processes_find_it_damaged(folder: Path, lose: str) -> None:
    """One of them mends it; what the others add is not lost."""
    if lose == "remove":
        remove(folder)
    else:
        with opened(folder) as library:
            library.index._db.execute("DROP TABLE spans")
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(3)
    processes = [context.Process(target=_open_and_add, args=(str(folder), n, ready)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    with opened(folder) as library:
        names = {document.name for document in library.documents()}
        assert names >= {f"by {n}" for n in range(3)} and len(names) == (3 if lose == "remove" else 6)
        assert {row.key for row in library.index.kept()} == chunk_files(folder)
    assert len([path for path in folder.glob("*.damaged-*") if path.suffix not in ("-wal", "-shm")]) <= 3


def test_a_process_follows_where_another_one_mends(folder: Path) -> None:
    """What has the damaged index open goes on with the new one."""
    first = opened(folder)
    assert len(first.documents()) == 3
    overwrite(folder)
    with opened(folder) as second:
        assert second.mended is not None
        document = second.add_text("Something new.", "new")
    assert [d.name for d in first.documents()] == ["new"] == [document.name]
    first.add_text("Something else.", "else")
    first.close()
    with opened(folder) as third:
        assert [d.name for d in third.documents()] == ["new", "else"]


def test_what_another_process_writes_meanwhile_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checksum, and what it is of, are read of one moment."""
    with opened(folder) as library, opened(folder) as other:
        document = library.documents()[-1]
        spans_of, seal_of_members = indexing.spans_of, indexing.seal_of_members
        cut = [(0, 5, 1, (), None, None)]

        def spans_later(*given: object) -> object:
            monkeypatch.undo()
            other.index.set_spans(document.id, "v", cut)
            return spans_of(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(indexing, "spans_of", spans_later)
        assert library.index.spans(document.id, "v") == []
        assert library.mended is None and len(library.index.spans(document.id, "v")) == 1

        def members_later(*given: object) -> str:
            monkeypatch.undo()
            other.index.add_to_collection("work", [document.id])
            return seal_of_members(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(indexing, "seal_of_members", members_later)
        library.index._check_collection("work")
        assert len(library.documents("work")) == 2


@pytest.mark.parametrize("who", ["this one", "another"])
def test_chunks_are_found_that_were_cut_anew(llm: MesaLlama, folder: Path, who: str) -> None:
    """Whoever finds damage, and wherever: a question in what is open goes by the chunks that are there now."""
    with opened(folder) as library, opened(folder) as other:
        catalogue = Catalogue(llm, PromptForm(llm), library)
        documents = library.documents()
        before = catalogue.select(FACT.question, documents, 200)
        finder = library if who == "this one" else other
        finder.index._db.execute("UPDATE documents SET text = 'x' WHERE name = 'two'")
        finder.remove(documents.pop())  # the words of a damaged text cannot be taken out
        after = catalogue.select(FACT.question, documents, 200)
        assert [piece.text for piece in after.pieces] == [piece.text for piece in before.pieces]
        assert {piece.span.id for piece in after.pieces}.isdisjoint(piece.span.id for piece in before.pieces)


def test_a_full_disk_leaves_the_damaged_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overwrite(folder)
    before = (folder / "index.sqlite3").read_bytes()

    def full(*_: object) -> Iterator[object]:
        raise sqlite3.OperationalError("database or disk is full")
        yield

    monkeypatch.setattr(renewal, "transaction", contextlib.contextmanager(full))
    with pytest.raises(LibraryError, match="disk is full: see whether the disk is full"):
        opened(folder)
    assert (folder / "index.sqlite3").read_bytes() == before and not list(folder.glob("*.new"))
    monkeypatch.undo()
    with opened(folder) as library:
        assert library.mended is not None


@pytest.mark.parametrize("err", [OSError(28, "No space left on device"), sqlite3.OperationalError("disk is full")])
def test_an_index_that_could_not_be_mended_is_when_it_can_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch, err: Exception
) -> None:
    """A server goes on where its disk was full for a while."""
    with opened(folder) as library:
        library.index._db.execute("DROP TABLE kept")

        def full(*_: object) -> None:
            raise err

        monkeypatch.setattr(indexing, "renew", full)
        with pytest.raises(LibraryError, match=r"No space left on device|disk is full"):
            library.index.kept()
        monkeypatch.undo()
        assert len(library.documents()) == 3 and {row.key for row in library.index.kept()} == chunk_files(folder)
        assert library.mended is not None
    with pytest.raises(LibraryError, match="was closed"):
        library.documents()


@pytest.mark.parametrize(
    "err",
    [
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),  # SQLite quotes what it found
        MemoryError(),  # FTS5 asks for what a length says
        sqlite3.OperationalError("invalid fts5 file format (found 0, expected 4) - run 'rebuild'"),
        sqlite3.OperationalError("no such column: start"),
        sqlite3.IntegrityError("UNIQUE constraint failed: documents.id"),
    ],
    ids=lambda err: type(err).__name__,
)
def test_whatever_sqlite_makes_of_damage(folder: Path, monkeypatch: pytest.MonkeyPatch, err: Exception) -> None:
    with opened(folder) as library:
        spans_of, failed = indexing.spans_of, []

        def damaged(*given: object) -> object:
            if not failed:
                failed.append(given)
                raise err
            return spans_of(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(indexing, "spans_of", damaged)
        library.index.spans(1, "v")
        assert library.mended is not None and "the index was damaged" in library.mended and failed


@pytest.mark.parametrize("said", ["database or disk is full", "disk I/O error", "attempt to write a readonly database"])
def test_what_the_disk_does_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError(said)

    with opened(folder) as library:
        monkeypatch.setattr(indexing, "spans_of", fail)
        with pytest.raises(LibraryError, match=f"{said}: see whether the disk is full"):
            library.index.spans(1, "v")
        assert library.mended is None
    assert not list(folder.glob("*damaged*"))


def test_a_document_is_removed_whose_borders_are_damaged(llm: MesaLlama, folder: Path) -> None:
    with opened(folder) as library:
        (document,) = [d for d in library.documents() if d.name == "log.txt"]
        library.index._db.execute("UPDATE spans SET heading = 'x', stop = stop + 3")
        library.remove(document)
        assert library.verify().damaged == [] and len(library.documents()) == 2


def test_adding_a_file_mends_what_only_one_way_leads_to(folder: Path, filled: Path) -> None:
    """Where SQLite's own index of digests is damaged, the file's document is found by the other one."""
    with opened(folder) as library:
        library.index._db.execute("UPDATE documents SET text = 'x' WHERE name = 'log.txt'")
        library.index.find_document = lambda *_: None  # type: ignore[method-assign]
        document = library.add(filled / "log.txt")
        assert library.text(document) == MADE.text and [d.id for d in library.documents("work")] == [document.id]


def test_pages_that_lead_back_to_themselves_end() -> None:
    class Loops:
        def execute(self, query: str) -> Iterator[tuple[int, str]]:
            while True:
                yield from ((1, "a"), (2, "b")) if "ASC" in query else ((5, "e"), (4, "d"))

    rows = schema.all_that_can_be_read(Loops(), "documents", "name", "id")  # type: ignore[arg-type]
    assert rows == [("a",), ("b",), ("d",), ("e",)]


def test_an_index_that_stays_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = opened(folder)

    def damaged(*_: object) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(indexing, "spans_of", damaged)
    with pytest.raises(LibraryError, match=r"damaged each time that it is read .*: see whether the disk is"):
        library.index.spans(1, "v")
    assert len(library.documents()) == 3
    library.close()
