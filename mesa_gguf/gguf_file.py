"""What a GGUF file says about itself, checked before llama.cpp is asked to load it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp

from . import _core
from .errors import ConfigError, ModelError, OutOfMemoryError

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
DEFAULT_KV_TYPE = llama_cpp.GGML_TYPE_F16


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        path: the file.
        metadata: every key; long arrays are given as {"length": n}.
        tensors: (name, ggml type, bytes) of each tensor.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: list[tuple[str, str, int]]

    def get(self, key: str, default: Any = None) -> Any:
        """A key of the architecture, such as "context_length"."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def train_length(self) -> int:
        """T in tokens."""
        return int(self.get("context_length", 0))

    @property
    def n_layer(self) -> int:
        return int(self.get("block_count", 0))

    @property
    def weight_bytes(self) -> int:
        return sum(size for _, _, size in self.tensors)

    @property
    def rope(self) -> dict[str, Any]:
        """RoPE's numbers: base, dimensions and scaling, where the file has them."""
        keys = {"base": "rope.freq_base", "dimensions": "rope.dimension_count", "scaling": "rope.scaling.type", "factor": "rope.scaling.factor"}
        return {name: self.get(key) for name, key in keys.items() if self.get(key) is not None}

    def _heads(self, key: str, layer: int, default: int) -> int:
        value = self.get(key, default)
        return int(value[layer] if isinstance(value, list) else value)

    def kv_bytes(self, n_tokens: int, type_k: int | None = None, type_v: int | None = None) -> int:
        """Bytes of keys and values of n_tokens tokens, in the ggml types of the cache (default f16).

        Raises:
            ConfigError: a head does not fill whole blocks of a quantized type.
        """
        n_embd = int(self.get("embedding_length", 0))
        total = 0
        for layer in range(self.n_layer):
            n_head = self._heads("attention.head_count", layer, 0)
            if n_head == 0:
                continue
            n_head_kv = self._heads("attention.head_count_kv", layer, n_head)
            for key, kv_type in (("attention.key_length", type_k), ("attention.value_length", type_v)):
                n_values = n_head_kv * int(self.get(key, n_embd // n_head))
                try:
                    total += _core.row_size(DEFAULT_KV_TYPE if kv_type is None else kv_type, n_values)
                except ValueError as err:
                    raise ConfigError(f"KV type: {err}") from None
        return total * n_tokens

    @cached_property
    def llama_cpp_view(self) -> tuple[str | None, int, int]:
        """What llama.cpp says of the model without its weights: why Mesa cannot read with it (None if it can), its
        number of weights, and its RoPE type.

        Raises:
            ModelError: llama.cpp cannot load it.
        """
        params = llama_cpp.llama_model_default_params()
        params.no_alloc = True  # hyperparameters and tensor shapes only
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        model = llama_cpp.llama_model_load_from_file(str(self.path).encode(), params)
        if not model:
            raise ModelError(f"{self.path}: llama.cpp cannot load this model (architecture {self.architecture})")
        try:
            reason = _core.unsupported(ctypes.cast(model, ctypes.c_void_p).value or 0)
            return reason, llama_cpp.llama_model_n_params(model), llama_cpp.llama_model_rope_type(model)
        finally:
            llama_cpp.llama_model_free(model)

    @property
    def unsupported(self) -> str | None:
        """Why Mesa cannot read with this model, by llama.cpp's own view of it; None if it can."""
        return self.llama_cpp_view[0]


def check(path: Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        ModelError: the file is missing, is no GGUF file, or is damaged or cut short.
    """
    if not path.exists():
        raise ModelError(f"{path}: there is no such file")
    if path.is_dir():
        raise ModelError(f"{path}: is a folder, not a GGUF file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        size = path.stat().st_size
    except OSError as err:
        raise ModelError(f"{path}: cannot be read: {err.strerror}") from None
    if magic != b"GGUF":
        raise ModelError(f"{path}: is not a GGUF file (it does not begin with GGUF); convert the model to GGUF first")
    try:
        contents = _core.read_gguf(str(path))
    except (RuntimeError, ValueError, MemoryError) as err:
        raise ModelError(f"{path}: this GGUF file is damaged: {err}; download or convert it again") from None
    if contents["n_bytes"] > size:
        raise ModelError(f"{path}: this GGUF file is cut short: {size} bytes of {contents['n_bytes']}; download it again")
    if "general.architecture" not in contents["metadata"]:
        raise ModelError(f"{path}: this GGUF file names no architecture: it holds no model")
    header = Header(path, contents["metadata"], contents["tensors"])
    # llama.cpp aborts the process on these
    n_layer = header.get("block_count")
    if isinstance(n_layer, int) and not 0 < n_layer <= MAX_LAYERS:
        raise ModelError(f"{path}: this GGUF file is damaged: its number of layers is {n_layer}; download or convert it again")
    return header


def available_memory() -> int | None:
    """Bytes of memory that a new process could use; None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def check_memory(header: Header, n_ctx: int, type_k: int | None, type_v: int | None, n_gpu_layers: int) -> None:
    """Raise OutOfMemoryError if the KV cache of n_ctx tokens alone is more than the memory that is free.

    Weights are mapped from the file and need not fit; a cache on a GPU is that device's business.
    """
    free = available_memory()
    if free is None or n_gpu_layers != 0:
        return
    n_tokens = n_ctx or header.train_length
    need = header.kv_bytes(n_tokens, type_k, type_v)
    if need > free:
        fits = n_tokens * free // max(1, need)
        raise OutOfMemoryError(
            f"a KV cache of n_ctx = {n_tokens} tokens needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: "
            f"make n_ctx {fits} or less, or use type_k=8, type_v=8 (q8_0), about half the size"
        )
