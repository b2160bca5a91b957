"""Tiny models with random weights, written as GGUF: one for each kind that the engine supports or refuses.

Query and key weights are large, so that attention is sharp and an error in a position shows in the logits.

    python make_models.py FOLDER [NAME ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

F32 = gguf.GGMLQuantizationType.F32
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7}  # llama_ftype


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; 0 stands for what follows from the others."""

    n_layer: int = 2
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 0  # n_head
    head_size: int = 0  # n_embd / n_head
    n_rot: int = 0  # head_size. note: llama.cpp refuses any other for "llama"
    n_ff: int = 96
    n_vocab: int = 128
    train_length: int = 128  # T, tokens

    @property
    def heads_kv(self) -> int:
        return self.n_head_kv or self.n_head

    @property
    def d_head(self) -> int:
        return self.head_size or self.n_embd // self.n_head


@dataclass(frozen=True)
class RopeScaling:
    """rope.scaling.* of the metadata."""

    kind: str = ""  # "", "linear" or "yarn"
    factor: float = 1.0
    original_length: int = 0  # tokens, for YaRN; 0 leaves it out
    attn_factor: float = 0.0  # 0 leaves it out
    freq_base: float = 10000.0
    freq_factors: bool = False  # a rope_freqs.weight tensor, as in Llama 3


