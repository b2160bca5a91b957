"""A chat's messages as a question about documents, where they are one."""

from __future__ import annotations

import asyncio
import base64
import binascii
import html
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

from ..library.library import Document
from ..loaders.document import printable
from ..reading.prompts import Turn
from ..text import check_text
from .answers import Asked
from .documents import Documents
from .problems import Problem
from .schemas import ChatRequest, FilePart, FileReference, Message, TextPart

PASTED_CHARS = 8192  # of a text in a message, from which on it is a document: about what a question reads of one
MAX_SOURCES = 32  # of one message
QUESTION_CHARS = 1000  # longest paragraph beside it that is taken for the question

SYSTEM_ROLES = ("system", "developer")
TOOL_ROLES = ("tool", "function")

_DATA = re.compile(r"data:[^,]{0,256};base64,")
_SOURCE = re.compile(
    r"(?:^|<context>)\s{0,9}(<source\b[^<>]{0,4096}>)", re.MULTILINE
)  # not one that instructions talk of
_NEXT_SOURCE = re.compile(r"</source>\s{0,9}<source\b[^<>]{0,4096}>")
_SOURCE_NAME = re.compile(r'\bname="([^"]*)"')
_BRACKET = re.compile(r"^\[CONTEXT ([0-9]{1,6})\]:\n", re.MULTILINE)
_PARAGRAPHS = re.compile(r"\n\s*\n")
_Result = TypeVar("_Result")


def name_of(given: str | None, default: str = "document.txt") -> str:
    """A file's name as it is shown: never a path, on one line."""
    name = printable(re.split(r"[/\\]", given or "")[-1].strip())[:255].strip()
    return name if name not in ("", ".", "..") else default


@dataclass
class _Found:
    documents: dict[int, tuple[Document, str | None]] = field(default_factory=dict)
    instructions: list[str] = field(default_factory=list)
    pasted: bool = False
    named: bool = False

    def add(self, document: Document, file_id: str | None) -> None:
        if file_id is not None or document.id not in self.documents:
            self.documents[document.id] = (document, file_id)


async def understand(request: ChatRequest, documents: Documents, seconds: float) -> Asked | None:
    """The question about documents that a chat is; None: it is about none.

    Args:
        seconds: that files which are not loaded yet are waited for.

    Raises:
        Problem: a file is not there or cannot be used, or there is no question.
    """
    end = time.monotonic() + seconds
    reads = documents.shelf is not None
    found = _Found()
    questions: list[tuple[str, str]] = []  # role and text
    called: dict[str, str] = {}  # tools by the ids of their calls
    for message in request.messages:
        text = await _text(message, documents, found, end, pastes=reads)
        questions.append((message.role, _with_tools(message, text, called)))
    for file_id in request.documents or ():
        found.named = True
        found.add(await _loaded(documents, file_id, end), file_id)
    if request.collection is not None:
        found.named = True
        store = await _apart(documents.store, request.collection)
        for row, _ in await _apart(documents.records.members, store):
            if row.error is None:
                found.add(await _loaded(documents, row.id, end), row.id)
        if not found.documents:
            raise Problem(400, f"the vector store {store.name} has no documents", "no_documents", param="collection")
    if not found.named and not found.pasted:
        if request.read is not None:
            raise Problem(400, "read is for documents, and there are none", "no_documents", param="read")
        return None
    documents.require()
    results: list[str] = []  # that tools gave since the question, which is asked again then
    while len(questions) > 1 and questions[-1][0] in TOOL_ROLES:
        results.insert(0, questions.pop()[1])
    if results:
        asked = next((text for role, text in reversed(questions) if role == "user" and text.strip()), "")
        questions.append(("user", "\n\n".join([*results, asked]) if asked else ""))
    if not questions or questions[-1][0] != "user" or not questions[-1][1].strip():
        raise Problem(400, "the last message asks nothing: give it a text", "no_question", param="messages")
    history, instructions = _conversation(questions[:-1])
    instructions = "\n\n".join([*([instructions] if instructions else []), *dict.fromkeys(found.instructions)]) or None
    read = request.read or (None if found.pasted and not found.named else "auto")
    return Asked(questions[-1][1].strip(), history, instructions, tuple(found.documents.values()), read)


