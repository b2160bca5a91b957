"""Libraries that cannot be written to: what is in them is read, nothing is kept, and what must write says so before it begins."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager as Context
from pathlib import Path

import pytest

from conftest import BUNDLED
from mesa_gguf import Library, MesaLlama, Reader, cli
from mesa_gguf.lab.documents import make_document
from mesa_gguf.library import copying
from mesa_gguf.library.index import Index
from mesa_gguf.library.store import LibraryError
from mesa_gguf.reading.reader import Answer

MADE, NEW = make_document(4712, 1500, n_facts=4), make_document(4713, 600, n_facts=2)
FACT = MADE.facts[1]
NOBODY = 65534  # an uid

Locked = Callable[[Path], Context[None]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that other users reach."""
    path = Path(tempfile.mkdtemp(prefix="mesa-test-"))
    path.chmod(0o755)
    yield path / "library"
    shutil.rmtree(path)


@contextlib.contextmanager
def said(folder: Path) -> Iterator[None]:
    """Its rights say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mesa_gguf.library.library.why_read_only", lambda _: "Read-only file system")
        yield


@contextlib.contextmanager
def refused(folder: Path) -> Iterator[None]:
    """Its rights do not say so, but SQLite finds out, as on some network drives."""
    open_index, path = Index._open, folder / "index.sqlite3"

    def opened(index: Index) -> None:
        if index.path == path and index.read_only is None:
            raise sqlite3.OperationalError("attempt to write a readonly database")
        open_index(index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Index, "_open", opened)
        yield


@contextlib.contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """Another user's; root gives up its own rights for it."""
    if sys.platform == "win32":
        pytest.skip("Windows has no such rights")
    places = [folder, *folder.rglob("*")]
    modes = [place.stat().st_mode for place in places]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(NOBODY)
        if not all(os.access(path, os.R_OK, effective_ids=True) for path in (folder, BUNDLED)):
            pytest.skip("other users do not reach the folder of temporary files, or the model")
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for place, mode in zip(places, modes):
            place.chmod(mode)


@contextlib.contextmanager
def on_a_disk(folder: Path) -> Iterator[None]:
    """On a disk that is mounted for reading."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root mounts")
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.mkdir()
    try:
        if subprocess.run(
            ["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=False, stderr=subprocess.DEVNULL
        ).returncode:
            pytest.skip("nothing can be mounted here")
        try:
            shutil.copytree(aside, folder, dirs_exist_ok=True)
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    finally:
        folder.rmdir()
        aside.rename(folder)


LOCKED = [said, refused, without_rights, on_a_disk]


def fill(folder: Path, llm: MesaLlama) -> Answer:
    """Documents, one of which was read."""
    with Library(folder, budget=10**9) as library:
        document = library.add_text(MADE.text, "log.txt", collection="work")
        library.add_text("Nothing to see here.", "other.txt")
        return Reader(llm, library, cite_by="words").ask(FACT.question, documents=[document], read="all").answer


def state(folder: Path) -> dict[str, bytes]:
    """What lies in it, but for what SQLite makes where it may."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal")))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("locked", LOCKED)
def test_it_answers_and_stays_as_it_is(llm: MesaLlama, folder: Path, locked: Locked) -> None:
    expected = fill(folder, llm)
    with Library(folder) as library:
        first, second = [row.key for row in library.index.kept() if row.n_tokens > 0][:2]
        path = library.store.path(first)
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        library.store.remove(second)
    before = state(folder)
    with locked(folder), Library(folder) as library:
        assert library.read_only is not None and library.read_only.endswith("): nothing is kept")
        assert [document.name for document in library.documents()] == ["log.txt", "other.txt"]
        for _ in range(2):  # what is damaged or gone is computed for each question
            reader = Reader(llm, library, cite_by="words")
            answer = reader.ask(FACT.question, collection="work", read="all").answer
            assert (answer.text, answer.citations) == (expected.text, expected.citations)
            assert answer.read is not None and 0 < answer.read.tokens_computed < answer.read.tokens_reused
            assert len(answer.read.notes) <= 1 and all("damaged or gone" in note for note in answer.read.notes)
        new = library.add_text(NEW.text, "new.txt")
        assert reader.ask(NEW.facts[0].question, documents=[new], max_tokens=2).answer.read is not None
        refusing: list[Callable[[], object]] = [
            lambda: library.remove(new),
            lambda: library.remove_collection("work"),
            lambda: library.take_out(new, "work"),
            lambda: library.prune(0),
            lambda: library.set_budget(5),
            library.check_writable,
        ]
        for change in refusing:
            with pytest.raises(LibraryError, match=r"the library cannot be written to: .*: name another folder"):
                change()
        report = library.verify()
        assert (report.damaged, report.missing) in (([first], [second]), ([], [second]))
    assert state(folder) == before
    with Library(folder) as library:
        assert library.read_only is None and len(library.documents()) == 2
        assert library.verify().damaged == [first] and not path.exists()


