"""Saved states that tell whether they are whole and what they belong to."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from llama_cpp import LlamaState

from .errors import MesaError

KEY_BYTES = 40  # of a token in a tuple: an int, and the pointer to it


class MesaState(LlamaState):
    """`llama_cpp.LlamaState` with a checksum over all of it, and the origin of the KV data in it.

    llama.cpp checks the shape of the KV data in a state: it takes any bytes of that shape, those of another model too.

    Attributes:
        input_ids: the tokens, [n_tokens].
        scores: logits of the last of them, of all that there were any of, [at most n_tokens, n_vocab]; no rows without logits_all.
        llama_state: llama.cpp's bytes, with the plan in them.
        llama_state_size: bytes of memory that all of this takes, with the tokens once more as the key that a cache keeps it by:
            llama-cpp-python's caches go by this number, which is that of llama_state alone in a `LlamaState`.
        origin: stands for the model file, adapter and RoPE options that the text was read with.
        checksum: SHA-256 of everything else.
    """

    def __init__(self, state: LlamaState, origin: str) -> None:
        self.__dict__.update(vars(state))
        self.origin = origin
        self.llama_state_size = (
            len(self.llama_state) + self.input_ids.nbytes + self.scores.nbytes + KEY_BYTES * self.n_tokens
        )
        self.checksum = self._digest()

    def check(self, origin: str) -> None:
        """Raise MesaError if the state is damaged, or was saved with something else than origin."""
        try:
            whole = self.checksum == self._digest()
        except Exception:  # unpickled from damaged bytes, its attributes may be anything, or missing
            whole = False
        if not whole:
            raise MesaError("the state cannot be loaded: it is damaged (wrong checksum)")
        if self.origin != origin:
            raise MesaError("the state cannot be loaded: it was saved with another model file, adapter or RoPE options")

    def _digest(self) -> str:
        numbers = (int(self.n_tokens), int(self.llama_state_size), int(self.seed), self.origin)
        digest = hashlib.sha256(repr(numbers).encode())
        for values in (self.input_ids, self.scores):
            array: np.ndarray[Any, Any] = np.ascontiguousarray(values)
            digest.update(repr((array.dtype.str, array.shape)).encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
        digest.update(self.llama_state)
        return digest.hexdigest()
