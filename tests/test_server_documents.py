"""Files and documents of a server while they are deleted and loaded at the same time. No model is needed."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesa_gguf.library.library import Document, Library
from mesa_gguf.library.store import LibraryError
from mesa_gguf.reading.prompts import Turn
from mesa_gguf.server.documents import TAKEN_AT_ONCE, Documents
from mesa_gguf.server.intake import understand
from mesa_gguf.server.problems import Problem
from mesa_gguf.server.records import FileRow, Records, new_file_id
from mesa_gguf.server.schemas import ChatRequest

TEXT = b"The door code of Mara Lind is 48213.\n"


class Catalogue:
    """In place of one that cuts: each document is a chunk."""

    preamble = ()

    def rows(self, document: Document) -> list[Document]:
        return [document]

    def piece(self, document: Document, _: object) -> Any:
        return SimpleNamespace(tokens=[document.id], number=document.id)

    def kept_pieces(self, document: Document) -> Iterator[Any]:
        if document.name == "damaged.txt":
            raise LibraryError("it is damaged")
        yield self.piece(document, None)

    def forget(self, _: int) -> None:
        pass


class Loading:
    """A server's documents, whose library runs something while a text is taken out."""

    def __init__(self, folder: Path) -> None:
        self.library, self.records = Library(folder), Records(folder / "server")
        shelf: Any = SimpleNamespace(
            llm=SimpleNamespace(chunk_origin="m"), catalogue=Catalogue(), key=lambda _: 64 * "0"
        )
        self.documents = Documents(self.library, self.records, shelf, lambda: Catalogue())  # type: ignore[arg-type, return-value]

    def upload(self, name: str = "a.txt") -> FileRow:
        file_id = new_file_id()
        self.records.new_path(file_id).write_bytes(TEXT)
        row = self.records.add_file(file_id, name, n_bytes=len(TEXT))
        self.documents.add(row)
        return row

    def load(self, row: FileRow) -> None:
        self.documents._load(row.id, Catalogue())  # type: ignore[arg-type]


@pytest.fixture
def loading(tmp_path: Path) -> Iterator[Loading]:
    made = Loading(tmp_path)
    yield made
    made.records.close()
    made.library.close()


def while_added(loading: Loading, monkeypatch: pytest.MonkeyPatch, what: Any) -> None:
    """Once, after the next document is in the library and before the server has noted it."""
    add = loading.library.add_bytes

    def added(*args: Any, **options: Any) -> Document:
        document = add(*args, **options)
        monkeypatch.undo()
        what()
        return document

    monkeypatch.setattr(loading.library, "add_bytes", added)