def _conversation(messages: list[tuple[str, str]]) -> tuple[tuple[Turn, ...], str | None]:
    """Turns, and the instructions before them."""
    instructions: list[str] = []
    turns: list[Turn] = []
    asked: list[str] = []
    for role, text in messages:
        text = text.strip()
        if role in SYSTEM_ROLES:
            instructions += [text] if text else []
        elif role == "user" or role in TOOL_ROLES:
            asked += [text] if text else []
        elif role == "assistant":
            if asked:
                turns.append(Turn("\n\n".join(asked), text))
                asked = []
        else:
            raise Problem(
                400, f"messages of the role {role} cannot be used with documents", "unsupported", param="messages"
            )
    if asked:  # a question that was not answered
        turns.append(Turn("\n\n".join(asked), ""))
    return tuple(turns), "\n\n".join(instructions) or None


def _with_tools(message: Message, text: str, called: dict[str, str]) -> str:
    """A message's text, with the tools that it calls, or as what a tool gave.

    Args:
        called: names of tools by the ids of their calls, of the messages before; more are added.
    """
    more = message.model_extra or {}
    if message.role in TOOL_ROLES:
        name = called.get(str(more.get("tool_call_id")), more.get("name"))
        return f"{name if isinstance(name, str) else 'The function'} returned: {text}"
    calls = more.get("tool_calls")
    if message.role != "assistant" or not isinstance(calls, list):
        return text
    said = [text] if text.strip() else []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            name = str(function.get("name"))
            called[str(call.get("id"))] = name
            said.append(f"{name}({function.get('arguments') or ''})")
    return "\n".join(said)


async def _text(message: Message, documents: Documents, found: _Found, end: float, *, pastes: bool) -> str:
    """The text of a message, without the documents in it, which are found."""
    content = message.content
    if content is None:
        return ""
    parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
    texts: list[str] = []
    for part in parts:
        if isinstance(part, FilePart):
            found.named = True
            await _add_file(part.file, documents, found, end)
        else:
            texts.append(part.text)
    is_user = message.role == "user"
    if not pastes or not (is_user or message.role in SYSTEM_ROLES):
        return "\n".join(texts)
    kept: list[str] = []
    for text in texts:
        others = any(other.strip() and len(other) < PASTED_CHARS for other in texts)
        if len(text) >= PASTED_CHARS:
            check_text(text, "a message")
        # in a thread: the text may have megabytes
        sources = await _apart(split_sources, text)
        if sources is not None and not is_user:
            pasted, question = sources.documents, "\n\n".join(filter(None, (sources.before, sources.behind)))
        elif sources is not None and (others or sources.behind) and len(sources.behind) < PASTED_CHARS:
            found.instructions += [sources.before] if sources.before else []
            pasted, question = sources.documents, sources.behind
        elif not is_user:  # instructions, however long they are
            pasted, question = [], text
        else:
            document, question = (
                (text, "") if len(text) >= PASTED_CHARS and others else await _apart(split_pasted, text)
            )
            pasted = [(None, document)] if document else []
        for name, document in pasted:
            found.pasted = True
            found.add(await _apart(documents.take_in_text, document, name), None)
        kept += [question] if question else []
    return "\n".join(kept)


@dataclass(frozen=True)
class Sources:
    """Documents that a front end put into a message, each between marks.

    Attributes:
        documents: each with its name, where it has one.
        before, behind: what stands around them.
    """

    documents: list[tuple[str | None, str]]
    before: str
    behind: str


def split_sources(text: str) -> Sources | None:
    """The sources in a long text, as Open WebUI has them (``<source id="1" name="a.txt">…</source>``) or AnythingLLM (``[CONTEXT 0]:``
    … ``[END CONTEXT 0]``); None where there are none, or too many to keep."""
    if len(text) < PASTED_CHARS:
        return None
    found = _tagged(text) or _bracketed(text)
    return found if found is not None and len(found.documents) <= MAX_SOURCES else None


