"""What the model does for a request: work for the engine's thread, which yields OpenAI's objects."""

from __future__ import annotations

import base64
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..library.library import Document
from ..reading.prompts import Turn
from ..reading.reader import MAX_TOKENS, Answer, Reader
from ..reading.shelf import ReadMode
from .documents import Documents
from .engine import Engine, GiveWay, Job, Work
from .problems import Problem
from .schemas import SAMPLING, ChatRequest, CompletionRequest, EmbeddingRequest, Sampling, ToolChoice
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
    """

    def __init__(self, engine: Engine, reader: Reader | None, documents: Documents, name: str) -> None:
        self.engine, self.reader, self.documents, self.name = engine, reader, documents, name
        self.llm: ServedLlama = engine.llm

    def _take_context(self) -> None:
        """A request without documents is going to use the context."""
        if self.reader is not None and self.reader.shelf is not None:
            self.reader.shelf.forget()
        if self.llm.loaded_chunks():
            self.llm.reset()  # type: ignore[no-untyped-call]

    #
    # without documents
    #

    def chat(self, request: ChatRequest) -> Work:
        messages = [_plain(message.model_dump(exclude_none=True)) for message in request.messages]
        options = _options(request)
        if request.max_completion_tokens is not None:
            options["max_tokens"] = request.max_completion_tokens
        if request.logprobs:
            options |= dict(logprobs=True, top_logprobs=request.top_logprobs or 0)
        if request.response_format is not None:
            options["response_format"] = request.response_format.model_dump()
        choice = request.tool_choice
        if request.tools and choice != "none":
            tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
            options["tools"] = tools
            if choice == "required":
                if len(tools) > 1:
                    raise Problem(400, "tool_choice names one of several tools", "invalid_value", param="tool_choice")
                choice = ToolChoice.model_validate(
                    {"type": "function", "function": {"name": tools[0]["function"]["name"]}}
                )
            if isinstance(choice, ToolChoice):
                if all(tool["function"]["name"] != choice.function.name for tool in tools):
                    raise Problem(400, f"there is no tool {choice.function.name}", "invalid_value", param="tool_choice")
                options["tool_choice"] = choice.model_dump()
            elif choice is not None:
                options["tool_choice"] = choice
        elif isinstance(choice, ToolChoice) or choice == "required":
            raise Problem(400, "tool_choice without tools", "invalid_value", param="tool_choice")

        def make(stream: bool, seed: int | None) -> Any:
            more = {} if seed is None else {"seed": seed}
            with warnings.catch_warnings():  # that the model has no chat template was said when the server began
                warnings.simplefilter("ignore")
                return self.llm.create_chat_completion(messages, stream=stream, **options, **more)

        kind = "chat.completion"
        return self._work(request, kind, "chatcmpl", [make], bool(request.stream))

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
    ) -> Work:
        """n choices of each prompt, one after the other."""
        runs = [make for make in makers for _ in range(request.n or 1)]
        usage = request.stream_options is not None and request.stream_options.include_usage
        head = self._head(kind, prefix, stream)

        def work(job: Job) -> Iterator[dict[str, Any]]:
            self._take_context()
            choices = []
            for index, make in enumerate(runs):
                seed = None if request.seed is None else (request.seed + index) & 0xFFFFFFFF
                made = make(stream, seed)
                if not stream:
                    choices.append({**made["choices"][0], "index": index})
                    continue
                for chunk in made:
                    yield {**head, "choices": [{**choice, "index": index} for choice in chunk["choices"]]}
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
        for name in ("tools", "response_format", "logprobs"):
            value = getattr(request, name)
            if value and getattr(value, "type", None) != "text":
                raise Problem(400, f"{name} cannot be used with documents", "unsupported", param=name)
        if (request.n or 1) > 1:
            raise Problem(400, "n is 1 with documents", "unsupported", param="n")
        reader, shelf = self.reader, self.documents.require()
        assert reader is not None
        stream, head = bool(request.stream), self._head("chat.completion", "chatcmpl", bool(request.stream))
        wants_usage = request.stream_options is not None and request.stream_options.include_usage
        options = request.given(*SAMPLING, "seed", "stop")
        options.setdefault("temperature", 0.0)
        limit = request.max_completion_tokens or request.max_tokens
        if limit is not None:
            options["max_tokens"] = limit
        if "seed" in options:
            options["seed"] &= 0xFFFFFFFF
        documents = [document for document, _ in asked.documents]
        total = 0

        def chunk(delta: Mapping[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
            return {
                **head,
                "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
                **more,
            }

        def work(job: Job) -> Iterator[dict[str, Any]]:
            nonlocal total
            done_before = job.computed_chunks

            def progress(done: int, of: int) -> None:
                nonlocal total
                total = max(total, done_before + of)
                job.computed_chunks = done_before + done
                if stream and request.progress:
                    job.channel.put(("item", chunk({}, mesa={"progress": {
                        "state": "reading", "tokens_read": job.computed_chunks, "tokens": total}})))  # fmt: skip
                job.check()
                # what was read is kept: the others' turn, and then the rest
                if self.engine.others_wait and done < of:
                    raise GiveWay

            self.documents.forget_gone(shelf)
            self.documents.check_there(documents)
            mode = asked.read
            if mode is None:
                n_tokens = sum(row.n_tokens for document in documents for row in shelf.catalogue.rows(document))
                tail = reader.form.tail(asked.question, history=asked.history, instructions=asked.instructions)
                n_needed = (
                    len(shelf.catalogue.preamble) + n_tokens + len(tail) + options.get("max_tokens", MAX_TOKENS) + SPARE
                )
                mode = "all" if n_needed <= self.llm.n_ctx() else "auto"
            with reader.ask(
                asked.question,
                documents=documents,
                read=mode,
                history=asked.history,
                instructions=asked.instructions,
                progress=progress,
                **options,
            ) as pieces:
                if stream:
                    yield chunk({"role": "assistant", "content": ""})
                for piece in pieces:
                    if stream:
                        yield chunk({"content": piece})
                answer = pieces.answer
            self.engine.metrics.computed.labels("document").inc(job.computed_chunks)
            job.usage.cached -= min(
                job.computed_chunks, job.usage.cached
            )  # they were in the context, but read for this
            finish = answer.finish_reason if answer.finish_reason != "closed" else "stop"
            said = {"annotations": self._annotations(answer, asked)}
            more = {"mesa": _mesa(answer, job.computed_chunks)}
            usage = _usage(job)
            if not stream:
                message = {"role": "assistant", "content": answer.text, **said}
                choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
                yield {**head, "choices": [choice], "usage": usage, **more}
                return
            yield chunk(said, finish, **more)
            if wants_usage:
                yield {**head, "choices": [], "usage": usage}

        return work

    def _annotations(self, answer: Answer, asked: Asked) -> list[dict[str, Any]]:
        found = []
        for index, citation in enumerate(answer.citations):
            file_id = self._file_of(citation.document, citation.start, citation.stop, citation.text, asked)
            found.append({
                "type": "file_citation", "index": index, "file_id": file_id, "filename": citation.document,
                "page": citation.page, "heading": list(citation.heading), "start": citation.start, "stop": citation.stop,
                "quote": citation.text, "weight": citation.weight, "literal": citation.literal,
            })  # fmt: skip
        return found

    def _file_of(self, name: str, start: int, stop: int, text: str, asked: Asked) -> str | None:
        """The file that a citation is of: a name may be that of several documents."""
        named = [(document, file_id) for document, file_id in asked.documents if document.name == name]
        if len(named) > 1:
            named = [(d, f) for d, f in named if self.documents.library.text(d)[start:stop] == text] or named
        if not named:
            return None
        document, file_id = named[0]
        if file_id is None:
            files = self.documents.records.files_of(document.id)
            file_id = files[0].id if files else None
        return file_id


def _options(request: Sampling) -> dict[str, Any]:
    return request.given(*SAMPLING, "stop", "max_tokens")


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list) and any(part["type"] != "text" for part in content):
        raise Problem(400, "a message has a file, and this request cannot be about documents", "invalid_value")
    return message


def _annotated(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message")
    return choice if message is None else {**choice, "message": {**message, "annotations": []}}


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
