"""The library on disk: chunk files and the index. Damage, races, full disks, and what is found."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sqlite3
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesa_gguf.library import store as storing
from mesa_gguf.library.index import Index, terms_of, words_of
from mesa_gguf.library.store import HEADER, ChunkStore, LibraryError, chunk_key

KEY, OTHER = "ab" * 32, "cd" * 32
ROWS = bytes(range(256)) * 20


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    return ChunkStore(tmp_path / "chunks")


#
# chunk files
#


def test_what_is_put_is_got(store: ChunkStore) -> None:
    assert KEY not in store and store.get(KEY, 7) is None
    size = store.put(KEY, 7, ROWS)
    assert KEY in store and store.get(KEY, 7) == ROWS
    assert [(f.key, f.size) for f in store.files()] == [(KEY, size)] and size == len(ROWS) + HEADER.size
    assert store.remove(KEY) and not store.remove(KEY) and KEY not in store


def test_nobody_else_may_read(store: ChunkStore) -> None:
    store.put(KEY, 7, ROWS)
    path = store.path(KEY)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_what_is_there_stays(store: ChunkStore) -> None:
    store.put(KEY, 7, ROWS)
    inode = store.path(KEY).stat().st_ino
    store.put(KEY, 7, ROWS)
    assert store.path(KEY).stat().st_ino == inode
    assert not list(store.folder.rglob("*.new"))


@given(at=st.integers(0, HEADER.size + len(ROWS) - 1), value=st.integers(1, 255), cut=st.booleans())
def test_no_damage_goes_through(tmp_path_factory: pytest.TempPathFactory, at: int, value: int, cut: bool) -> None:
    store = ChunkStore(tmp_path_factory.getbasetemp() / "damaged")
    store.put(KEY, 7, ROWS)
    data = bytearray(store.path(KEY).read_bytes())
    if cut:
        del data[at:]
    else:
        data[at] ^= value
    store.path(KEY).write_bytes(data)
    assert store.get(KEY, 7) is None
    assert KEY not in store  # it is read again, and kept again
    store.put(KEY, 7, ROWS)
    assert store.get(KEY, 7) == ROWS


def test_a_file_of_something_else(store: ChunkStore) -> None:
    store.put(KEY, 7, ROWS)
    store.put(OTHER, 9, ROWS[::-1])
    store.path(OTHER).write_bytes(store.path(KEY).read_bytes())
    assert store.get(OTHER, 9) is None  # another key in its header
    assert store.get(KEY, 8) is None  # another number of tokens
    for name in ("x", "AB" * 32, "../" + "ab" * 31, "", "ab" * 31 + "\n\n"):
        with pytest.raises(ValueError, match="is no key"):
            store.path(name)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_leaves_nothing(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LibraryError, match="No space left on device: free some"):
        store.put(KEY, 7, ROWS)
    monkeypatch.undo()
    assert KEY not in store and not list(store.folder.rglob("*.new"))


def test_what_is_no_key_is_not_there(store: ChunkStore) -> None:
    """A damaged index may ask for anything."""
    for key in ("", "x" * 64, KEY.upper() + "A", "../../index.sqlite3"):
        assert store.get(key, 7) is None and key not in store and not store.remove(key)


def test_without_links(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    store.put(KEY, 7, ROWS)
    store.put(KEY, 7, b"other")
    assert store.get(KEY, 7) == ROWS


def test_orphans_are_swept(store: ChunkStore) -> None:
    store.put(KEY, 7, ROWS)
    folder = store.path(KEY).parent
    for name, age in (("old", 2 * storing.ORPHAN_SECONDS), ("future", -2 * storing.ORPHAN_SECONDS), ("fresh", 0.0)):
        path = folder / f"{name}.new"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age, time.time() - age))
    ChunkStore(store.folder)
    assert [path.name for path in folder.glob("*.new")] == ["fresh.new"] and store.get(KEY, 7) == ROWS


KILLED = """
import sys
from pathlib import Path
from mesa_gguf.library.store import ChunkStore
store = ChunkStore(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    for i in range(40):
        store.put(f"{i:02x}" * 32, i, bytes([i]) * 300_000)
    for i in range(0, 40, 3):
        store.remove(f"{i:02x}" * 32)
"""


@pytest.mark.parametrize("n", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path: Path, n: int) -> None:
    for round_ in range(n):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(0.003 * (round_ % 40))
        process.kill()
        process.wait()
        process.stdout.close()
        store = ChunkStore(tmp_path)
        for file in store.files():
            i = int(file.key[:2], 16)
            assert store.get(file.key, i) == bytes([i]) * 300_000


def _keep(folder: str, n: int) -> None:
    store, index = ChunkStore(Path(folder) / "chunks"), Index(Path(folder) / "index.sqlite3")
    for i in range(n):
        key = f"{i:02x}" * 32
        index.note_kept(key, "m", i, store.put(key, i, bytes([i]) * 1000))
        index.note_used([key], "m")


def test_several_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_keep, args=(str(tmp_path), 25)) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    store, index = ChunkStore(tmp_path / "chunks"), Index(tmp_path / "index.sqlite3")
    assert {row.key for row in index.kept()} == {file.key for file in store.files()} and len(index.kept()) == 25


def test_keys_stand_for_all_that_rows_depend_on() -> None:
    base = chunk_key("model", 1.0, tokens=[1, 2, 3], preamble=[9])
    assert base == chunk_key("model", 1.0, tokens=[1, 2, 3], preamble=[9])
    others = [
        chunk_key("model", 2.0, tokens=[1, 2, 3], preamble=[9]),
        chunk_key("other", 1.0, tokens=[1, 2, 3], preamble=[9]),
        chunk_key("model", 1.0, tokens=[1, 2], preamble=[9]),
        chunk_key("model", 1.0, tokens=[2, 3], preamble=[9, 1]),
        chunk_key("model", 1.0, tokens=[1, 2, 3], preamble=[9, 9]),
    ]
    assert len({base, *others}) == 6


#
# the index
#


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path / "index.sqlite3")


def add(index: Index, text: str, source: str | None = "a.txt") -> int:
    digest = f"digest of {text}"
    number = index.add_document(
        name="a.txt",
        source=source,
        digest=digest,
        kind="text",
        title="A",
        text=text,
        places=[(0, 1, ["One"])],
        notes=["n"],
    )
    half = len(text) // 2
    index.set_spans(number, "v", [(0, half, 10, ["One"], 1, 1), (half, len(text), 10, [], None, None)])
    return number


TEXT = "The harvest was good. Åsa ate bread. " + "The ship sank. 猫が好きです。 Nobody knew of it."


def test_documents_and_their_places(index: Index) -> None:
    number = add(index, TEXT)
    (row,) = index.documents()
    assert (row.id, row.text, row.places, row.notes) == (number, TEXT, [(0, 1, ["One"])], ["n"])
    assert add(index, TEXT) == number  # the same bytes of the same file
    spans = index.spans(number, "v")
    assert [TEXT[s.start : s.stop] for s in spans] == [TEXT[: len(TEXT) // 2], TEXT[len(TEXT) // 2 :]]
    assert spans[0].heading == ["One"] and index.spans(number, "another vocabulary") == []


def test_a_file_that_changed_takes_its_place(index: Index) -> None:
    old = add(index, TEXT)
    index.add_to_collection("work", [old])
    new = add(index, TEXT.replace("harvest", "weather"))
    assert [row.id for row in index.documents("work")] == [row.id for row in index.documents()] == [new]
    assert index.search("harvest", "v", [new, old], 5) == []
    assert index.search("weather", "v", [new], 5)[0][0] == index.spans(new, "v")[0].id


@pytest.mark.parametrize(
    ("question", "which"),
    [
        ("Was the HARVEST good?", 0),
        ("asa", 0),  # diacritics do not count
        ("Which ship sank?", 1),
        ("猫は？", 1),
        ('"AND OR NOT ( * ship NEAR', 1),
        ("ship'; DROP TABLE spans; --", 1),
        ("What did one say?", 0),  # the heading
    ],
)
def test_chunks_that_match(index: Index, question: str, which: int) -> None:
    number = add(index, TEXT)
    found = index.search(question, "v", [number], 5)
    assert found[0][0] == index.spans(number, "v")[which].id and found[0][1] > 0


@given(st.lists(st.text(max_size=60), max_size=30))
def test_any_question_can_be_asked(tmp_path_factory: pytest.TempPathFactory, questions: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.sqlite3"
    index = Index(path)
    number = add(index, TEXT)
    for question in questions:
        index.search(question, "v", [number], 5)
    index.close()


def test_scripts_without_spaces() -> None:
    assert words_of("猫が好き").split() == ["猫", "が", "好", "き", "猫が", "が好", "好き"]
    assert terms_of("Where is the ship?") == ["ship"] and terms_of("What is it?") == ["what", "is", "it"]


def test_a_document_that_is_removed_is_gone(index: Index) -> None:
    first, second = add(index, TEXT), add(index, TEXT.replace("ship", "boat"), "b.txt")
    index.add_to_collection("work", [first, second])
    index.remove_document(first)
    assert [row.id for row in index.documents("work")] == [second] and index.spans(first, "v") == []
    assert index.search("ship", "v", [first, second], 5) == []
    assert index.collections() == [("work", 1)]
    index.remove_collection("work")
    assert index.collections() == [] and len(index.documents()) == 1


def test_a_document_that_goes_while_it_is_cut(index: Index, tmp_path: Path) -> None:
    number = add(index, TEXT)

    def spans() -> Iterator[tuple[int, int, int, list[str], None, None]]:
        yield 0, 10, 3, [], None, None

    looked = index.document
    index.document = lambda n: (looked(n), index.remove_document(n))[0]  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(LibraryError, match=f"document {number} is not in the library any more"):
        index.set_spans(number, "another vocabulary", spans())


def test_the_least_recently_used_comes_first(index: Index) -> None:
    for i, key in enumerate("abc"):
        index.note_kept(key, "m", 10, 100 * (i + 1))
    index.note_used(["a", "b"], "m")
    assert [row.key for row in index.kept()] == ["c", "a", "b"] and index.kept_bytes() == 600
    index.note_dropped(["a"])
    assert index.kept_bytes() == 500


def test_the_first_preamble_stays(index: Index) -> None:
    """Some chat templates write today's date into it."""
    assert index.preamble("m", "model.gguf", [1, 2]) == [1, 2] == index.preamble("m", "model.gguf", [1, 3])
    assert index.preamble("n", "other.gguf", [1, 3]) == [1, 3]
    assert index.model_names() == {"m": "model.gguf", "n": "other.gguf"}


def test_a_library_of_the_future(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    Index(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    with pytest.raises(LibraryError, match=r"newer mesa-gguf \(version 99, this one knows 2\): update mesa-gguf"):
        Index(path)
    assert path.read_bytes() == before


def test_the_database_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(LibraryError, match="is the database of another program: use another folder"):
        Index(path)
    assert path.read_bytes() == before and [other.name for other in tmp_path.iterdir()] == ["index.sqlite3"]


@pytest.mark.parametrize("damage", ["zeros", "text", "cut", "page"])
def test_a_damaged_index_is_set_aside(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "index.sqlite3"
    index = Index(path)
    for i in range(40):
        add(index, f"{TEXT} {i} {'word ' * 400}", f"{i}.txt")
    index.close()
    data = bytearray(path.read_bytes())
    if damage == "zeros":
        data[:100] = bytes(100)
    elif damage == "text":
        data[:] = b"hello"
    elif damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[4096 * 3 : 4096 * 5] = struct.pack("<I", 0xDEADBEEF) * 2048
    path.write_bytes(data)
    index = Index(path)
    assert index.mended is not None and "was damaged" in index.mended and "\n" not in index.mended
    whole = [row.text for row in index.documents()]
    assert set(whole) <= {f"{TEXT} {i} {'word ' * 400}" for i in range(40)}
    assert bool(whole) == (damage in ("page", "cut")) or damage == "cut"
    assert any(bytes(data) == other.read_bytes() for other in tmp_path.glob("index.sqlite3.damaged-*"))
    add(index, TEXT)


def test_an_index_of_version_1_gets_its_seals(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    index = Index(path)
    number = add(index, TEXT)
    index.add_to_collection("work", [number])
    index.preamble("m", "model.gguf", [1, 2])
    for table in ("documents", "collections", "preambles"):
        index._db.execute(f"ALTER TABLE {table} DROP COLUMN seal")
    index._db.execute("DROP TABLE cuts")
    index._db.execute("PRAGMA user_version = 1")
    index.close()
    index = Index(path)
    assert index.mended is None and [row.text for row in index.documents("work")] == [TEXT]
    assert index.preamble("m", "model.gguf", [3]) == [1, 2]
    assert index.spans(number, "v") == []  # they are cut anew
    index.set_spans(number, "v", [(0, len(TEXT), 10, ["One"], 1, 1)])
    assert index.search("ship", "v", [number], 5)[0][0] == index.spans(number, "v")[0].id


def test_a_preamble_that_is_damaged_is_another_one(index: Index) -> None:
    index.preamble("m", "model.gguf", [1, 2])
    index._db.execute("UPDATE preambles SET tokens = '[1, 3]'")
    assert index.preamble("m", "model.gguf", [1, 4]) == [1, 4] == index.preamble("m", "model.gguf", [5])


def test_an_error_takes_everything_back(index: Index) -> None:
    add(index, TEXT)
    with pytest.raises(LibraryError, match="FOREIGN KEY"), index.writing() as db:
        db.execute("DELETE FROM documents").connection.execute("INSERT INTO members VALUES ('none', 7)")
    assert len(index.documents()) == 1
