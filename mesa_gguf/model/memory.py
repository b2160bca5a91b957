"""The KV cache: its types, and whether it fits into memory."""

from __future__ import annotations

import llama_cpp

from ..errors import ConfigError, OutOfMemoryError, Remedy
from ..machine import available_memory
from .header import Header

# the types that llama.cpp takes for a KV cache
KV_TYPES = {
    "f32": llama_cpp.GGML_TYPE_F32,
    "f16": llama_cpp.GGML_TYPE_F16,
    "bf16": 30,  # GGML_TYPE_BF16, which llama_cpp does not name
    "q8_0": llama_cpp.GGML_TYPE_Q8_0,
    "q5_1": llama_cpp.GGML_TYPE_Q5_1,
    "q5_0": llama_cpp.GGML_TYPE_Q5_0,
    "q4_1": llama_cpp.GGML_TYPE_Q4_1,
    "q4_0": llama_cpp.GGML_TYPE_Q4_0,
    "iq4_nl": llama_cpp.GGML_TYPE_IQ4_NL,
}


def is_quantized(kv_type: int | None) -> bool:
    """Whether keys or values of that type are kept in blocks of several."""
    return kv_type in [KV_TYPES[name] for name in KV_TYPES if name not in ("f32", "f16", "bf16")]


def check_kv_types(**types: int | None) -> None:
    """Raise ConfigError for a type that llama.cpp keeps no keys and values in: it would crash when it writes the first ones."""
    for name, kv_type in types.items():
        if kv_type is not None and kv_type not in KV_TYPES.values():
            possible = ", ".join(f"{number} ({kind})" for kind, number in KV_TYPES.items())
            raise ConfigError(f"{name} is {kv_type!r}, which is no type of a KV cache: use one of {possible}")


def check_memory(
    header: Header, n_ctx: int, type_k: int | None, type_v: int | None, n_gpu_layers: int, n_scored: int = 0
) -> None:
    """Raise OutOfMemoryError if the KV cache of n_ctx tokens, and the logits of each, are more than the memory that is free.

    Weights are mapped from the file and need not fit; a cache on a GPU is that device's business. Logits are in this machine's
    memory: n_vocab floats for each token, and llama.cpp's own of a batch.

    Args:
        n_scored: tokens of a batch, where the logits of all tokens are kept (logits_all); 0: they are not.
    """
    free = available_memory()
    if free is None:
        return
    n_tokens = n_ctx or header.train_length
    kv = header.kv_bytes(n_tokens, type_k, type_v) if n_gpu_layers == 0 else 0
    row = 4 * header.n_vocab if n_scored > 0 else 0
    batch = row * min(n_scored, n_tokens)
    logits = row * n_tokens + batch
    if kv + logits <= free:
        return
    what = []
    remedies = [Remedy("n_ctx", n_tokens * max(0, free - batch) // (kv + row * n_tokens), "or less")]
    if logits > 0:
        what.append(f"the logits of n_ctx = {n_tokens} tokens need {logits / 2**30:.1f} GiB")
        remedies.append(Remedy("logits_all", False, why="which keeps none"))
    if kv > 0:
        what.append(f"a KV cache of n_ctx = {n_tokens} tokens needs {kv / 2**30:.1f} GiB")
        remedies.append(
            Remedy("type_k", KV_TYPES["q8_0"], why="which is q8_0, and the same for the values: about half the size")
        )
    raise OutOfMemoryError(
        f"{' and '.join(what)}, {free / 2**30:.1f} GiB are free", *remedies, needed=kv + logits, available=free
    )
