"""What sentences mean, by an embedding model: an extra, for questions in other words than the documents have.

An embedding model turns a text into one vector, and is trained so that a question and a passage that answers it are near each other. Each sentence
is embedded alone: neighbours blur it, and cost twice the time; whether they belong to the answer is seen when the likelihood of the question behind them
is computed. A vector depends on the embedding model, the text and what stands before it, and on nothing of the model that answers. So it is kept in the
library, and serves each question again.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from .. import rpc
from ..config import MesaConfig
from ..embedding import encode
from ..errors import ConfigError, ModelError
from ..library.library import Library
from ..library.schema import seal
from ..library.store import EMBEDDINGS, LibraryError, chunk_key
from ..llama import MesaLlama
from ..model.fingerprint import model_fingerprint
from ..model.header import Header, check_model
from .similar import outstanding, sentences_of

VERSION = 1  # of what is kept: other sentences, another way to make a vector
MOST_TOKENS = 512  # of a passage and what stands before it: the rest of a longer one is left out
N_ASKED = 16  # questions whose vectors are remembered

# what well-known families were trained with, before a question and before a passage, by the file's general.name or general.basename
_FOR_SEARCH = "Represent this sentence for searching relevant passages: "
FAMILIES: tuple[tuple[str, tuple[str, str]], ...] = (
    (r"nomic-embed-text|modernbert-embed", ("search_query: ", "search_document: ")),
    (r"e5-(small|base|large)(?!.*instruct)", ("query: ", "passage: ")),
    (r"bge-(small|base|large)-en|mxbai-embed-large|snowflake-arctic-embed(?!.*v2)", (_FOR_SEARCH, "")),
    (r"embedding-?gemma", ("task: search result | query: ", "title: none | text: ")),
    (
        r"qwen3-embedding",
        (
            "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
            "",
        ),
    ),
)

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.float16]
Progress = Callable[[int, int], None]


def prefixes_of(metadata: Mapping[str, Any]) -> tuple[str, str]:
    """What stands before a question and before a passage, by the names in a GGUF file; nothing for a family that is not known."""
    names = (str(metadata.get(f"general.{key}", "")).lower() for key in ("name", "basename"))
    called = " ".join(re.sub(r"[^a-z0-9]+", "-", name) for name in names)
    return next((found for pattern, found in FAMILIES if re.search(pattern, called)), ("", ""))


class EmbeddingModel:
    """A model that makes vectors of texts, by stock llama.cpp: encoders (BERT, nomic-bert and others) and decoders. Its weights are loaded when the
    first text is embedded.

    The vectors of a text's tokens become one as the file says (pooling_type), by their mean where it says nothing.

    Args:
        path: a GGUF file.
        query, passage: what stands before each question and before each passage; None: what the file's family was trained with
            (`FAMILIES`), as far as it is known.
        options: of `MesaLlama`: n_threads, n_threads_batch, n_gpu_layers (default: all layers, where there is a GPU), verbose.

    Attributes:
        interrupt: as that of `MesaLlama`.

    Raises:
        ModelError: the file cannot be used, or makes no embeddings.
    """

    interrupt: Callable[[], object] | None = None

    def __init__(
        self, path: str | os.PathLike[str], *, query: str | None = None, passage: str | None = None, **options: Any
    ) -> None:
        self.path = Path(path)
        header = check_model(self.path)
        self.fingerprint = model_fingerprint(self.path)
        self._pooling_type = _pooling_type(header)
        self._limit = min(MOST_TOKENS, header.train_length or MOST_TOKENS)
        known = prefixes_of(header.metadata)
        self.query, self.passage = (own if own is not None else of for own, of in zip((query, passage), known))
        for prefix in (self.query, self.passage):
            encode(prefix)
        self._options = options
        self._llm: MesaLlama | None = None

    def close(self) -> None:
        """Free the weights. They are loaded again when they are needed."""
        if self._llm is not None:
            self._llm.close()
            self._llm = None

    def __enter__(self) -> EmbeddingModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of_question(self, question: str) -> Floats:
        """The vector of a question [width]."""
        (vector,) = self.embed([self.query + question])
        return np.asarray(vector)

    def of_sentences(self, text: str) -> Rows:
        """The vectors of a chunk's sentences [n_sentences, width]."""
        sentences = (sentence.text.strip() for sentence in sentences_of(0, text))
        return self.embed([self.passage + sentence for sentence in sentences]).astype(np.float16)

    def embed(self, texts: Sequence[str]) -> Floats:
        """A vector of length 1 for each text, as it stands there [n_texts, width].

        Raises:
            ModelError: the file is gone, or another one.
            MesaError: the model cannot be loaded.
        """
        llm = self._open()
        found = np.zeros((len(texts), llama_cpp.llama_model_n_embd_out(llm.model)), np.float32)
        batch: dict[int, list[int]] = {}
        n_tokens = 0
        for i, text in enumerate(texts):
            tokens = self._cut(llm, llm.tokenize(encode(text)))
            if n_tokens + len(tokens) > llm.n_batch or len(batch) == llm.context_params.n_seq_max:
                _read(llm, batch, found)
                batch, n_tokens = {}, 0
            if tokens:
                batch[i] = tokens
                n_tokens += len(tokens)
        if batch:
            _read(llm, batch, found)
        found = np.nan_to_num(found)
        return np.asarray(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9), np.float32)

    def _cut(self, llm: MesaLlama, tokens: list[int]) -> list[int]:
        """What there is room for; the token that ends each text stays, for some models' vector is that of the last one."""
        if len(tokens) <= self._limit:
            return tokens
        vocab = llm._model.vocab
        ends = tokens[-1] in (llama_cpp.llama_vocab_sep(vocab), llama_cpp.llama_vocab_eos(vocab))
        return [*tokens[: self._limit - 1], tokens[-1]] if ends else tokens[: self._limit]

    def _open(self) -> MesaLlama:
        if self._llm is None:
            if model_fingerprint(self.path) != self.fingerprint:
                raise ModelError(f"{self.path}: another file is there now than the embedding model was: begin again")
            options = {"n_gpu_layers": -1 if rpc.has_gpu() else 0, **self._options}
            self._llm = MesaLlama(
                self.path,
                mesa=MesaConfig(enabled=False),
                embedding=True,
                pooling_type=self._pooling_type,
                n_ctx=MOST_TOKENS,
                n_batch=MOST_TOKENS,
                n_ubatch=MOST_TOKENS,
                **options,
            )
        self._llm.interrupt = self.interrupt
        return self._llm


