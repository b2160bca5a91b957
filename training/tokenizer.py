"""The vocabulary: llama-3 pre-tokenization, whole words where they are known, byte-level BPE elsewhere.

llama.cpp reads it as ``tokenizer.ggml.model = gpt2``, ``tokenizer.ggml.pre = llama-bpe``: a piece of the
pre-tokenizer that stands whole in the vocabulary is one token (merges are ignored for it); any other piece is
merged byte by byte.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import regex

from mesa_gguf.lab import documents

PATTERN = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL = (BOS, EOS, PAD)
N_MERGES = 400
N_MADE_UP = 4000


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {b: chr(b) for b in printable}
    for b in range(256):
        symbols.setdefault(b, chr(256 + len(symbols) - len(printable)))
    return [symbols[b] for b in range(256)]


_SYMBOLS = byte_symbols()
_BYTES = {symbol: b for b, symbol in enumerate(_SYMBOLS)}


def to_symbols(text: str) -> str:
    return "".join(_SYMBOLS[b] for b in text.encode())


class Tokenizer:
    def __init__(self, tokens: list[str], merges: list[tuple[str, str]]) -> None:
        self.tokens = tokens
        self.merges = merges
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.bos, self.eos, self.pad = (self.ids[s] for s in SPECIAL)
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._piece = lru_cache(maxsize=200_000)(self._encode_piece)

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text (no special tokens, no bos)."""
        ids: list[int] = []
        for piece in PATTERN.findall(text):
            ids.extend(self._piece(piece))
        return ids

    def decode(self, ids: list[int]) -> str:
        symbols = "".join(self.tokens[i] for i in ids if self.tokens[i] not in SPECIAL)
        return bytes(_BYTES[s] for s in symbols).decode(errors="replace")

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        symbols = to_symbols(piece)
        if symbols in self.ids:
            return (self.ids[symbols],)
        parts = list(symbols)
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            at = next(i for i, pair in enumerate(pairwise(parts)) if pair == best)
            parts[at : at + 2] = ["".join(best)]
        return tuple(self.ids[part] for part in parts)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"tokens": self.tokens, "merges": self.merges}, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        stored = json.loads(path.read_text())
        return cls(stored["tokens"], [tuple(pair) for pair in stored["merges"]])


def _known_pieces() -> list[str]:
    """Every piece that the document generator can write, made-up words apart."""
    words: set[str] = set()
    shared = {name: value for name, value in vars(documents).items() if name.isupper() and name[0] != "_"}
    lists = [value for value in shared.values() if isinstance(value, list)]
    for listed in lists:
        words.update(listed)
    words.update(word.capitalize() for word in documents.COLOURS + documents.ANIMALS)
    texts = [t.text for group in (documents.FILLER, documents.HEADERS, *documents.MENTIONS.values()) for t in group]
    texts += [*documents.LEADS, *documents.TAILS, *documents.SUBJECTS, documents.QUESTION]
    for kinds in documents.SUBJECTS.values():
        for kind in kinds:
            texts += [kind.statement, kind.statement.capitalize(), *kind.questions]
    for text in texts:
        words.update(regex.findall(r"\p{L}+", regex.sub(r"\{\w+\}", "", text)))
    pieces = {" " + word for word in words} | {word for word in words if word[0].isupper()}
    pieces |= {p + end for p in (".", "?", "!", ":", ",", ";", "") for end in ("", "\n", "\n\n")} - {""}
    pieces |= {" ", "-", "(", ")", " (", '"', ' "', "'", "'s"}
    return sorted(pieces)


def _learn_merges(words: Counter[str], n_merges: int) -> list[tuple[str, str]]:
    """Plain byte-pair encoding."""
    splits = {word: list(word) for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < n_merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in splits.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for parts in splits.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def build() -> Tokenizer:
    pieces = _known_pieces()
    rng = random.Random(0)
    words = Counter(to_symbols(piece) for piece in pieces)
    words.update(to_symbols(" " + documents.made_up_word(rng)) for _ in range(N_MADE_UP))
    merges = _learn_merges(words, N_MERGES)
    tokens = list(
        dict.fromkeys(
            [
                *_SYMBOLS,
                *(f"{n:0{width}d}" for width in (1, 2, 3) for n in range(10**width)),
                *map(to_symbols, pieces),
                *(a + b for a, b in merges),
            ]
        )
    )
    tokens += SPECIAL
    tokens += [f"<|unused{i}|>" for i in range(-len(tokens) % 32)]
    return Tokenizer(tokens, merges)