class Weights:
    """Collects metadata and seeded random tensors of one architecture, then writes the file."""

    def __init__(self, path: Path, architecture: str, seed: int, weight_type: gguf.GGMLQuantizationType = F32) -> None:
        self.writer = gguf.GGUFWriter(path, architecture)
        self.architecture = architecture
        self.random = np.random.default_rng(seed)
        self.weight_type = weight_type
        self.path = path

    def set(self, key: str, value: int | float | bool | str) -> None:
        """Metadata under the architecture's name, or as it stands for general.* and tokenizer.*"""
        if not key.startswith(("general.", "tokenizer.")):
            key = f"{self.architecture}.{key}"
        if isinstance(value, bool):
            self.writer.add_bool(key, value)
        elif isinstance(value, int):
            self.writer.add_uint32(key, value)
        elif isinstance(value, float):
            self.writer.add_float32(key, value)
        else:
            self.writer.add_string(key, value)

    def put(self, name: str, data: NDArray) -> None:
        self.writer.add_tensor(name, np.ascontiguousarray(data, dtype=np.float32))

    def matrix(self, name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        """[n_out, n_in] that turns a vector of unit variance into one of variance gain^2."""
        data = self.random.normal(0, gain / np.sqrt(n_in), (n_out, n_in)).astype(np.float32)
        self.writer.add_tensor(name, gguf.quants.quantize(data, self.weight_type), raw_dtype=self.weight_type)

    def vector(self, name: str, n: int, mean: float = 0.0, spread: float = 0.2) -> None:
        self.put(name, self.random.normal(mean, spread, n))

    def norm(self, name: str, n: int, bias: bool = False) -> None:
        self.vector(f"{name}.weight", n, mean=1.0)
        if bias:
            self.vector(f"{name}.bias", n)

    def sentencepiece(self, pieces: Sequence[str], n_vocab: int) -> None:
        """A vocabulary as Llama 2 has it: control tokens, bytes, and pieces, the first the likeliest."""
        control = ["<unk>", "<s>", "</s>"]
        tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
        assert len(tokens) == n_vocab
        kinds = gguf.TokenType
        self.set("tokenizer.ggml.model", "llama")
        self.writer.add_token_list(tokens)
        self.writer.add_token_scores([0.0] * (len(tokens) - len(pieces)) + [-float(i) for i in range(len(pieces))])
        self.writer.add_token_types(
            [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *([kinds.BYTE] * 256), *([kinds.NORMAL] * len(pieces))]
        )
        self.writer.add_bos_token_id(1)
        self.writer.add_eos_token_id(2)

    def wordpiece(self, words: Sequence[str], n_vocab: int) -> None:
        """A vocabulary as BERT has it, of whole words."""
        control = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        assert len(control) + len(words) == n_vocab
        kinds = gguf.TokenType
        self.set("tokenizer.ggml.model", "bert")
        self.writer.add_token_list([*control, *(f"\u2581{word}" for word in words)])
        self.writer.add_token_types(
            [kinds.CONTROL, kinds.UNKNOWN, *([kinds.CONTROL] * 3), *([kinds.NORMAL] * len(words))]
        )
        self.writer.add_pad_token_id(0)
        self.writer.add_unk_token_id(1)
        self.writer.add_bos_token_id(2)
        self.writer.add_sep_token_id(3)
        self.writer.add_eos_token_id(3)

    def begin(
        self,
        shape: Shape,
        rms: bool = True,
        pieces: Sequence[str] = (),
        words: Sequence[str] = (),
        embeddings: NDArray | None = None,
    ) -> None:
        """What every model has: sizes, no vocabulary (or a SentencePiece one of these pieces, or a WordPiece one of these words), token
        embedding (or this one)."""
        self.set("context_length", shape.train_length)
        self.set("embedding_length", shape.n_embd)
        self.set("block_count", shape.n_layer)
        self.set("feed_forward_length", shape.n_ff)
        self.set("attention.head_count", shape.n_head)
        self.set("attention.head_count_kv", shape.heads_kv)
        self.set("attention.layer_norm_rms_epsilon" if rms else "attention.layer_norm_epsilon", 1e-5)
        if shape.head_size:
            self.set("attention.key_length", shape.head_size)
            self.set("attention.value_length", shape.head_size)
        self.set("vocab_size", shape.n_vocab)
        if pieces:
            self.sentencepiece(pieces, shape.n_vocab)
        elif words:
            self.wordpiece(words, shape.n_vocab)
        else:
            self.set("tokenizer.ggml.model", "no_vocab")
        if embeddings is not None:
            self.put("token_embd.weight", embeddings)
        else:
            self.matrix("token_embd.weight", shape.n_vocab, shape.n_embd, gain=np.sqrt(shape.n_embd))

    def rope(self, shape: Shape, scaling: RopeScaling) -> None:
        n_rot = shape.n_rot or shape.d_head
        self.set("rope.dimension_count", n_rot)
        self.set("rope.freq_base", scaling.freq_base)
        if scaling.kind:
            self.set("rope.scaling.type", scaling.kind)
            self.set("rope.scaling.factor", scaling.factor)
        if scaling.original_length:
            self.set("rope.scaling.original_context_length", scaling.original_length)
        if scaling.attn_factor:
            self.set("rope.scaling.attn_factor", scaling.attn_factor)
        if scaling.freq_factors:  # 1 for the fast pairs up to 8 for the slow ones
            self.put("rope_freqs.weight", np.geomspace(1, 8, n_rot // 2))

    def attention(
        self, layer: int, shape: Shape, *, fused: bool = False, bias: bool = False, gain: float = 1.6
    ) -> None:
        """Projections of one layer; gain is that of queries and keys."""
        sizes = [shape.n_head * shape.d_head] + 2 * [shape.heads_kv * shape.d_head]
        gains = [gain, gain, 1.0]
        name = f"blk.{layer}.attn"
        if fused:
            parts = [
                self.random.normal(0, g / np.sqrt(shape.n_embd), (n, shape.n_embd))
                for n, g in zip(sizes, gains, strict=True)
            ]
            self.put(f"{name}_qkv.weight", np.concatenate(parts))
            if bias:
                self.vector(f"{name}_qkv.bias", sum(sizes))
        else:
            for part, n, g in zip("qkv", sizes, gains, strict=True):
                self.matrix(f"{name}_{part}.weight", n, shape.n_embd, g)
                if bias:
                    self.vector(f"{name}_{part}.bias", n)
        self.matrix(f"{name}_output.weight", shape.n_embd, sizes[0])

    def feed_forward(self, layer: int, shape: Shape, *, gated: bool = True, bias: bool = False) -> None:
        name = f"blk.{layer}.ffn"
        if gated:
            self.matrix(f"{name}_gate.weight", shape.n_ff, shape.n_embd)
        self.matrix(f"{name}_up.weight", shape.n_ff, shape.n_embd)
        # note: ggml's CPU backend rounds GELU to f16, so that part of such a model is kept small
        self.matrix(f"{name}_down.weight", shape.n_embd, shape.n_ff, gain=1.0 if gated else 0.1)
        if bias:
            self.vector(f"{name}_up.bias", shape.n_ff)
            self.vector(f"{name}_down.bias", shape.n_embd)

    def write(self) -> Path:
        self.writer.add_file_type(FILE_TYPES[self.weight_type.name])
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.path


# Supported: these run, and their logits are held against the oracle.


def write_llama(
    path: Path,
    shape: Shape = Shape(),
    scaling: RopeScaling = RopeScaling(),
    *,
    tied: bool = False,
    seed: int = 1,
    weight_type: gguf.GGMLQuantizationType = F32,
    pieces: Sequence[str] = (),
) -> Path:
    """RoPE in NORM order, RMSNorm, SwiGLU. tied: the output projection is the token embedding."""
    w = Weights(path, "llama", seed, weight_type)
    w.begin(shape, pieces=pieces)
    w.rope(shape, scaling)
    for layer in range(shape.n_layer):
        w.norm(f"blk.{layer}.attn_norm", shape.n_embd)
        w.attention(layer, shape)
        w.norm(f"blk.{layer}.ffn_norm", shape.n_embd)
        w.feed_forward(layer, shape)
    w.norm("output_norm", shape.n_embd)
    if not tied:
        w.matrix("output.weight", shape.n_vocab, shape.n_embd, gain=3.0)
    return w.write()


PIECES = (
    "▁the",
    "▁Question",
    "▁Answer",
    "▁",
    "e",
    "t",
    "h",
    "th",
    "▁t",
    "▁th",
    "a",
    "s",
    "n",
    "w",
    "r",
    "Q",
    "A",
    ":",
    ".",
    "?",
)


def write_sentencepiece(path: Path) -> Path:
    """A llama with the vocabulary of Llama 2's kind, which puts a space before every text."""
    return write_llama(path, Shape(n_vocab=259 + len(PIECES)), pieces=PIECES)


def write_qwen2(
    path: Path, shape: Shape = Shape(n_head_kv=2), scaling: RopeScaling = RopeScaling(), *, seed: int = 2
) -> Path:
    """RoPE in NEOX order, bias on queries, keys and values."""
    w = Weights(path, "qwen2", seed)
    w.begin(shape)
    w.rope(shape, scaling)
    for layer in range(shape.n_layer):
        w.norm(f"blk.{layer}.attn_norm", shape.n_embd)
        w.attention(layer, shape, bias=True)
        w.norm(f"blk.{layer}.ffn_norm", shape.n_embd)
        w.feed_forward(layer, shape)
    w.norm("output_norm", shape.n_embd)
    w.matrix("output.weight", shape.n_vocab, shape.n_embd, gain=3.0)
    return w.write()


def write_stablelm(
    path: Path, shape: Shape = Shape(n_head_kv=2, n_rot=8), scaling: RopeScaling = RopeScaling(), *, seed: int = 3
) -> Path:
    """Partial rotary in NEOX order, LayerNorm, SwiGLU."""
    w = Weights(path, "stablelm", seed)
    w.begin(shape, rms=False)
    w.rope(shape, scaling)
    for layer in range(shape.n_layer):
        w.norm(f"blk.{layer}.attn_norm", shape.n_embd, bias=True)
        w.attention(layer, shape)
        w.norm(f"blk.{layer}.ffn_norm", shape.n_embd, bias=True)
        w.feed_forward(layer, shape)
    w.norm("output_norm", shape.n_embd, bias=True)
    w.matrix("output.weight", shape.n_vocab, shape.n_embd, gain=3.0)
    return w.write()


def write_gptneox(
    path: Path,
    shape: Shape = Shape(n_rot=8),
    scaling: RopeScaling = RopeScaling(),
    *,
    parallel_residual: bool = True,
    seed: int = 4,
) -> Path:
    """Partial rotary in NEOX order, parallel residual, LayerNorm, GELU, one matrix for queries, keys and values."""
    w = Weights(path, "gptneox", seed)
    w.begin(shape, rms=False)
    w.rope(shape, scaling)
    w.set("use_parallel_residual", parallel_residual)
    for layer in range(shape.n_layer):
        w.norm(f"blk.{layer}.attn_norm", shape.n_embd, bias=True)
        w.attention(layer, shape, fused=True, bias=True)
        w.vector(f"blk.{layer}.attn_output.bias", shape.n_embd)
        w.norm(f"blk.{layer}.ffn_norm", shape.n_embd, bias=True)
        w.feed_forward(layer, shape, gated=False, bias=True)
    w.norm("output_norm", shape.n_embd, bias=True)
    w.matrix("output.weight", shape.n_vocab, shape.n_embd, gain=3.0)
    return w.write()


def write_mpt(path: Path, shape: Shape = Shape(), *, max_alibi_bias: float = 8.0, seed: int = 5) -> Path:
    """ALiBi, or no position encoding at all (NoPE) with max_alibi_bias = 0."""
    w = Weights(path, "mpt", seed)
    w.begin(shape, rms=False)
    if max_alibi_bias:
        w.set("attention.max_alibi_bias", max_alibi_bias)
    for layer in range(shape.n_layer):
        w.norm(f"blk.{layer}.attn_norm", shape.n_embd)
        w.attention(layer, shape, fused=True)
        w.norm(f"blk.{layer}.ffn_norm", shape.n_embd)
        w.feed_forward(layer, shape, gated=False)
    w.norm("output_norm", shape.n_embd)
    w.matrix("output.weight", shape.n_vocab, shape.n_embd, gain=3.0)
    return w.write()


def write_gemma2(path: Path, shape: Shape = Shape(n_head_kv=2), *, sliding_window: int = 32, seed: int = 6) -> Path:
    """Sliding-window attention in every other layer, capped scores and logits, GELU with a gate, norms after each part."""
    w = Weights(path, "gemma2", seed)
    w.begin(shape)
    w.rope(shape, RopeScaling())
    w.set("attention.sliding_window", sliding_window)
    w.set("attn_logit_softcapping", 50.0)
    w.set("final_logit_softcapping", 30.0)
    for layer in range(shape.n_layer):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm"):
            w.norm(f"blk.{layer}.{name}", shape.n_embd)
        w.vector(f"blk.{layer}.post_ffw_norm.weight", shape.n_embd, mean=0.1, spread=0.02)  # GELU, see feed_forward
        w.attention(layer, shape)
        w.feed_forward(layer, shape)
    w.norm("output_norm", shape.n_embd)
    return w.write()


# Refused: these load in llama.cpp, and the engine must say by name why it does not take them.


def write_gpt2(path: Path, shape: Shape = Shape(), *, seed: int = 9) -> Path:
    """Learned absolute positions."""
    w = Weights(path, "gpt2", seed)
    w.begin(shape, rms=False)
    w.matrix("position_embd.weight", shape.train_length, shape.n_embd)
    for layer in range(shape.n_layer):
        w.norm(f"blk.{layer}.attn_norm", shape.n_embd, bias=True)
        w.attention(layer, shape, fused=True, bias=True)
        w.vector(f"blk.{layer}.attn_output.bias", shape.n_embd)
        w.norm(f"blk.{layer}.ffn_norm", shape.n_embd, bias=True)
        w.feed_forward(layer, shape, gated=False, bias=True)
    w.norm("output_norm", shape.n_embd, bias=True)
    return w.write()


def write_bert(
    path: Path, shape: Shape = Shape(), *, seed: int = 7, words: Sequence[str] = (), **metadata: int | str
) -> Path:
    """An encoder: no causal attention, no KV cache, no logits. With words it reads text."""
    shape = replace(shape, n_vocab=5 + len(words)) if words else shape
    w = Weights(path, "bert", seed)
    w.begin(shape, rms=False, words=words)
    for key, value in metadata.items():
        w.set(key.replace("__", "."), value)
    w.set("attention.causal", False)
    w.set("tokenizer.ggml.token_type_count", 2)
    w.matrix("token_types.weight", 2, shape.n_embd)
    w.matrix("position_embd.weight", shape.train_length, shape.n_embd)
    w.norm("token_embd_norm", shape.n_embd, bias=True)
    for layer in range(shape.n_layer):
        w.attention(layer, shape, bias=True)
        w.norm(f"blk.{layer}.attn_output_norm", shape.n_embd, bias=True)
        w.feed_forward(layer, shape, gated=False, bias=True)
        w.norm(f"blk.{layer}.layer_output_norm", shape.n_embd, bias=True)
    return w.write()


def write_synonyms(path: Path, groups: Sequence[Sequence[str]], **metadata: int | str) -> Path:
    """An encoder that hands on what it has of words, the same for those of a group, and nothing for others."""
    words = [word for group in groups for word in group]
    shape = Shape(n_layer=1, n_vocab=5 + len(words))
    w = Weights(path, "bert", 1)
    rows = w.random.normal(size=(len(groups), shape.n_embd))
    embeddings = [*np.zeros((5, shape.n_embd)), *(row for group, row in zip(groups, rows) for _ in group)]
    w.begin(shape, rms=False, words=words, embeddings=np.stack(embeddings))
    for key, value in metadata.items():
        w.set(key.replace("__", "."), value)
    w.set("attention.causal", False)
    w.set("tokenizer.ggml.token_type_count", 2)
    n, nothing = shape.n_embd, np.zeros
    w.put("token_types.weight", nothing((2, n)))
    w.put("position_embd.weight", nothing((shape.train_length, n)))
    for name in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        w.put(f"{name}.weight", np.ones(n))
        w.put(f"{name}.bias", nothing(n))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        w.put(f"blk.0.{name}.weight", nothing((n, n)))
        w.put(f"blk.0.{name}.bias", nothing(n))
    w.put("blk.0.ffn_up.weight", nothing((shape.n_ff, n)))
    w.put("blk.0.ffn_up.bias", nothing(shape.n_ff))
    w.put("blk.0.ffn_down.weight", nothing((n, shape.n_ff)))
    w.put("blk.0.ffn_down.bias", nothing(n))
    return w.write()


def write_mamba(path: Path, shape: Shape = Shape(n_head=0, n_ff=0), *, d_state: int = 8, seed: int = 8) -> Path:
    """Recurrent: a state instead of a KV cache."""
    w = Weights(path, "mamba", seed)
    d_conv, d_inner, dt_rank = 4, 2 * shape.n_embd, 4
    w.begin(shape)
    w.set("ssm.conv_kernel", d_conv)
    w.set("ssm.inner_size", d_inner)
    w.set("ssm.state_size", d_state)
    w.set("ssm.time_step_rank", dt_rank)
    for layer in range(shape.n_layer):
        name = f"blk.{layer}"
        w.norm(f"{name}.attn_norm", shape.n_embd)
        w.matrix(f"{name}.ssm_in.weight", 2 * d_inner, shape.n_embd)
        w.matrix(f"{name}.ssm_conv1d.weight", d_inner, d_conv)
        w.vector(f"{name}.ssm_conv1d.bias", d_inner)
        w.matrix(f"{name}.ssm_x.weight", dt_rank + 2 * d_state, d_inner)
        w.matrix(f"{name}.ssm_dt.weight", d_inner, dt_rank)
        w.vector(f"{name}.ssm_dt.bias", d_inner)
        w.put(f"{name}.ssm_a", -np.abs(w.random.normal(1, 0.2, (d_inner, d_state))))  # decay, so negative
        w.vector(f"{name}.ssm_d", d_inner, mean=1.0)
        w.matrix(f"{name}.ssm_out.weight", shape.n_embd, d_inner)
    w.norm("output_norm", shape.n_embd)
    return w.write()


YARN = RopeScaling("yarn", factor=4.0, original_length=32)

SUPPORTED: dict[str, Callable[[Path], Path]] = {
    "llama": write_llama,
    "llama-gqa": partial(write_llama, shape=Shape(n_head_kv=2)),
    "llama-head-size": partial(write_llama, shape=Shape(n_head=3, n_head_kv=1, head_size=32)),
    "llama-tied": partial(write_llama, tied=True),
    "llama-freq-base": partial(write_llama, scaling=RopeScaling(freq_base=500000.0)),
    "llama-linear": partial(write_llama, scaling=RopeScaling("linear", factor=4.0)),
    "llama-yarn": partial(write_llama, shape=Shape(n_head=2), scaling=YARN),
    "llama-yarn-attn-factor": partial(
        write_llama, shape=Shape(n_head=2), scaling=RopeScaling("yarn", factor=4.0, original_length=32, attn_factor=0.8)
    ),
    "llama-freq-factors": partial(write_llama, scaling=RopeScaling(freq_factors=True)),
    "qwen2": write_qwen2,
    "qwen2-yarn": partial(write_qwen2, shape=Shape(n_head=2, n_head_kv=1), scaling=YARN),
    "stablelm": write_stablelm,
    "gptneox": write_gptneox,
    "gptneox-sequential": partial(write_gptneox, parallel_residual=False),
    "mpt": write_mpt,
    "nope": partial(write_mpt, max_alibi_bias=0.0),
    "gemma2": write_gemma2,
}
REFUSED: dict[str, Callable[[Path], Path]] = {"gpt2": write_gpt2, "bert": write_bert, "mamba": write_mamba}
MODELS = SUPPORTED | REFUSED


def main() -> None:
    parser = argparse.ArgumentParser(description="Write tiny models with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)} (default: all)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or MODELS:
        print(MODELS[name](arguments.folder / f"{name}.gguf"))


if __name__ == "__main__":
    main()
