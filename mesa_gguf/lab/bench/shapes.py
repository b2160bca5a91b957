"""GGUF files of real shapes with random weights: for speed and memory, which do not depend on what weights say."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError, missing_package

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

MIXES = {"q4_k_m": ("q4_k", "q6_k"), "q5_k_m": ("q5_k", "q6_k")}
"""As llama.cpp mixes types: of most matrices, and of those that it gives more bits."""

QUANTS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", *MIXES, "q6_k", "f16")
K_BLOCK = 256  # weights that share scales in the K-quants
INSTEAD = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}  # in matrices whose rows are no whole blocks
VERSION = 1  # of the files in the cache: raised when what is written changes
PIECE = 2**23  # weights that are in memory at once

OnBytes = Callable[[int], None]
"""Called with the bytes that were written since the last call."""


@dataclass(frozen=True)
class Shape:
    """A model's dimensions.

    Attributes:
        n_ctx_train: the length that the model was trained at, in tokens.
        n_ff: values in the hidden layer of the feed-forward network.
        tied: the output matrix is the embedding.
        qkv_bias: query, key and value have biases (Qwen 2).
        llama3_rope: RoPE's frequencies are scaled as in Llama 3.1 and 3.2.
    """

    architecture: str
    n_ctx_train: int
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    rope_base: float
    norm_eps: float = 1e-5
    tied: bool = True
    qkv_bias: bool = False
    llama3_rope: bool = False

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor, NumPy's order of dimensions; vectors are kept in f32."""
        n_kv = self.n_head_kv * self.head_size
        yield "token_embd.weight", (self.n_vocab, self.n_embd)
        yield "output_norm.weight", (self.n_embd,)
        if not self.tied:
            yield "output.weight", (self.n_vocab, self.n_embd)
        if self.llama3_rope:
            yield "rope_freqs.weight", (self.head_size // 2,)
        for layer in range(self.n_layer):
            rows = {"attn_q": self.n_embd, "attn_k": n_kv, "attn_v": n_kv}
            yield f"blk.{layer}.attn_norm.weight", (self.n_embd,)
            for name, n_rows in rows.items():
                yield f"blk.{layer}.{name}.weight", (n_rows, self.n_embd)
                if self.qkv_bias:
                    yield f"blk.{layer}.{name}.bias", (n_rows,)
            yield f"blk.{layer}.attn_output.weight", (self.n_embd, self.n_embd)
            yield f"blk.{layer}.ffn_norm.weight", (self.n_embd,)
            yield f"blk.{layer}.ffn_gate.weight", (self.n_ff, self.n_embd)
            yield f"blk.{layer}.ffn_up.weight", (self.n_ff, self.n_embd)
            yield f"blk.{layer}.ffn_down.weight", (self.n_embd, self.n_ff)

    @property
    def n_params(self) -> int:
        """Number of weights; RoPE's frequency factors are none."""
        return sum(prod(shape) for name, shape in self.tensors() if name != "rope_freqs.weight")


SHAPES = {
    # note: of no real model; reads thousands of tokens a second
    "tiny": Shape("llama", 512, 4, 256, 4, 2, 512, 1024, 10000.0),
    "smollm2-135m": Shape("llama", 8192, 30, 576, 9, 3, 1536, 49152, 100000.0),
    "qwen2.5-0.5b": Shape("qwen2", 32768, 24, 896, 14, 2, 4864, 151936, 1000000.0, norm_eps=1e-6, qkv_bias=True),
    "llama-3.2-1b": Shape("llama", 131072, 16, 2048, 32, 8, 8192, 128256, 500000.0, llama3_rope=True),
    "llama-2-7b": Shape("llama", 4096, 32, 4096, 32, 32, 11008, 32000, 10000.0, tied=False),
}


def find_shape(name: str) -> Shape:
    """The shape of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SHAPES:
        raise ConfigError(f"there is no shape {name}: use one of {', '.join(SHAPES)}, or a model of your own with -m")
    return SHAPES[name]


def cache_dir() -> Path:
    """Where the files are kept: a folder of the user's cache, which XDG_CACHE_HOME moves."""
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "mesa-gguf" / "bench"


def cached_model(name: str, quant: str, on_bytes: OnBytes | None = None) -> Path:
    """The file of a shape, written if it is not there yet.

    Args:
        on_bytes: called while it is written.

    Raises:
        ConfigError: there is no such shape or type, or no room on the disk.
    """
    path = model_path(name, quant)
    if path.exists():
        return path
    shape, size = find_shape(name), model_bytes(name, quant)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise ConfigError(
            f"{name} in {quant} takes {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free in {path.parent}: "
            "set XDG_CACHE_HOME to a folder with more room, or take a smaller shape"
        )
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        write_model(partial, shape, quant, name=name, on_bytes=on_bytes)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def model_path(name: str, quant: str) -> Path:
    """Where the file of a shape is kept."""
    return cache_dir() / f"{name}-{quant}-v{VERSION}.gguf"


def model_bytes(name: str, quant: str) -> int:
    """The size of its tensors.

    Raises:
        ConfigError: there is no such shape or type.
    """
    shape = find_shape(name)
    return sum(_n_bytes(tensor, _tensor_type(shape, part, tensor, quant)) for part, tensor in shape.tensors())


def write_model(
    path: Path, shape: Shape, quant: str, *, name: str = "random", seed: int = 0, on_bytes: OnBytes | None = None
) -> None:
    """Write random weights, a piece at a time, without a vocabulary."""
    writer = _write_header(path, shape, quant, name)
    try:
        file = _file(writer)
        rng = np.random.default_rng(seed)
        for tensor_name, tensor in shape.tensors():
            n_written = 0
            for data in _data(rng, shape, tensor_name, tensor, quant):
                file.write(data.data)
                n_written += data.nbytes
                if on_bytes is not None:
                    on_bytes(data.nbytes)
            writer.write_padding(file, n_written)
    finally:
        writer.close()


def _gguf() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as err:
        raise missing_package("a model of random weights", "gguf", "lab") from err
    return gguf


def _write_header(path: Path, shape: Shape, quant: str, name: str) -> GGUFWriter:
    """All but the weights, which begin where the file ends now."""
    gguf = _gguf()
    _check_quant(quant)
    writer: GGUFWriter = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name(f"{name}, random weights")
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_file_type(gguf.LlamaFileType["MOSTLY_" + quant.upper()])
    writer.add_tokenizer_model("no_vocab")
    for tensor_name, tensor in shape.tensors():
        kind = _tensor_type(shape, tensor_name, tensor, quant)
        # the writer takes a quantized tensor's shape in bytes
        is_quantized = kind.name.startswith("Q")
        numpy_type = np.uint8 if is_quantized else np.float32
        dims = gguf.quant_shape_to_byte_shape(tensor, kind) if is_quantized else tensor
        writer.add_tensor_info(tensor_name, dims, np.dtype(numpy_type), _n_bytes(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(_file(writer), _file(writer).tell())
    return writer


def _file(writer: GGUFWriter) -> BinaryIO:
    assert writer.fout is not None
    return writer.fout[0]


def _check_quant(quant: str) -> None:
    if quant not in QUANTS:
        raise ConfigError(f"random weights come in {', '.join(QUANTS)}, not in {quant}")


def _tensor_type(shape: Shape, name: str, tensor: tuple[int, ...], quant: str) -> GGMLQuantizationType:
    gguf = _gguf()
    _check_quant(quant)
    kind = "f32"
    if len(tensor) > 1:
        most, more = MIXES.get(quant, (quant, quant))
        kind = more if _has_more_bits(shape, name) else most
        if tensor[1] % K_BLOCK:
            kind = INSTEAD.get(kind, kind)
    found: GGMLQuantizationType = gguf.GGMLQuantizationType[kind.upper()]
    return found


def _has_more_bits(shape: Shape, name: str) -> bool:
    """Whether llama.cpp gives a matrix of a mixture more bits: the output, and values and ffn_down of half of the layers."""
    if name == ("token_embd.weight" if shape.tied else "output.weight"):
        return True
    _, _, rest = name.partition("blk.")
    layer, _, matrix = rest.partition(".")
    if matrix not in ("attn_v.weight", "ffn_down.weight"):
        return False
    n, eighth = int(layer), shape.n_layer // 8
    return n < eighth or n >= 7 * shape.n_layer // 8 or (n - eighth) % 3 == 2


def _n_bytes(tensor: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, n_bytes = _gguf().GGML_QUANT_SIZES[kind]
    return prod(tensor) // int(block) * int(n_bytes)


#
# weights
#


def _data(
    rng: np.random.Generator, shape: Shape, name: str, tensor: tuple[int, ...], quant: str
) -> Iterator[npt.NDArray[Any]]:
    """The bytes of a tensor in pieces."""
    if name == "rope_freqs.weight":
        yield _llama3_frequencies(shape)
    elif name.endswith("norm.weight"):
        yield np.ones(tensor, np.float32)
    elif len(tensor) == 1:
        yield rng.normal(0, 0.1, tensor).astype(np.float32)
    else:
        n_rows, n_cols = tensor
        kind = _tensor_type(shape, name, tensor, quant)
        step = max(1, PIECE // n_cols)
        for start in range(0, n_rows, step):
            yield _rows(rng, min(step, n_rows - start), n_cols, kind)


@dataclass(frozen=True)
class Block:
    """What is not random in a block of weights: its scale d, and what is subtracted.

    Attributes:
        spread: the deviation of random weights where d is 1.
        scale: where d is, an f16.
        least: where its min is, an f16 too; None: it has none.
        mean: of the codes: the min that makes the weights' mean 0, where d is 1.
    """

    spread: float
    scale: int = 0
    least: int | None = None
    mean: float = 0.0


BLOCKS = {
    "Q8_0": Block(73.9),
    "Q4_0": Block(4.61),
    "Q4_1": Block(4.61, least=2, mean=-7.5),
    "Q5_0": Block(9.23),
    "Q5_1": Block(9.23, least=2, mean=-15.5),
    # scales and mins of 6 bits for each 32 weights, of 8 bits for each 16
    "Q4_K": Block(258.3, least=2, mean=7.5),
    "Q5_K": Block(526.9, least=2, mean=15.5),
    "Q6_K": Block(1365.7, scale=208),
}


def _rows(rng: np.random.Generator, n_rows: int, n_cols: int, kind: GGMLQuantizationType) -> npt.NDArray[Any]:
    """Random rows of a matrix: uniform codes, weights with a deviation of about 1/sqrt(n_cols)."""
    deviation = n_cols**-0.5
    if kind.name == "F16":
        integers = np.frombuffer(rng.bytes(2 * n_rows * n_cols), np.int16)
        return np.asarray(integers * np.float32(deviation * 3**0.5 / 2**15), np.float16)
    block, (n_weights, n_bytes) = BLOCKS[kind.name], _gguf().GGML_QUANT_SIZES[kind]
    fixed = {block.scale: deviation / block.spread}
    if block.least is not None:
        fixed[block.least] = block.mean * deviation / block.spread
    blocks = np.empty((n_rows * n_cols // n_weights, n_bytes), np.uint8)
    free = np.ones(n_bytes, bool)
    for at, value in fixed.items():
        free[at : at + 2] = False
        blocks[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    n_free = int(free.sum())
    blocks[:, free] = np.frombuffer(rng.bytes(len(blocks) * n_free), np.uint8).reshape(len(blocks), n_free)
    return blocks


def _llama3_frequencies(shape: Shape) -> npt.NDArray[np.float32]:
    """By what Llama 3.2 divides each of RoPE's frequencies: factor 32 from 8192 tokens on, with a ramp between."""
    factor, low, high, length = 32.0, 1.0, 4.0, 8192
    frequencies = shape.rope_base ** -(np.arange(0, shape.head_size, 2) / shape.head_size)
    turns = length * frequencies / (2 * np.pi)  # in the original length
    ramp = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - ramp) / factor + ramp), np.float32)
