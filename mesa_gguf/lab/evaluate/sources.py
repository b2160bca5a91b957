"""A document that questions are asked behind: read in one go, or kept in a library of which each question reads a part."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import llama_cpp

from ...library.library import Library
from ...llama import MesaLlama
from ...reading.prompts import PromptForm, gap_after
from ...reading.reader import Reader
from ...reading.shelf import Catalogue, ReadMode, Shelf
from ..methods import Setting, open_model

KEPT_ROOM = 512
"""Tokens of a context beside a document in chunks: for a question, its answer, and borders between tokens."""


class Source(Protocol):
    """A document that was read, and questions behind it.

    Attributes:
        n_read: its tokens.
        read_s: seconds that reading it took.
    """

    n_read: int
    read_s: float

    def put(self, question: str, tail: Sequence[int], max_tokens: int) -> tuple[int, list[int]]:
        """Make the context hold what a question reads.

        Args:
            tail: the question as token ids, and what the answer begins with.
            max_tokens: room for the answer.

        Returns:
            How many tokens of the context that is, and those that come behind them.
        """

    def write(self, question: str, tail: Sequence[int], max_tokens: int, stop: Sequence[str]) -> tuple[str, int]:
        """The answer as the model writes it, and the tokens before it."""

    def follow_up(self, question: str, tail: Sequence[int], max_tokens: int, stop: Sequence[str]) -> str:
        """The answer to the next question of a conversation."""


def open_for(path: Path, setting: Setting, length: int, overrides: Mapping[str, Any], **llama_kwargs: Any) -> MesaLlama:
    """The model with which a setting reads documents whose prompt and answer have `length` tokens: see `open_model`."""
    kept = setting.read is not None
    n_tokens = length + KEPT_ROOM * kept
    return open_model(path, setting.method.name, n_tokens, overrides=overrides, kept=kept, **llama_kwargs)


@contextmanager
def open_source(
    llm: MesaLlama, form: PromptForm, head: list[int], text: str, read: ReadMode | None
) -> Iterator[Source]:
    """Read a document.

    Args:
        head: the document as a prompt's head, for reading in one go.
        text: the document, for a library.
        read: how much of it a question reads; None: it is read in one go.
    """
    if read is None:
        yield _Whole(llm, form, head)
        return
    with tempfile.TemporaryDirectory(prefix="mesa-eval-") as folder, Library(folder) as library:
        yield _Kept(llm, form, text, library, read)


class _Whole:
    """A document in one go."""

    def __init__(self, llm: MesaLlama, form: PromptForm, head: list[int]) -> None:
        self._reader = Reader(llm, form=form)
        self.n_read = len(head)
        self.read_s = self._reader.read(head).seconds

    def put(self, question: str, tail: Sequence[int], max_tokens: int) -> tuple[int, list[int]]:
        return self.n_read, list(tail)

    def write(self, question: str, tail: Sequence[int], max_tokens: int, stop: Sequence[str]) -> tuple[str, int]:
        answer = self._reader.ask(tail, max_tokens=max_tokens, stop=stop).answer
        return answer.text, self.n_read + len(tail)

    def follow_up(self, question: str, tail: Sequence[int], max_tokens: int, stop: Sequence[str]) -> str:
        return self._reader.ask(question, max_tokens=max_tokens, stop=stop, follow_up=True).answer.text


class _Kept:
    """A document in a library: its chunks are read once, and each question reads some of them, or all."""

    def __init__(self, llm: MesaLlama, form: PromptForm, text: str, library: Library, read: ReadMode) -> None:
        catalogue = Catalogue(llm, form, library)
        self._shelf, self._form, self._read = Shelf(llm, catalogue), form, read
        self._documents = [library.add_text(text, "document")]
        start = time.perf_counter()
        pieces = catalogue.select("", self._documents, "each").pieces
        self._shelf.read(pieces)
        self.read_s = time.perf_counter() - start
        self.n_read = len(catalogue.preamble) + sum(len(piece.tokens) for piece in pieces)

    def put(self, question: str, tail: Sequence[int], max_tokens: int) -> tuple[int, list[int]]:
        catalogue = self._shelf.catalogue
        room = self._shelf.llm.n_ctx() - len(catalogue.preamble) - len(tail) - max_tokens
        selection = catalogue.select(question, self._documents, self._read, room=room, model=self._shelf)
        head, _, _ = self._shelf.put_together(selection.pieces)
        return len(head), [*self._form.tokenize(gap_after(selection.pieces[-1].text)), *tail]

    def write(self, question: str, tail: Sequence[int], max_tokens: int, stop: Sequence[str]) -> tuple[str, int]:
        n_read, asked = self.put(question, tail, max_tokens)
        llm = self._shelf.llm
        prompt = [*llm.input_ids[:n_read].tolist(), *asked]
        return _written(llm, prompt, max_tokens, stop), len(prompt)

    def follow_up(self, question: str, tail: Sequence[int], max_tokens: int, stop: Sequence[str]) -> str:
        """Each question reads chunks of its own, so none follows another."""
        return self.write(question, tail, max_tokens, stop)[0]


def _written(llm: MesaLlama, prompt: list[int], max_tokens: int, stop: Sequence[str]) -> str:
    """The likeliest continuation of a prompt, up to the end of generation or one of the strings."""
    tokens: list[int] = []
    for token in llm.generate(prompt, temp=0.0):
        if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
            break
        tokens.append(token)
        text = llm.detokenize(tokens).decode(errors="ignore")
        ends = [text.index(end) for end in stop if end in text]
        if ends:
            return text[: min(ends)].strip()
        if len(tokens) == max_tokens:
            break
    return llm.detokenize(tokens).decode(errors="ignore").strip()
