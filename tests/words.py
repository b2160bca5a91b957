"""A tiny model with a vocabulary: letters, bytes, control tokens and long runs; its answers are dictated.

What it would say is random. `dictate` is a logits_processor that makes it say given tokens instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from gguf import TokenType
from numpy.typing import NDArray

from make_models import RopeScaling, Shape, Weights

DASHES = "-" * 64
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PIECES = ["▁", *'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:"{}[]', "é", "ab", "▁hello", DASHES]
VOCABULARY = ["<unk>", *CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
EOS = VOCABULARY.index("</s>")


def token(piece: str) -> int:
    return VOCABULARY.index(piece)


def byte_tokens(text: str) -> list[int]:
    """One for each byte."""
    return [token(f"<0x{byte:02X}>") for byte in text.encode()]


def write_words(path: Path, template: str | None = CHATML, *, eos: bool = True, bytes_too: bool = True) -> Path:
    """bytes_too=False: without the tokens of bytes, so that not every text can be spelled."""
    shape = Shape(n_vocab=len(VOCABULARY), train_length=512)
    w = Weights(path, "llama", seed=1)
    w.begin(shape)
    writer = w.writer
    del writer.kv_data[0]["tokenizer.ggml.model"]  # begin() says that there is none
    writer.add_tokenizer_model("llama")
    writer.add_token_list(VOCABULARY)
    writer.add_token_scores([0.0] * len(VOCABULARY))
    byte = TokenType.BYTE if bytes_too else TokenType.UNUSED
    kinds = [TokenType.UNKNOWN] + [TokenType.CONTROL] * len(CONTROL) + [byte] * 256 + [TokenType.NORMAL] * len(PIECES)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(token("<s>"))
    if eos:
        writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    if template is not None:
        writer.add_chat_template(template)
    w.rope(shape, RopeScaling())
    for layer in range(shape.n_layer):
        w.norm(f"blk.{layer}.attn_norm", shape.n_embd)
        w.attention(layer, shape)
        w.norm(f"blk.{layer}.ffn_norm", shape.n_embd)
        w.feed_forward(layer, shape)
    w.norm("output_norm", shape.n_embd)
    w.matrix("output.weight", shape.n_vocab, shape.n_embd, gain=3.0)
    return w.write()


Processor = Callable[[NDArray[np.intc], NDArray[np.float32]], NDArray[np.float32]]


def dictate(tokens: Sequence[int]) -> Processor:
    """Tokens to say, then the end."""
    said = 0

    def process(_: NDArray[np.intc], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        nonlocal said
        forced = np.full_like(logits, -np.inf)
        forced[tokens[said] if said < len(tokens) else EOS] = 0.0
        said += 1
        return forced

    return process