@pytest.mark.parametrize("locked", [said, on_a_disk])
def test_commands_say_so_in_a_line(
    llm: MesaLlama, folder: Path, locked: Locked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(folder, llm)
    (tmp_path / "new.txt").write_text(NEW.text, encoding="utf-8")
    new = str(tmp_path / "new.txt")
    line = f"mesa-gguf: {folder}: the library can only be read (Read-only file system): nothing is kept"
    with locked(folder):

        def run(*command: str) -> tuple[int, str, str]:
            code = cli.main([*command, "--library", str(folder)])
            return code, *capsys.readouterr()

        for command, shown in (
            (("list",), "1  log.txt  text, "),
            (("show", "2"), "Nothing to see here.\n"),
            (("verify",), "chunks are kept, "),
            (("budget",), "budget: "),
        ):
            code, out, err = run("library", *command)
            assert (code, err) == (0, f"{line}\n") and shown in out
        assert len(json.loads(run("library", "list", "--json")[1])["documents"]) == 2
        for refused in (
            ("library", "add", new),
            ("library", "add", new, "-m", str(BUNDLED)),
            ("library", "remove", "1"),
            ("library", "prune"),
            ("library", "budget", "5GB"),
            ("serve", "--port", "0"),
        ):
            code, out, err = run(*refused)
            assert (code, out, err.count("\n")) == (2, "", 1) and f"{folder}: the library cannot be written to" in err
        fact = NEW.facts[0]
        code, out, err = run("ask", "-f", new, fact.question, "--threads", "1")
        assert code == 0 and fact.answer in out and err.count("nothing is kept") == 1 and err.startswith(line)
        assert len(json.loads(run("library", "list", "--json")[1])["documents"]) == 2


@pytest.mark.parametrize("without_shm", [False, True])
@pytest.mark.parametrize("locked", [without_rights, on_a_disk])
def test_what_a_process_that_was_killed_had_written_is_there(folder: Path, locked: Locked, without_shm: bool) -> None:
    killed = folder.with_name("killed")
    with Library(killed) as library:
        library.add_text("The door code is 48213.", "code.txt")
        shutil.copytree(killed, folder)
    if without_shm:
        (folder / "index.sqlite3-shm").unlink()
    assert (folder / "index.sqlite3-wal").stat().st_size > 0
    with locked(folder), Library(folder) as library:
        assert [document.name for document in library.documents()] == ["code.txt"] and library.read_only is not None


def test_what_somebody_writes_meanwhile_is_of_one_moment(folder: Path) -> None:
    owner = Library(folder)
    owner.add_text("The first one.", "0", collection="work")

    def write() -> None:
        for n in range(1, 40):
            owner.add_text(f"Entry {n}. " * 500, f"{n}", collection="work")

    writer = threading.Thread(target=write)
    writer.start()
    found = [1]
    while writer.is_alive() or found[-1] < 40:
        with said(folder), Library(folder) as library:
            rows = library.index.documents()
            assert all(row.whole for row in rows) and len(rows) - len(library.documents("work")) in (0, 1)
            found.append(len(rows))
    owner.close()
    assert found == sorted(found)


def test_a_copy_of_two_moments_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Library(folder).close()
    states = [0, 1, 1, 1]
    monkeypatch.setattr(copying, "_state", lambda _: [("index.sqlite3", states.pop(0), 0)])
    connect = sqlite3.connect

    def refusing(database: str | Path, *args: object, **options: object) -> sqlite3.Connection:
        if str(database).endswith("?mode=ro"):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(database, *args, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(copying.sqlite3, "connect", refusing)
    with contextlib.closing(copying.copied(folder / "index.sqlite3")) as copy:
        assert copy.execute("SELECT count(*) FROM documents").fetchall() == [(0,)] and states == []


@pytest.mark.parametrize("locked", [said, without_rights])
def test_a_damaged_index_is_told(folder: Path, locked: Locked) -> None:
    with Library(folder) as library:
        library.add_text("The door code is 48213.", "code.txt")
    index = folder / "index.sqlite3"
    index.write_bytes(index.read_bytes()[:5000] + bytes(4000))
    before = state(folder)
    with locked(folder), pytest.raises(LibraryError, match=r"the index is damaged .*, and cannot be mended, as it can"):
        Library(folder)
    assert state(folder) == before


def test_what_may_not_be_read(folder: Path) -> None:
    Library(folder).close()
    with without_rights(folder):
        os.seteuid(os.getuid())
        (folder / "index.sqlite3").chmod(0)
        if os.getuid() == 0:
            os.seteuid(NOBODY)
        with pytest.raises(LibraryError, match=r"the library cannot be opened: .*: see whether you may read it"):
            Library(folder)


def test_without_a_place_for_temporary_files(llm: MesaLlama, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(folder, llm)

    def nowhere() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with said(folder), Library(folder) as library:
        assert len(library.documents()) == 2 and library.add_text(NEW.text, "new").n_chars == len(NEW.text)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such rights")
def test_who_may_read_a_library_may_read_what_comes_later(folder: Path) -> None:
    with Library(folder) as library:
        library.add_text("The door code is 48213.", "code.txt")
        library.keep("ab" * 32, "model", 3, b"rows")
    places = [folder, *folder.rglob("*")]
    assert all(place.stat().st_mode & 0o077 == 0 for place in places if not place.name.endswith(".lock"))
    for place in places:
        place.chmod(place.stat().st_mode | (0o050 if place.is_dir() else 0o040))
    (folder / "index.sqlite3").write_bytes(b"damaged" * 100)  # which is made anew
    with Library(folder) as library:
        library.keep("cd" * 32, "model", 3, b"rows")
        library.set_budget(10**9)
        for place in (folder / "index.sqlite3", library.store.path("cd" * 32), folder / "chunks" / "budget"):
            assert place.stat().st_mode & 0o777 == 0o640, place
        assert library.store.path("cd" * 32).parent.stat().st_mode & 0o777 == 0o750
