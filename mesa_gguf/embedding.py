"""Embeddings: the model's last hidden state of each token of a text, or one vector made of them.

llama.cpp pools the tokens of a ubatch, so a text that is read in several has the vector of its last part. Here a context
gives every token's, and they are pooled when the text has been read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from .errors import ConfigError, PromptError, Remedy
from .model.header import Header

Rows = npt.NDArray[np.single]

POOLING_TYPES = {
    llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED: "the model's own",
    llama_cpp.LLAMA_POOLING_TYPE_NONE: "none",
    llama_cpp.LLAMA_POOLING_TYPE_MEAN: "mean",
    llama_cpp.LLAMA_POOLING_TYPE_CLS: "first token",
    llama_cpp.LLAMA_POOLING_TYPE_LAST: "last token",
    llama_cpp.LLAMA_POOLING_TYPE_RANK: "rank",
}
ATTENTION_TYPES = {
    llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED: "the model's own",
    llama_cpp.LLAMA_ATTENTION_TYPE_CAUSAL: "causal",
    llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL: "not causal",
}


def check(options: Mapping[str, Any], mesa: bool) -> None:
    """Check what a context is asked to embed with: llama.cpp aborts on a type that it does not know.

    Args:
        options: those of `llama_cpp.Llama`.
        mesa: whether Mesa reads.

    Raises:
        ConfigError: they cannot work.
    """
    for name, types in (("pooling_type", POOLING_TYPES), ("attention_type", ATTENTION_TYPES)):
        value = options.get(name, -1)
        if not isinstance(value, int) or isinstance(value, bool) or value not in types:
            possible = ", ".join(f"{number} ({kind})" for number, kind in types.items())
            raise ConfigError(f"{name} is {value!r}: use one of {possible}")
    if mesa and options.get("attention_type") == llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL:
        raise ConfigError(
            "attention_type is 1 (not causal), and Mesa-Extrapolation is causal",
            Remedy("enabled", False, why="which runs the model as stock llama.cpp"),
        )


def pooling_type(header: Header, given: int) -> int:
    """How one vector is made: as asked for, else as the file says, else not at all.

    Raises:
        ConfigError: by a classifier, which ranks and does not embed.
    """
    if given == llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED:
        given = header.number("pooling_type", llama_cpp.LLAMA_POOLING_TYPE_NONE)
    if given not in POOLING_TYPES or given == llama_cpp.LLAMA_POOLING_TYPE_RANK:
        raise ConfigError(
            f"{header.path}: pooling_type is {given}, which makes no embedding",
            Remedy(
                "pooling_type",
                int(llama_cpp.LLAMA_POOLING_TYPE_LAST),
                why="which is the last token's vector, or another",
            ),
        )
    return given


def encode(text: str) -> bytes:
    """A text to embed, for the tokenizer.

    Raises:
        PromptError: it is none.
    """
    if not isinstance(text, str):
        raise PromptError(f"a text to embed is a str, not {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as err:
        raise PromptError(f"the text cannot be encoded as UTF-8: {err.reason} at character {err.start}") from None


def fit(tokens: list[int], name: str, most: int, truncate: bool) -> list[int]:
    """The tokens of a text that are read, of at most so many: the value of the argument of this name.

    Raises:
        PromptError: there are none, or too many and none to be cut.
    """
    if not tokens:
        raise PromptError("a text to embed is empty: give at least one token")
    if len(tokens) > most and not truncate:
        raise PromptError(
            f"a text to embed has {len(tokens)} tokens, more than {name} ({most})",
            Remedy(name, len(tokens), "or more"),
            Remedy("truncate", True, why="which cuts it"),
            needed=len(tokens),
            available=most,
        )
    return tokens[:most]


@contextmanager
def collect(context: Any, n_embd: int) -> Iterator[list[Rows]]:
    """Within this, a context gives vectors -> a list that those of each batch are added to, [n_tokens, n_embd].

    Args:
        context: of llama_cpp._internals, for texts of one sequence, without pooling.
        n_embd: length of a vector.
    """
    batches: list[Rows] = []
    decode = context.decode

    def decode_and_collect(batch: Any) -> None:
        decode(batch)
        vectors = llama_cpp.llama_get_embeddings(context.ctx)
        batches.append(np.ctypeslib.as_array(vectors, shape=(batch.n_tokens(), n_embd)).copy())

    llama_cpp.llama_set_embeddings(context.ctx, True)
    context.decode = decode_and_collect
    try:
        yield batches
    finally:
        del context.decode
        llama_cpp.llama_set_embeddings(context.ctx, False)


def pool(rows: Rows, pooling_type: int, normalize: bool) -> list[float] | list[list[float]]:
    """One vector of those of a text's tokens; all of them without pooling."""
    if pooling_type == llama_cpp.LLAMA_POOLING_TYPE_NONE:
        return [_as_list(row, normalize) for row in rows]
    if pooling_type == llama_cpp.LLAMA_POOLING_TYPE_MEAN:
        return _as_list(rows.mean(axis=0, dtype=np.float64).astype(np.single), normalize)
    return _as_list(rows[0 if pooling_type == llama_cpp.LLAMA_POOLING_TYPE_CLS else -1], normalize)


def _as_list(vector: Rows, normalize: bool) -> list[float]:
    values = np.asarray(vector, np.float64)
    norm = float(np.linalg.norm(values)) if normalize else 0.0
    result: list[float] = (values / norm if norm > 0 else values).tolist()
    return result
