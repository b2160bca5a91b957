"""What a GGUF file says about itself, checked before llama.cpp is asked to load it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp

from .. import _core
from ..errors import ConfigError, ModelError, Remedy
from .rehearsal import Rehearsal, rehearse

DEFAULT_KV_TYPE = llama_cpp.GGML_TYPE_F16
SHOW_REASON = Remedy("verbose", True, why="which shows llama.cpp's reason")


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        path: the file.
        metadata: every key, overrides included; long arrays are given as {"length": n}.
        tensors: (name, ggml type, bytes) of each tensor.
        rehearsal: how llama.cpp fares with it.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: list[tuple[str, str, int]]
    rehearsal: Rehearsal

    def get(self, key: str, default: Any = None) -> Any:
        """A key of the architecture, such as "context_length"."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: int = 0, layer: int | None = None) -> int:
        """A length or count of the architecture; layer: that layer's, where layers differ.

        Raises:
            ModelError: it is no such number.
        """
        value = self.get(key, default)
        if layer is not None and isinstance(value, list):
            value = value[layer] if layer < len(value) else None
        if not isinstance(value, int) or not 0 <= value < 2**31:
            raise damaged(self.path, f"{self.architecture}.{key} is {value}")
        return value

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def train_length(self) -> int:
        """T in tokens."""
        return self.number("context_length")

    @property
    def n_layer(self) -> int:
        return self.number("block_count")

    @property
    def n_vocab(self) -> int:
        """Tokens that the model knows, each of which has a logit."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, dict):
            return int(tokens["length"])
        return len(tokens) if isinstance(tokens, list) else self.number("vocab_size")

    @property
    def weight_bytes(self) -> int:
        return sum(size for _, _, size in self.tensors)

    @property
    def rope(self) -> dict[str, Any]:
        """RoPE's numbers: base, dimensions and scaling, where the file has them."""
        keys = {
            "base": "rope.freq_base",
            "dimensions": "rope.dimension_count",
            "scaling": "rope.scaling.type",
            "factor": "rope.scaling.factor",
        }
        return {name: self.get(key) for name, key in keys.items() if self.get(key) is not None}

    def kv_bytes(self, n_tokens: int, type_k: int | None = None, type_v: int | None = None) -> int:
        """Bytes of keys and values of n_tokens tokens, in the ggml types of the cache (default f16).

        Raises:
            ConfigError: a head does not fill whole blocks of a quantized type.
        """
        n_embd = self.number("embedding_length")
        total = 0
        for layer in range(self.n_layer):
            n_head = self.number("attention.head_count", layer=layer)
            if n_head == 0:
                continue
            n_head_kv = self.number("attention.head_count_kv", n_head, layer)
            for key, kv_type in (("attention.key_length", type_k), ("attention.value_length", type_v)):
                n_values = n_head_kv * self.number(key, n_embd // n_head)
                try:
                    total += _core.row_size(DEFAULT_KV_TYPE if kv_type is None else kv_type, n_values)
                except ValueError as err:
                    raise ConfigError(f"KV type: {err}") from None
        return total * n_tokens

    @property
    def llama_cpp_view(self) -> tuple[str | None, int, int]:
        """What llama.cpp says of the model without its weights: why Mesa cannot read with it (None if it can), its
        number of weights, and its RoPE type.

        Raises:
            ModelError: llama.cpp cannot load it.
        """
        view, reason = self.rehearsal.view, self.rehearsal.reason
        if view is None:
            what = f"{self.path}: llama.cpp cannot load this model (architecture {self.architecture})"
            raise ModelError(f"{what}: {reason}") if reason else ModelError(what, SHOW_REASON)
        return view["unsupported"], view["n_params"], view["rope_type"]

    @property
    def unsupported(self) -> str | None:
        """Why Mesa cannot read with this model, by llama.cpp's own view of it; None if it can."""
        return self.llama_cpp_view[0]


def damaged(path: Path, reason: str) -> ModelError:
    """The error to raise."""
    return ModelError(f"{path}: this GGUF file is damaged: {reason}; download or convert it again")


def read_header(path: Path) -> _core.GgufContents:
    """The header of a GGUF file, with ggml's own checked reader.

    Raises:
        ModelError: the file is missing, is no GGUF file, or is damaged or cut short.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ModelError(
            f"{str(path).encode('utf-8', 'backslashreplace').decode()}: its name is not UTF-8, which llama.cpp wants: rename it"
        ) from None
    if not path.exists():
        raise ModelError(f"{path}: there is no such file")
    if path.is_dir():
        raise ModelError(f"{path} is a folder, not a GGUF file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        size = path.stat().st_size
    except OSError as err:
        raise ModelError(f"{path}: cannot be read: {err.strerror}") from None
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file (it does not begin with GGUF); convert the model to GGUF first")
    try:
        contents = _core.read_gguf(str(path))
    except (RuntimeError, ValueError, MemoryError) as err:
        raise damaged(path, str(err)) from None
    if contents["n_bytes"] > size:
        raise ModelError(
            f"{path}: this GGUF file is cut short: {size} bytes of {contents['n_bytes']}; download it again"
        )
    return contents


Overrides = Mapping[str, bool | int | float | str]


def check_model(path: Path, overrides: Overrides | None = None) -> Header:
    """Read and check the header of a model file, and let llama.cpp rehearse with it.

    Args:
        overrides: metadata for llama.cpp to take instead of the file's (kv_overrides).

    Raises:
        ModelError: the file is missing, is no GGUF file, is damaged or cut short, or llama.cpp would abort on it.
    """
    contents = read_header(path)
    overrides = dict(overrides or {})
    metadata = {**contents["metadata"], **overrides}
    if "general.architecture" not in metadata:
        raise ModelError(f"{path}: this GGUF file names no architecture: it holds no model")
    status = path.stat()
    rehearsal = rehearse(str(path), status.st_size, status.st_mtime_ns, json.dumps(overrides))
    header = Header(path, metadata, contents["tensors"], rehearsal)
    if rehearsal.fatal and (rehearsal.view is None or rehearsal.view["unsupported"] is None):
        raise damaged(path, f"llama.cpp {rehearsal.reason}")
    reason = _fatal_number(header)
    if reason is not None:
        raise damaged(path, reason)
    return header


def check_adapter(path: Path) -> None:
    """Raise ModelError if a file is no LoRA adapter, or damaged."""
    if read_header(path)["metadata"].get("general.type") != "adapter":
        raise ModelError(f"{path} is not a LoRA adapter: its general.type is not adapter")


def _fatal_number(header: Header) -> str | None:
    """What llama.cpp aborts on, or loops on, when it computes, after it opened the file: epsilons and RoPE dimensions."""
    for key, value in header.metadata.items():
        if key.endswith("epsilon") and isinstance(value, float) and not value >= 0:
            return f"{key} is {value}"
    view = header.rehearsal.view
    if view is None or view["rope_type"] == llama_cpp.LLAMA_ROPE_TYPE_NONE:
        return None
    n_head = header.number("attention.head_count", layer=0)
    head_size = header.number("attention.key_length", header.number("embedding_length") // max(1, n_head))
    for suffix, size in (("", head_size), ("_swa", header.number("attention.key_length_swa", head_size))):
        n_rot = header.number(f"rope.dimension_count{suffix}", size)
        if n_rot % 2 or n_rot > size or (n_rot == 0 and view["unsupported"] is None):
            return f"{header.architecture}.rope.dimension_count{suffix} is {n_rot}, of {size} values in a head"
    sections = header.get("rope.dimension_sections")
    if view["rope_type"] in (llama_cpp.LLAMA_ROPE_TYPE_NORM, llama_cpp.LLAMA_ROPE_TYPE_NEOX) or not isinstance(
        sections, list
    ):
        return None
    if max(sections[:3], default=0) < 1 or sum(sections) > head_size:
        return f"{header.architecture}.rope.dimension_sections is {sections}"
    return None


def fingerprint(path: Path) -> str:
    """Tells model files apart: a hash of the size and of blocks from all over the file.

    Raises:
        ModelError: the file cannot be read.
    """
    n_blocks, block = 512, 4096  # every tensor of a usual model gets some
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for start in range(0, size, max(block, size // n_blocks)):
                file.seek(start)
                digest.update(file.read(block))
    except OSError as err:
        raise ModelError(f"{path}: cannot be read: {err.strerror}") from None
    return digest.hexdigest()
