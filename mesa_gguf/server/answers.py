"""What the model does for a request: work for the engine's thread, which yields OpenAI's objects."""

from __future__ import annotations

import base64
import contextlib
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..chat import tells_tools
from ..library.library import Document
from ..reading.prompts import END, Turn
from ..reading.reader import MAX_TOKENS, Answer, Reader
from ..reading.shelf import ReadMode
from .calls import Forced, Spoken, tools_of
from .documents import Documents
from .engine import Engine, GiveWay, Job, Work
from .problems import Problem
from .schemas import SAMPLING, ChatRequest, CompletionRequest, EmbeddingRequest, Sampling
from .served import ServedLlama

SPARE = 64  # tokens between a text and the end of the context, for what stands around it


@dataclass(frozen=True)
class Asked:
    """A question about documents, out of a chat's messages.

    Attributes:
        documents: each with the id of the file that it came as; None for those that came in messages.
        read: None: everything where it fits into the context, else what matches.
    """

    question: str
    history: tuple[Turn, ...]
    instructions: str | None
    documents: tuple[tuple[Document, str | None], ...]
    read: ReadMode | None


class Answers:
    """Makes work of requests.

    Args:
        name: the model's, in answers.
        max_tokens: of an answer in a chat that names none; None: to the end of the context, or the reader's about documents.
    """

    def __init__(
        self, engine: Engine, reader: Reader | None, documents: Documents, name: str, max_tokens: int | None = None
    ) -> None:
        self.max_tokens = max_tokens
        self.engine, self.reader, self.documents, self.name = engine, reader, documents, name
        self.llm: ServedLlama = engine.llm

    def _take_context(self) -> None:
        """A request without documents is going to use the context."""
        if self.reader is not None and self.reader.shelf is not None:
            self.reader.shelf.forget()
        if self.llm.loaded_chunks():
            self.llm.reset()  # type: ignore[no-untyped-call]

    def _limit(self, request: ChatRequest) -> int | None:
        return request.max_completion_tokens or request.max_tokens or self.max_tokens

    #
    # without documents
    #

    def chat(self, request: ChatRequest) -> Work:
        messages = [_plain(message.model_dump(exclude_none=True)) for message in request.messages]
        options = _options(request)
        limit = self._limit(request)
        if limit is not None:
            options["max_tokens"] = limit
        if request.logprobs:
            options |= dict(logprobs=True, top_logprobs=request.top_logprobs or 0)
        if request.response_format is not None:
            options["response_format"] = request.response_format.model_dump()
        tools, forced = tools_of(request)
        if tools:
            options["tools"] = tools
            if request.tool_choice is not None:
                options["tool_choice"] = "auto"
        if forced is not None:
            options.pop("response_format", None)
            if not tells_tools(self.llm):
                messages = _instructed(messages, forced.instruction)

        def make(stream: bool, seed: int | None) -> Any:
            more: dict[str, Any] = {} if seed is None else {"seed": seed}
            if forced is not None:
                more["grammar"] = forced.grammar
            with warnings.catch_warnings():  # that the model has no chat template was said when the server began
                warnings.simplefilter("ignore")
                return self.llm.create_chat_completion(messages, stream=stream, **options, **more)

        kind = "chat.completion"
        return self._work(request, kind, "chatcmpl", [make], bool(request.stream), forced)

    def complete(self, request: CompletionRequest) -> Work:
        given = request.prompt
        prompts: list[Any] = [given]
        if isinstance(given, list) and isinstance(given[0], (str, list)):
            prompts = list(given)
        options = _options(request) | request.given("suffix", "echo", "logprobs")
        options.setdefault("max_tokens", 16)

        def maker(prompt: Any) -> Callable[[bool, int | None], Any]:
            def make(stream: bool, seed: int | None) -> Any:
                more: dict[str, Any] = {} if seed is None else {"seed": seed}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return self.llm.create_completion(prompt, stream=stream, **options, **more)

            return make

        makers = [maker(prompt) for prompt in prompts]
        return self._work(request, "text_completion", "cmpl", makers, bool(request.stream))

    def _work(
        self,
        request: Sampling,
        kind: str,
        prefix: str,
        makers: Sequence[Callable[[bool, int | None], Any]],
        stream: bool,
        forced: Forced | None = None,
    ) -> Work:
        """n choices of each prompt, one after the other."""
        n = request.n or 1
        usage = request.stream_options is not None and request.stream_options.include_usage
        head = self._head(kind, prefix, stream)

        def work(job: Job) -> Iterator[dict[str, Any]]:
            self._take_context()
            choices = []
            for index in range(n * len(makers)):
                seed = None if request.seed is None else (request.seed + index) & 0xFFFFFFFF
                with _prompt_counted(job, index % n == 0):
                    made = makers[index // n](stream, seed)
                    spoken = Spoken(forced, False)
                    if not stream:
                        choices.append({**spoken.choice(made["choices"][0]), "index": index})
                        continue
                    for chunk in made:
                        said = [{**spoken.choice(choice), "index": index} for choice in chunk["choices"]]
                        yield {**head, "choices": said}
            if not stream:
                yield {**head, "choices": [_annotated(choice) for choice in choices], "usage": _usage(job)}
            elif usage:
                yield {**head, "choices": [], "usage": _usage(job)}

        return work

    def _head(self, kind: str, prefix: str, stream: bool) -> dict[str, Any]:
        if stream and kind == "chat.completion":
            kind = "chat.completion.chunk"
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}

    def embed(self, request: EmbeddingRequest) -> Work:
        if not self.llm.context_params.embeddings:
            raise Problem(400, "this model makes no embeddings", "no_embeddings")
        given = request.input
        texts: list[Any] = [given]
        if isinstance(given, list) and isinstance(given[0], (str, list)):
            texts = list(given)
        n_embd = self.llm.n_embd()
        if request.dimensions not in (None, n_embd):
            raise Problem(400, f"vectors of this model have {n_embd} dimensions", "invalid_value", param="dimensions")

        def work(job: Job) -> Iterator[dict[str, Any]]:
            if self.reader is not None and self.reader.shelf is not None:
                self.reader.shelf.forget()
            data = []
            for index, text in enumerate(texts):
                if isinstance(text, list):
                    text = self.llm.detokenize(text).decode(errors="ignore")
                vector, n_tokens = self.llm.embed(text, normalize=True, truncate=False, return_count=True)
                job.usage.prompt += n_tokens
                values: Any = vector
                if request.encoding_format == "base64":
                    values = base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
                data.append({"object": "embedding", "index": index, "embedding": values})
                job.check()
            n = job.usage.prompt
            yield {"object": "list", "data": data, "model": self.name, "usage": {"prompt_tokens": n, "total_tokens": n}}

        return work

    #
    # with documents
    #

    def ask(self, request: ChatRequest, asked: Asked) -> Work:
        """The answer to a question about documents."""
        reader, shelf = self.reader, self.documents.require()
        assert reader is not None
        stream, head = bool(request.stream), self._head("chat.completion", "chatcmpl", bool(request.stream))
        wants_usage = request.stream_options is not None and request.stream_options.include_usage
        options = request.given(*SAMPLING, "seed", "stop")
        options.setdefault("temperature", 0.0)
        limit = self._limit(request)
        if limit is not None:
            options["max_tokens"] = limit
        instructions = asked.instructions
        _, forced = tools_of(request)
        if forced is not None:  # others are not told of: none of them would be called
            # a chat template would have it before the documents, which are read already
            instructions = END.join(filter(None, (instructions, forced.instruction)))
        if request.logprobs:
            options["logprobs"] = request.top_logprobs or 0
        n = request.n or 1
        seed = options.pop("seed", None)
        documents = [document for document, _ in asked.documents]
        total = 0

        def chunk(
            delta: Mapping[str, Any], finish: str | None = None, index: int = 0, said: Any = None, **more: Any
        ) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": said, "finish_reason": finish}
            return {**head, "choices": [choice], **more}

        def work(job: Job) -> Iterator[dict[str, Any]]:
            nonlocal total
            done_before, index = job.computed_chunks, 0

            def progress(done: int, of: int) -> None:
                nonlocal total
                total = max(total, done_before + of)
                job.computed_chunks = done_before + done
                if stream and request.progress:
                    job.channel.put(("item", chunk({}, mesa={"progress": {
                        "state": "reading", "tokens_read": job.computed_chunks, "tokens": total}})))  # fmt: skip
                job.check()
                # what was read is kept: the others' turn, and then the rest; not between answers, of which something was said already
                if self.engine.others_wait and done < of and index == 0:
                    raise GiveWay

            form: Any = None if request.response_format is None else request.response_format.model_dump()
            if forced is not None:
                form = forced.grammar
            self.documents.forget_gone(shelf)
            self.documents.check_there(documents)
            mode = asked.read
            if mode is None:
                n_tokens = sum(row.n_tokens for document in documents for row in shelf.catalogue.rows(document))
                tail = reader.form.tail(asked.question, history=asked.history, instructions=instructions)
                n_needed = (
                    len(shelf.catalogue.preamble) + n_tokens + len(tail) + options.get("max_tokens", MAX_TOKENS) + SPARE
                )
                mode = "all" if n_needed <= self.llm.n_ctx() else "auto"
            choices: list[dict[str, Any]] = []
            stands = True
            for index in range(n):
                done_before = job.computed_chunks
                more = {} if seed is None else {"seed": (seed + index) & 0xFFFFFFFF}
                with (
                    _prompt_counted(job, index == 0),
                    reader.ask(
                        asked.question,
                        documents=documents,
                        read=mode,
                        history=asked.history,
                        instructions=instructions,
                        response_format=form,
                        progress=progress,
                        **options,
                        **more,
                    ) as pieces,
                ):
                    spoken = Spoken(forced, request.logprobs is True)
                    if stream:
                        yield chunk(spoken.begin(), index=index)
                    for piece in pieces:
                        if stream:
                            yield chunk(spoken.delta(piece), index=index, said=spoken.logprobs(pieces.logprobs))
                    answer = pieces.answer
                finish = answer.finish_reason if answer.finish_reason != "closed" else "stop"
                said = {"annotations": self._annotations(answer, asked)}
                about, told = _mesa(answer, job.computed_chunks), spoken.logprobs(answer.logprobs)
                stands = stands and answer.stands
                if stream:
                    yield chunk({**spoken.end(), **said}, spoken.reason(finish), index, told, mesa=about)
                else:
                    message = {**spoken.whole(answer.text), **said}
                    reason = spoken.reason(finish)
                    choices.append({"index": index, "message": message, "logprobs": told, "finish_reason": reason})
            self.engine.metrics.computed.labels("document").inc(job.computed_chunks)
            # they were in the context, but read for this
            job.usage.cached -= min(job.computed_chunks, job.usage.cached)
            usage = _usage(job)
            if not stream:
                yield {**head, "choices": choices, "usage": usage, "mesa": {**about, "stands": stands}}
            elif wants_usage:
                yield {**head, "choices": [], "usage": usage}

        return work

    def _annotations(self, answer: Answer, asked: Asked) -> list[dict[str, Any]]:
        found = []
        for index, citation in enumerate(answer.citations):
            file_id = self._file_of(citation.document_id, asked)
            found.append({
                "type": "file_citation", "index": index, "file_id": file_id, "filename": citation.document,
                "page": citation.page, "heading": list(citation.heading), "start": citation.start, "stop": citation.stop,
                "quote": citation.text, "weight": citation.weight, "literal": citation.literal,
            })  # fmt: skip
        return found

    def _file_of(self, number: int, asked: Asked) -> str | None:
        """The file that a citation's document is of."""
        for document, file_id in asked.documents:
            if document.id == number and file_id is not None:
                return file_id
        files = self.documents.records.files_of(number)
        return files[0].id if files else None


