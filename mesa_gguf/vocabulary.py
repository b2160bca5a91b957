"""Tokens as bytes, and what stands for a model that was closed."""

from __future__ import annotations

import ctypes
import functools
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import llama_cpp
from llama_cpp._internals import LlamaModel

from .errors import ModelError, PromptError

MesaLlama: TypeAlias = Any  # that of llama.py, which is a floor above

APART = f"mesa{secrets.token_hex(16)}"
"""Where a text is cut before it is tokenized. Nobody outside this process knows it, and no template changes letters and digits."""

_CONTROL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN


class WholeTokens(LlamaModel):
    """`LlamaModel`, which loses all of a token of more than 32 bytes, and crashes on one that does not exist, or when it is closed.

    A tokenizer that someone holds keeps it.
    """

    @property
    def vocab(self) -> Any:
        if self.model is None:
            raise ModelError(f"{self.path_model}: this model was closed: open it again")
        return self.__dict__["vocab"]

    def n_ctx_train(self) -> int:
        _ = self.vocab  # raises if closed; tokenize() begins with this number
        n_ctx: int = super().n_ctx_train()
        return n_ctx

    def token_bytes(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token of the vocabulary; nothing for control tokens unless special."""
        vocab = self.vocab  # raises if closed
        known = self._bytes.get((token, special))
        if known is not None:
            return known
        size = 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            n: int = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, special)
            if n >= 0:
                found = self._bytes[token, special] = buffer.raw[:n]
                return found
            size = -n

    @functools.cached_property
    def _bytes(self) -> dict[tuple[int, bool], bytes]:
        """Of tokens that were asked for: a text has the same ones often."""
        return {}

    def token_to_piece(self, token: int, special: bool = False) -> bytes:
        self._check([token])
        return self.token_bytes(token, special).ljust(32, b"\0")  # as LlamaModel does it

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> bytes:
        self._check(tokens)
        text = b"".join(self.token_bytes(token, special) for token in tokens)
        # SentencePiece puts a space before a text
        return text[1:] if len(tokens) > 0 and tokens[0] == self.token_bos() and text[:1] == b" " else text

    @functools.cached_property
    def control_names(self) -> re.Pattern[str] | None:
        """The characters of a text that the name of a control token begins with, those within another name too; None where there are
        no such names."""
        tokens = (t for t in range(self.n_vocab()) if llama_cpp.llama_vocab_get_attr(self.vocab, t) & _CONTROL)
        names = {self.token_get_text(token) for token in tokens}
        found = sorted(name for name in names if len(name) > 1)  # one letter cannot be cut
        return re.compile(f"(?=(?:{'|'.join(map(re.escape, found))})).", re.DOTALL) if found else None

    def made_plain(self, value: Any) -> Any:
        """JSON in whose texts the names of control tokens are cut (`APART`), so that they stay text."""
        names = self.control_names
        if names is None:
            return value
        if isinstance(value, str):
            return names.sub(lambda match: f"{match[0]}{APART}", value)
        if isinstance(value, Mapping):
            return {self.made_plain(key): self.made_plain(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.made_plain(inner) for inner in value]
        return value

    def _check(self, tokens: Sequence[int]) -> None:
        n_vocab = self.n_vocab()
        bad = next((token for token in tokens if not 0 <= token < n_vocab), None)
        if bad is not None:
            raise PromptError(f"token {bad} is not in the model's vocabulary of {n_vocab} tokens")


class Closed:
    """In place of the model and the context of a `MesaLlama` that was closed: using them is an error."""

    def __init__(self, path: str) -> None:
        self.__dict__["path"] = path

    def __getattr__(self, name: str) -> NoReturn:
        raise ModelError(f"{self.__dict__['path']}: this model was closed: open it again")

    def __setattr__(self, name: str, value: Any) -> None:
        self.__getattr__(name)


def tokenize_piece(llm: MesaLlama, text: str, *, special: bool = False) -> list[int]:
    """The tokens of a part of a prompt, as they are after other parts.

    note: SentencePiece vocabularies put a space before a text, as if it were the first. So they get a line end to put it
    before, and what that gives is taken away again.

    Args:
        special: take the names of control tokens for these tokens.
    """
    if not text:
        return []

    def tokenize(data: str) -> list[int]:
        tokens: list[int] = llm.tokenize(data.encode(), add_bos=False, special=special)
        return tokens

    if _puts_space(llm):
        before, both = tokenize("\n"), tokenize(f"\n{text}")
        if both[: len(before)] == before:
            return both[len(before) :]
    return tokenize(text)


def _puts_space(llm: MesaLlama) -> bool:
    if llama_cpp.llama_vocab_type(llm._model.vocab) != llama_cpp.LLAMA_VOCAB_TYPE_SPM:
        return False
    return str(llm.metadata.get("tokenizer.ggml.add_space_prefix", "true")) == "true"
