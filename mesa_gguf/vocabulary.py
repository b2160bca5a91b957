"""Tokens as bytes, and what stands for a model that was closed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NoReturn

import llama_cpp
from llama_cpp._internals import LlamaModel

from .errors import ModelError, PromptError


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
        size = 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            n: int = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def token_to_piece(self, token: int, special: bool = False) -> bytes:
        self._check([token])
        return self.token_bytes(token, special).ljust(32, b"\0")  # as LlamaModel does it

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> bytes:
        self._check(tokens)
        text = b"".join(self.token_bytes(token, special) for token in tokens)
        # SentencePiece puts a space before a text
        return text[1:] if len(tokens) > 0 and tokens[0] == self.token_bos() and text[:1] == b" " else text

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
