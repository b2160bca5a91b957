"""The model that is served: it counts what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import llama_cpp

from ..errors import ConfigError, OutOfMemoryError
from ..llama import MesaLlama
from ..reading.reader import n_gpu_layers_of

N_CTX = 32768  # tokens, where memory has room for it
LEAST_N_CTX = 4096


@dataclass
class Usage:
    """Tokens of one request.

    Attributes:
        prompt: of the prompts.
        cached: those of them that were in the context already.
        completion: that were generated, without what ended the text.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0


class ServedLlama(MesaLlama):
    """`MesaLlama` for a server. Used by one thread alone.

    Attributes:
        usage: of the request that is being answered.
    """

    usage: Usage = Usage()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._known_ends: dict[int, bool] = {}
        super().__init__(*args, **kwargs)

    def _reuse(self, tokens: list[int]) -> list[int]:
        rest = super()._reuse(tokens)
        self.usage.prompt += len(tokens)
        self.usage.cached += len(tokens) - len(rest)
        return rest

    def _sample(self, sampler: Any, last: int) -> int:
        token = super()._sample(sampler, last)
        if not self._ends(token):
            self.usage.completion += 1
        return token

    def _ends(self, token: int) -> bool:
        """Whether a token ends a text."""
        known = self._known_ends.get(token)  # each call of llama.cpp lets other threads take the interpreter
        if known is None:
            known = self._known_ends[token] = bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))
        return known


def load(path: Any, *, n_ctx: int | None = None, n_gpu_layers: int | None = None, **options: Any) -> ServedLlama:
    """The model, with embeddings where it has them; n_ctx None: `N_CTX`, or less where memory has no room for it.

    Raises:
        MesaError: as `MesaLlama` does.
    """
    options |= dict(n_gpu_layers=n_gpu_layers_of(n_gpu_layers, options.get("rpc_servers")))
    size = N_CTX if n_ctx is None else n_ctx
    while True:
        try:
            return _load(path, n_ctx=size, **options)
        except OutOfMemoryError:
            if n_ctx is not None or size <= LEAST_N_CTX:
                raise
            size //= 2


def _load(path: Any, **options: Any) -> ServedLlama:
    mesa = options.get("mesa")
    if mesa is None or mesa.enabled:
        try:
            llm = ServedLlama(path, embedding=True, **options)
        except ConfigError:
            pass  # of a model that ranks; or one that is wrong without embeddings too, which is told then
        else:
            if llm.pooling_type() == llama_cpp.LLAMA_POOLING_TYPE_NONE:
                # one vector for a text, where the file does not say how it is made of those of its tokens
                llm._pooling_type = llama_cpp.LLAMA_POOLING_TYPE_MEAN
            return llm
    return ServedLlama(path, **options)