def _pooling_type(header: Header) -> int:
    """How the vectors of tokens become one: as the file says, else by their mean.

    Raises:
        ModelError: they do not, whatever it says.
    """
    _ = header.llama_cpp_view  # raises if llama.cpp cannot load it
    if header.architecture == "t5":
        raise ModelError(
            f"{header.path}: this model (architecture t5) writes, and makes no embeddings: give an embedding model, or its encoder alone"
        )
    if header.metadata.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":
        raise ModelError(f"{header.path}: this model has no vocabulary: give an embedding model, which reads text")
    found = header.number("pooling_type", llama_cpp.LLAMA_POOLING_TYPE_NONE)
    if found == llama_cpp.LLAMA_POOLING_TYPE_RANK:
        raise ModelError(f"{header.path}: this model ranks passages, and makes no embeddings: give an embedding model")
    usual = (llama_cpp.LLAMA_POOLING_TYPE_CLS, llama_cpp.LLAMA_POOLING_TYPE_LAST)
    return found if found in usual else int(llama_cpp.LLAMA_POOLING_TYPE_MEAN)


def _read(llm: MesaLlama, texts: Mapping[int, Sequence[int]], found: Floats) -> None:
    """Read some texts beside each other, in one batch, and put their vectors into the rows of their numbers."""
    llm._batch.reset()
    for n, tokens in enumerate(texts.values()):
        llm._batch.add_sequence(tokens, n, True)
    llm._ctx.kv_cache_clear()
    llm._compute()
    for n, i in enumerate(texts):
        vector = llama_cpp.llama_get_embeddings_seq(llm._ctx.ctx, n)
        found[i] = np.ctypeslib.as_array(vector, shape=found.shape[1:])


