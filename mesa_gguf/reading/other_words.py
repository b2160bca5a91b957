"""What a question may be called in other words, by the model itself.

A model knows more of words than its embeddings tell: shown a few examples, even a small one goes on with "lawyer" after "attorney:", and writes
a sentence that may answer a question, in the words of a text. Neither has to be right. What counts is which words are likelier there than elsewhere.
Small models repeat the question's words. So it writes another sentence that must not have them: "The student chose …" where it is asked what a young woman chose.
That reads the question once, and a few tokens for each of its words, however long the documents are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..library.index import terms_of
from ..llama import MesaLlama
from .values import N_LAYERS, Written, folded

SENTENCE_TOKENS = 20  # of what may answer a question, at most
WORD_TOKENS = 16  # longest word of a question that is looked at

Tokenize = Callable[[str], Sequence[int]]
Floats = npt.NDArray[np.float32]

TASK = "Each question is asked in other words than the text has.\n\n"
EXAMPLES = (
    (
        "Who bought the big automobile?",
        "The large car was purchased by Harold Miller.",
        (("bought", "purchased"), ("big", "large"), ("automobile", "car")),
    ),
    (
        "How quickly must an infant be fed?",
        "The baby gets its milk every 3 hours.",
        (("quickly", "fast"), ("infant", "baby"), ("fed", "milk")),
    ),
    (
        "Which city did the physician travel to?",
        "The doctor went on a journey to Vienna.",
        (("city", "town"), ("physician", "doctor"), ("travel", "journey")),
    ),
    (
        "What did the constable shout?",
        '"Stop the train!" cried the police officer.',
        (("constable", "police"), ("shout", "cried")),
    ),
    (
        "When was the film director arrested?",
        "The movie producer was taken to prison in 1974.",
        (("film", "movie"), ("director", "producer"), ("arrested", "prison")),
    ),
)


@dataclass(frozen=True)
class OtherWords:
    """What a model makes of a question.

    Attributes:
        likely: for each of the question's words, in their order, by how much likelier each token of the vocabulary is as another word for it
            than it is elsewhere: a difference of log-probabilities [n_words, n_vocab].
        sentence: that may answer the question.
        expected: by how much likelier each token was somewhere in that sentence [n_vocab].
        written: that sentence, and the values of its tokens; None where nothing was written.
    """

    likely: Floats
    sentence: str
    expected: Floats
    written: Written | None = None


class Thesaurus:
    """A model that is shown examples of other words. It takes over the model's context.

    Args:
        room: tokens that the model reads plainly.
    """

    def __init__(self, llm: MesaLlama, tokenize: Tokenize, room: int) -> None:
        self._llm, self._tokenize, self._room = llm, tokenize, min(room, llm.n_ctx())
        self.tokens: list[int] = llm.tokenize(b"")
        self._at_word: list[int] = []  # where the examples go on with another word,
        self._at_text: list[int] = []  # and where with a sentence
        self._add(TASK)
        for question, sentence, words in EXAMPLES:
            self._add(_question(question))
            self._at_text += self._add("Text:")[-1:]
            self._at_text += self._add(f" {sentence}\n")[:-2]
            for word, other in words:
                self._at_word += self._add(f"{word}:")[-1:]
                self._add(f" {other}\n")
            self._add("\n")

    def _add(self, text: str) -> list[int]:
        """The places of its tokens."""
        start = len(self.tokens)
        self.tokens += self._tokenize(text)
        return list(range(start, len(self.tokens)))

    def has_room(self, question: str) -> bool:
        n_asked = len(self._tokenize(_question(question)))
        return len(self.tokens) + n_asked + max(SENTENCE_TOKENS, WORD_TOKENS) + 2 < self._room

    def learn(self) -> bytes:
        """Read the examples, in an empty context: what `load` takes."""
        wanted = {place: 0 for place in self._at_word} | {place: 1 for place in self._at_text}
        sums = np.zeros((2, self._llm.n_vocab()), np.float32)

        def look(start: int, logits: npt.NDArray[np.single]) -> None:
            for i, row in enumerate(logits, start):
                if i in wanted:
                    sums[wanted[i]] += self._llm.logits_to_logprobs(row)

        self._llm._eval(self._llm._announce(self.tokens), look=look)
        usual = (sums / [[len(self._at_word)], [len(self._at_text)]]).astype(np.float16)
        self._usual = usual.astype(np.float32)
        return self._llm.save_chunk(0, len(self.tokens)) + usual.tobytes()

    def load(self, data: bytes) -> None:
        """Bring the examples into an empty context."""
        usual = data[len(data) - 4 * self._llm.n_vocab() :]
        rows = memoryview(data)[: len(data) - len(usual)]
        self._llm.load_chunk(self.tokens, rows)
        self._usual = np.frombuffer(usual, np.float16).reshape(2, -1).astype(np.float32)

    def ask(self, question: str) -> OtherWords:
        """What the model makes of a question, behind the examples."""
        llm = self._llm
        start = self._read(question)
        words = []
        for word in terms_of(question):
            llm.n_tokens = start
            llm.eval(self._tokenize(f"{word}:")[-WORD_TOKENS:])
            words.append(llm.logits_to_logprobs(llm._get_logits(llm.n_tokens - 1)))
        likely = np.stack(words)
        # what is likely for each of its words is so because of the question, or of the examples
        likely -= (likely.mean(axis=0) + self._usual[0]) / 2
        llm.n_tokens = start
        sentence, expected, written = self._write(())
        return OtherWords(likely, sentence, expected - self._usual[1], written)

    def avoiding(self, question: str) -> Written | None:
        """Another sentence that may answer a question, with none of its words; None where nothing is written."""
        self._read(question)
        return self._write(terms_of(question))[2]

    def _read(self, question: str) -> int:
        """A question behind the examples, and nothing behind it: where it ends, in tokens."""
        self._llm.n_tokens = len(self.tokens)
        self._llm.eval(self._tokenize(_question(question)))
        return self._llm.n_tokens

    def _write(self, avoided: Sequence[str]) -> tuple[str, Floats, Written | None]:
        """A sentence behind what was read -> it, how likely each token was somewhere in it at most, and it with the values of its tokens.

        Args:
            avoided: words that it must not have.
        """
        llm = self._llm
        llm.eval(self._tokenize("Text:"))
        start = llm.n_tokens
        logits = llm._get_logits(llm.n_tokens - 1).copy()
        expected = np.full(llm.n_vocab(), -np.inf, np.float32)
        said = b""
        for _ in range(SENTENCE_TOKENS):
            expected = np.maximum(expected, llm.logits_to_logprobs(logits))
            token = int(logits.argmax())
            while avoided and _begins(llm.token_bytes(token), avoided):
                logits[token] = -np.inf
                token = int(logits.argmax())
            piece = llm.token_bytes(token)
            if b"\n" in piece or llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
                break
            said += piece
            llm.eval([token])
            logits = llm._get_logits(llm.n_tokens - 1).copy()
        written = self._written(start) if said else None
        return said.decode("utf-8", "replace").strip(), expected, written

    def _written(self, start: int) -> Written:
        """What the context holds from a place on."""
        llm = self._llm
        n = llm.n_tokens - start
        rows = llm.save_chunk(start, llm.n_tokens)
        data = b"".join(rows[at : at + size] for at, size in llm.chunk_values_at(n, N_LAYERS))
        return Written(llm.input_ids[start : llm.n_tokens].tolist(), folded(llm.chunk_values(data, n, N_LAYERS)))


def _begins(piece: bytes, words: Sequence[str]) -> bool:
    """Whether a token begins one of some words, or a form of it."""
    text = piece.decode("utf-8", "replace")
    part = text.strip().casefold()
    if len(part) < 3 or not (text[0] == " " or text[0].isupper()):
        return False
    return any(
        part == word or (len(part) > 3 and (word.startswith(part) or part.startswith(word[: max(4, len(word) - 2)])))
        for word in words
    )


def _question(question: str) -> str:
    return f"Question: {question}\n"