def _tagged(text: str) -> Sources | None:
    first, end = _SOURCE.search(text), text.rfind("</source>")
    if first is None or end < first.end():
        return None
    documents = []
    begin, tag = first.end(), first[1]
    for border in (*_NEXT_SOURCE.finditer(text, first.end(), end), None):
        name = _SOURCE_NAME.search(tag)
        inner = text[begin : end if border is None else border.start()].strip()
        if inner:
            documents.append((None if name is None else name_of(html.unescape(name[1])), inner))
        if border is not None:
            begin, tag = border.end(), border[0]
    before = text[: first.start(1)].strip().removesuffix("<context>").strip()
    behind = text[end + len("</source>") :].strip().removeprefix("</context>").strip()
    return Sources(documents, before, behind) if documents else None


def _bracketed(text: str) -> Sources | None:
    documents: list[tuple[str | None, str]] = []
    begin = end = 0
    for mark in _BRACKET.finditer(text):
        if mark.start() < end:
            continue  # within one
        close = f"\n[END CONTEXT {mark[1]}]"
        at = text.find(close, mark.end())
        if at < 0:
            break
        if not documents:
            begin = mark.start()
        inner = text[mark.end() : at].strip()
        if inner:
            documents.append((None, inner))
        end = at + len(close)
    before = text[:begin].strip().removesuffix("Context:").strip()
    return Sources(documents, before, text[end:].strip()) if documents else None


def split_pasted(text: str) -> tuple[str, str]:
    """A long text as a document and the question beside it; ("", text) where it is short, or no question is found.

    The question is the last paragraph or the first one, whichever looks like one: it has a question mark, or ends with a colon.
    """
    if len(text) < PASTED_CHARS or "<chat_history>" in text:  # what a front end asks about the conversation
        return "", text
    stripped = text.strip()
    begin = _PARAGRAPHS.search(stripped)
    if begin is None:
        return "", text
    (end,) = deque(_PARAGRAPHS.finditer(stripped), maxlen=1)  # the last one: there may be millions
    first, last = stripped[: begin.start()].strip(), stripped[end.end() :].strip()
    after_first, before_last = stripped[begin.end() :], stripped[: end.start()]
    short_first, short_last = len(first) <= QUESTION_CHARS, len(last) <= QUESTION_CHARS
    if short_last and _asks(last):
        return before_last, last
    if short_first and (_asks(first) or first.endswith(":")):
        return after_first, first
    if short_last:
        return before_last, last
    return (after_first, first) if short_first else ("", text)


def _asks(text: str) -> bool:
    return any(mark in text for mark in "?？؟")


async def _add_file(reference: FileReference, documents: Documents, found: _Found, end: float) -> None:
    documents.require()
    if reference.file_id is not None:
        found.add(await _loaded(documents, reference.file_id, end), reference.file_id)
        return
    if reference.file_data is None:
        raise Problem(400, "a file part has neither file_id nor file_data", "invalid_value", param="messages")
    data = await _apart(_decoded, reference.file_data)
    async with documents.turns:
        if time.monotonic() > end:
            raise Problem(504, "the time for this request was up before its file was taken in", "timeout")
        document = await _apart(documents.take_in, data, name_of(reference.filename))
    found.add(document, None)


def _decoded(given: str) -> bytes:
    """The bytes of a data URL, or of base64 alone.

    Raises:
        Problem: it is neither.
    """
    match = _DATA.match(given)
    try:
        return base64.b64decode(given[match.end() if match else 0 :], validate=True)
    except (binascii.Error, ValueError):
        raise Problem(
            400, "file_data is no base64: data:application/pdf;base64,…", "invalid_value", param="messages"
        ) from None


async def _loaded(documents: Documents, file_id: str, end: float) -> Document:
    """The document of a file, when its text was taken out."""
    while True:
        document = await _apart(documents.loaded, file_id)
        if document is not None:
            return document
        if time.monotonic() > end:
            raise Problem(504, f"{file_id} is not loaded yet: ask again later", "timeout")
        await asyncio.sleep(0.05)


async def _apart(function: Callable[..., _Result], *args: object) -> _Result:
    return await run_in_threadpool(function, *args)