class Embeddings:
    """The vectors of sentences, kept in a library.

    Args:
        model: makes those that are not there yet.
    """

    def __init__(self, model: EmbeddingModel, library: Library) -> None:
        if not isinstance(model, EmbeddingModel):
            raise ConfigError(f"embedding is of the type {type(model).__name__}: it must be an EmbeddingModel")
        self.model, self.library = model, library
        self._owner = f"{model.fingerprint}:{EMBEDDINGS}"
        library.index.preamble(self._owner, model.path.name, [])  # nothing stands before a chunk: for its name
        self._held: dict[str, Rows] = {}  # of the chunks that were asked about last
        self._asked: dict[str, Floats] = {}

    def key(self, text: str) -> str:
        """The name under which the vectors of a chunk lie."""
        parts = self.model.fingerprint, EMBEDDINGS, VERSION, self.model.passage, seal(text)
        return chunk_key(*parts, tokens=[], preamble=[])

    def n_kept(self, texts: Iterable[str]) -> int:
        """How many chunks are embedded already."""
        return sum(self.key(text) in self.library.store for text in texts)

    def make(
        self,
        chunks: Mapping[str, int],
        progress: Progress | None = None,
        *,
        in_use: Collection[str] = (),
        ahead: bool = False,
    ) -> list[str]:
        """Embed the chunks that are not embedded yet, and keep each at once: a line for what could not be kept.

        Args:
            chunks: texts, and the tokens of each, for the progress.
            progress: called with (tokens embedded, tokens to embed) after each chunk; what it raises ends the work there.
            in_use: keys of other chunks that are not dropped for these.
            ahead: no question waits for them: it ends at the first one that cannot be kept.
        """
        keys = {text: self.key(text) for text in chunks}
        lacking = [text for text, key in keys.items() if key not in self._held and key not in self.library.store]
        total, done = sum(chunks[text] for text in lacking), 0
        notes: list[str] = []
        for text in lacking:
            rows = self.model.of_sentences(text)
            try:
                self.library.keep(keys[text], self._owner, 0, rows.tobytes(), in_use=[*in_use, *keys.values()])
            except LibraryError as err:  # no room, or it cannot be written to
                notes = [str(err)]
                if ahead:
                    break
                self._held[keys[text]] = rows
            done += chunks[text]
            if progress is not None:
                progress(done, total)
        return notes

    def near(self, question: str, chunks: Sequence[tuple[str, int]], progress: Progress | None = None) -> Floats:
        """How near each sentence of some chunks, one chunk after the other, is to a question, as `outstanding` counts [n_sentences].

        Args:
            chunks: the text of each, and its tokens.
            progress: as `make` has it.
        """
        self.make(dict(chunks), progress)
        if question not in self._asked:
            while len(self._asked) >= N_ASKED:
                del self._asked[next(iter(self._asked))]
            self._asked[question] = self.model.of_question(question)
        asked = self._asked[question]
        keys = [self.key(text) for text, _ in chunks]
        by_key = {key: text for key, (text, _) in zip(keys, chunks)}
        self._held = {key: self._rows(key, text, len(asked)) for key, text in by_key.items()}
        with contextlib.suppress(LibraryError):  # the answer does not need this
            self.library.index.note_used(list(by_key), self._owner)
        scores = {key: rows.astype(np.float32) @ asked for key, rows in self._held.items()}
        return outstanding(np.concatenate([scores[key] for key in keys]))

    def _rows(self, key: str, text: str, width: int) -> Rows:
        """The vectors of a chunk; where what is kept is gone or damaged, they are made again."""
        if key in self._held:
            return self._held[key]
        data = self.library.rows(key, 0) if key in self.library.store else None
        if data is not None and len(data) == 2 * width * len(sentences_of(0, text)):
            kept: Rows = np.frombuffer(data, np.float16).reshape(-1, width)
            if np.isfinite(kept).all():
                return kept
        if data is not None:
            self.library.store.clear(key)
        rows = self.model.of_sentences(text)
        with contextlib.suppress(LibraryError):
            self.library.keep(key, self._owner, 0, rows.tobytes())
        return rows
