"""Writes GGUF files of real shapes with random weights: for speed and memory, which do not depend on what weights say.

    python benchmarks/make_model.py 135m q8_0 build/bench/135m-q8_0.gguf
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np


@dataclass(frozen=True)
class Shape:
    """A llama-architecture model. Lengths in values, vocabulary in tokens."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    tied: bool

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


SHAPES = {
    "tiny": Shape(4, 256, 4, 2, 512, 1024, True),
    "135m": Shape(30, 576, 9, 3, 1536, 49152, True),
    "1b": Shape(16, 2048, 32, 8, 8192, 128256, True),
}

TRAIN_LENGTH = 2048

BLOCK = 32  # values that share a scale in q8_0 and q4_0


def random_rows(rng: np.random.Generator, n_rows: int, n_cols: int, quant: str) -> np.ndarray:
    """Random quantized rows, [n_rows, bytes of a row]; uniform weights with a deviation of about 1/sqrt(n_cols)."""
    assert n_cols % BLOCK == 0
    n_blocks = n_cols // BLOCK
    deviation = n_cols**-0.5
    n_bytes, spread = {"q8_0": (BLOCK, 74.0), "q4_0": (BLOCK // 2, 4.6)}[quant]
    rows = np.empty((n_rows, n_blocks, 2 + n_bytes), np.uint8)
    rows[:, :, :2] = np.frombuffer(np.float16(deviation / spread).tobytes(), np.uint8)
    rows[:, :, 2:] = rng.integers(0, 256, (n_rows, n_blocks, n_bytes), np.uint8)
    return rows.reshape(n_rows, -1)


def write(path: Path, shape: Shape, quant: str, train_length: int = TRAIN_LENGTH, seed: int = 0) -> None:
    """Write the model; token ids only, no vocabulary."""
    rng = np.random.default_rng(seed)
    kind = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}[quant]
    file_type = {"q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}[quant]

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_name(f"random {path.stem}")
    writer.add_context_length(train_length)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("no_vocab")

    def weight(name: str, n_rows: int, n_cols: int) -> None:
        writer.add_tensor(name, random_rows(rng, n_rows, n_cols, quant), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(shape.n_embd, np.float32))

    n_kv = shape.n_head_kv * shape.head_size
    weight("token_embd.weight", shape.n_vocab, shape.n_embd)
    norm("output_norm.weight")
    if not shape.tied:
        weight("output.weight", shape.n_vocab, shape.n_embd)
    for layer in range(shape.n_layer):
        norm(f"blk.{layer}.attn_norm.weight")
        weight(f"blk.{layer}.attn_q.weight", shape.n_embd, shape.n_embd)
        weight(f"blk.{layer}.attn_k.weight", n_kv, shape.n_embd)
        weight(f"blk.{layer}.attn_v.weight", n_kv, shape.n_embd)
        weight(f"blk.{layer}.attn_output.weight", shape.n_embd, shape.n_embd)
        norm(f"blk.{layer}.ffn_norm.weight")
        weight(f"blk.{layer}.ffn_gate.weight", shape.n_ff, shape.n_embd)
        weight(f"blk.{layer}.ffn_up.weight", shape.n_ff, shape.n_embd)
        weight(f"blk.{layer}.ffn_down.weight", shape.n_embd, shape.n_ff)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("quant", choices=["q8_0", "q4_0"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--train-length", type=int, default=TRAIN_LENGTH)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.path, SHAPES[args.shape], args.quant, args.train_length, args.seed)


if __name__ == "__main__":
    main()