def test_what_is_deleted_while_it_is_loaded_stays_away(loading: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    row = loading.upload()
    while_added(loading, monkeypatch, lambda: loading.documents.remove(row))
    loading.load(row)
    loading.documents.meet_library()
    assert loading.records.files() == [] and loading.library.documents() == []


def test_deleted_as_it_was_before_it_was_loaded(loading: Loading) -> None:
    row = loading.upload()
    loading.load(row)
    loading.documents.remove(row)  # as it was looked up: without a document
    loading.documents.meet_library()
    assert loading.records.files() == [] and loading.library.documents() == []


def test_no_chunk_of_a_file_is_dropped_for_the_next_one(loading: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is longer than the library's budget, the reading ends there, and what was read stays."""
    monkeypatch.setattr(Catalogue, "rows", lambda _, document: range(3))
    monkeypatch.setattr(Catalogue, "piece", lambda _, document, n: SimpleNamespace(tokens=[n], number=n))
    read: list[tuple[int, list[str]]] = []
    shelf: Any = loading.documents.shelf

    def read_ahead(pieces: list[Any], *, ahead: list[str]) -> tuple[int, list[str]]:
        read.append((pieces[0].number, list(ahead)))
        return 1, [] if len(read) < 2 else ["the budget is full"]

    shelf.key, shelf.read, shelf.release = lambda piece: 64 * str(piece.number), read_ahead, lambda: None
    row = loading.upload()
    loading.load(row)
    while loading.documents.pending():
        loading.documents.step(MagicMock())
    keys = [64 * str(n) for n in range(3)]
    assert read == [(0, keys), (1, keys)]
    progress = loading.documents._progress[row.id]
    assert (progress.state, progress.notes, progress.tokens_read) == ("ready", ["the budget is full"], 1)


@pytest.mark.parametrize(("room", "completed"), [(9, "1457"), (4, "14")])
def test_what_lacks_beside_chunks_is_looked_for_after_all_is_read(loading: Loading, room: int, completed: str) -> None:
    """Of documents that were kept before, whoever put them into the library; where there is no room, not of the others."""
    done: list[str] = []
    shelf: Any = loading.documents.shelf
    shelf.catalogue.embeddings = object()
    shelf.release, shelf.key = lambda: None, lambda piece: 64 * str(piece.number)
    shelf.read = lambda pieces, ahead: (done.append(f"read {pieces[0].number}") or 1, [])
    shelf.complete = lambda piece: done.append(f"complete {piece.number}") or piece.number < room
    names = ("1.txt", "2.txt", "damaged.txt", "4.txt", "5.txt")
    kept = [loading.library.add_text(f"Text of {name}", name) for name in names]
    loading.library.store.put(64 * "7", 1, b"rows")
    loading.library.index.remove_document(kept[1].id)
    loading.documents.start()
    for text in (b"It is new.", b"It was kept."):
        file_id = new_file_id()
        loading.records.new_path(file_id).write_bytes(text)
        loading.documents.add(loading.records.add_file(file_id, "new.txt", n_bytes=len(text)))
    while any(loading.documents.progress(row.id).state in ("waiting", "loading") for row in loading.records.files()):
        time.sleep(0.01)
    while loading.documents.pending():
        loading.documents.step(MagicMock())
    loading.documents.close()
    assert done == ["read 6", *(f"complete {number}" for number in completed)]


def test_a_twin_outlives_the_file_that_is_deleted(loading: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = loading.upload("a.txt"), loading.upload("b.txt")
    loading.load(first)
    first = loading.documents.file(first.id)
    while_added(loading, monkeypatch, lambda: loading.documents.remove(first))
    loading.load(second)
    document = loading.documents.loaded(second.id)
    assert document is not None and loading.library.text(document) == TEXT.decode()


def test_a_file_joins_a_collection_while_it_is_loaded(loading: Loading) -> None:
    row = loading.upload()
    store = loading.records.add_store("work")
    loading.load(row)
    loading.documents.join_store(store, row)  # as it was looked up: without a document
    assert [document.name for document in loading.library.documents("work")] == ["a.txt"]


def test_few_files_of_messages_are_taken_apart_at_once(loading: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a process that may take a gigabyte."""
    add, lock = loading.library.add_bytes, threading.Lock()
    now = most = 0

    def added(*args: Any, **options: Any) -> Document:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        document = add(*args, **options)
        with lock:
            now -= 1
        return document

    monkeypatch.setattr(loading.library, "add_bytes", added)

    def request(n: int) -> ChatRequest:
        data = base64.b64encode(b"%d. %b" % (n, TEXT)).decode()
        parts = [{"type": "file", "file": {"file_data": data}}, {"type": "text", "text": "What is the door code?"}]
        return ChatRequest.model_validate({"messages": [{"role": "user", "content": parts}]})

    async def ask() -> list[Any]:
        return await asyncio.gather(*(understand(request(n), loading.documents, 60) for n in range(8)))

    assert len({asked.documents[0][0].id for asked in asyncio.run(ask())}) == 8
    assert most == TAKEN_AT_ONCE


# What a conversation about documents asks.

CALL = {"id": "call_1", "type": "function", "function": {"name": "open_door", "arguments": '{"code": 1}'}}


def asked(loading: Loading, messages: list[Any]) -> Any:
    row = loading.records.files()[0] if loading.records.files() else loading.upload()
    if loading.documents.file(row.id).document is None:
        loading.load(row)
    body = ChatRequest.model_validate({"messages": messages, "documents": [row.id]})
    return asyncio.run(understand(body, loading.documents, 60))


def test_what_a_tool_gave_stands_before_the_question(loading: Loading) -> None:
    ask, call = {"role": "user", "content": "Which door is it?"}, {"role": "assistant", "tool_calls": [CALL]}
    gave = {"role": "tool", "tool_call_id": "call_1", "content": "it is open"}
    found = asked(loading, [{"role": "system", "content": "Be brief."}, ask, call, gave])
    assert found.question == "open_door returned: it is open\n\nWhich door is it?"
    assert found.history == (Turn("Which door is it?", 'open_door({"code": 1})'),)
    assert found.instructions == "Be brief."
    later = asked(
        loading,
        [ask, call, gave, {"role": "assistant", "content": "That one."}, {"role": "user", "content": "And now?"}],
    )
    assert later.question == "And now?"
    assert later.history[1] == Turn("open_door returned: it is open", "That one.")
    with pytest.raises(Problem, match="asks nothing"):
        asked(loading, [call, gave])


contents = st.none() | st.text("ab \n", max_size=6)
extras = st.fixed_dictionaries({}, optional={
    "tool_calls": st.sampled_from([None, [], "x", [1], [{}], [CALL], [{"function": {"name": None}}], [CALL, CALL]]),
    "tool_call_id": st.sampled_from([None, "call_1", 3]), "name": st.sampled_from([None, "f", 4]),
})  # fmt: skip
roles = st.sampled_from(["system", "developer", "user", "user", "assistant", "tool", "function", "critic"])
conversations = st.lists(
    st.builds(lambda role, content, more: {"role": role, "content": content, **more}, roles, contents, extras),
    min_size=1,
    max_size=6,
)


@given(conversations)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_conversation_is_a_question_or_refused(loading: Loading, messages: list[Any]) -> None:
    try:
        found = asked(loading, messages)
    except Problem as err:
        status = err.status
    else:
        status = 200
    if status != 200:
        assert status == 400
        return
    assert messages[-1]["role"] in ("user", "tool", "function") and found.question.strip()
    users = [
        message["content"] for message in messages if message["role"] == "user" and (message["content"] or "").strip()
    ]
    assert found.question.endswith(users[-1].strip())
    assert all(turn.question.strip() for turn in found.history)