def _options(request: Sampling) -> dict[str, Any]:
    return request.given(*SAMPLING, "stop", "max_tokens")


def _instructed(messages: list[dict[str, Any]], instruction: str) -> list[dict[str, Any]]:
    """The messages with something more that the model is told: in the user's last one, as some chat templates refuse a system's."""
    at = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)
    said = messages[at].get("content") or ""
    text = said if isinstance(said, str) else "\n".join(part["text"] for part in said)
    told = {**messages[at], "content": END.join(filter(None, (text, instruction)))}
    return [*messages[:at], told, *messages[at + 1 :]]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list) and any(part["type"] != "text" for part in content):
        raise Problem(400, "a message has a file, and this request cannot be about documents", "invalid_value")
    if message["role"] == "developer":  # OpenAI's newer word for it, which chat templates do not know
        return {**message, "role": "system"}
    return message


@contextlib.contextmanager
def _prompt_counted(job: Job, counts: bool) -> Iterator[None]:
    """Further choices of a prompt are made of the same one: it is counted once."""
    before = job.usage.prompt, job.usage.cached
    yield
    if not counts:
        job.usage.prompt, job.usage.cached = before


def _annotated(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message")
    if message is None:
        return choice
    return {**choice, "message": {**message, "annotations": []}}


def _usage(job: Job) -> dict[str, Any]:
    usage = job.usage
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def _mesa(answer: Answer, computed: int) -> dict[str, Any]:
    read = answer.read
    if read is None:
        return {"read": None, "said": "", "stands": answer.stands}
    reused = max(0, read.tokens_computed + read.tokens_reused - computed)
    fields = {**asdict(read), "tokens_computed": computed, "tokens_reused": reused}
    return {"read": fields, "said": str(read), "stands": answer.stands}
