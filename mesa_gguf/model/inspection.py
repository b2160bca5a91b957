"""What a GGUF model is, whether it can be read with Mesa-Extrapolation, and the memory that this takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp

from ..config import MesaConfig
from ..errors import ConfigError, ModelError
from .header import Header, check_model
from .tuning import Tuning, tuned

ROPE_KINDS = {
    llama_cpp.LLAMA_ROPE_TYPE_NORM: "norm",
    llama_cpp.LLAMA_ROPE_TYPE_NEOX: "neox",
    llama_cpp.LLAMA_ROPE_TYPE_MROPE: "mrope",
    llama_cpp.LLAMA_ROPE_TYPE_IMROPE: "imrope",
    llama_cpp.LLAMA_ROPE_TYPE_VISION: "vision",
}


@dataclass(frozen=True)
class Memory:
    """Bytes for a text of n_tokens: weights and KV cache, without llama.cpp's compute buffers.

    q8_0 is None where a head does not fill whole blocks of it.
    """

    n_tokens: int
    weights: int
    kv_f16: int
    kv_q8_0: int | None


@dataclass(frozen=True)
class Defaults:
    """The numbers that MesaConfig uses for a model where it is given none, in tokens."""

    reading_length: int
    first_chunk: int
    chunk: int
    last_chunk: int
    room: int


@dataclass(frozen=True)
class ModelReport:
    """A model as `inspect` shows it.

    Attributes:
        n_params: number of weights; None if llama.cpp does not know the architecture.
        weight_types: share of the weights' bytes by ggml type, largest first.
        train_length: T in tokens.
        n_head_kv: of each layer, where layers differ.
        position: "rope", "alibi" or "none".
        rope: kind, base, dimensions, scaling; empty without RoPE.
        unsupported: why Mesa cannot read with it; None if it can.
        defaults: None if Mesa cannot read with it. Where numbers of the model were measured and kept, they are these, and
        tuned: is what is kept.
    """

    path: str
    name: str
    architecture: str
    n_params: int | None
    weight_bytes: int
    weight_types: dict[str, float]
    train_length: int
    n_layer: int
    n_head: int | list[int]
    n_head_kv: int | list[int]
    position: str
    rope: dict[str, str | float]
    chat_template: bool
    unsupported: str | None
    kv_bytes_per_token: Memory
    memory: list[Memory]
    defaults: Defaults | None
    tuned: Tuning | None


def inspect_model(path: Path, n_tokens: Sequence[int] = ()) -> ModelReport:
    """Describe a model without loading its weights.

    Args:
        n_tokens: lengths of text to tell the memory for; none: the trained length times 1, 8 and 32.

    Raises:
        ModelError: the file is missing, is no GGUF file, or is damaged.
    """
    header = check_model(path)
    config, tuning = tuned(MesaConfig(), path, header.train_length)
    unsupported, n_params, rope_type = _llama_cpp_view(header)
    n_head = header.get("attention.head_count", 0)
    return ModelReport(
        path=str(path),
        name=str(header.metadata.get("general.name", path.stem)),
        architecture=header.architecture,
        n_params=n_params,
        weight_bytes=header.weight_bytes,
        weight_types=_weight_types(header),
        train_length=header.train_length,
        n_layer=header.n_layer,
        n_head=n_head,
        n_head_kv=header.get("attention.head_count_kv", n_head),
        position=_position(header, rope_type),
        rope=_rope(header, rope_type),
        chat_template="tokenizer.chat_template" in header.metadata,
        unsupported=unsupported,
        kv_bytes_per_token=_memory(header, 1),
        memory=[_memory(header, n) for n in n_tokens or (header.train_length * times for times in (1, 8, 32))],
        defaults=_defaults(config, header) if unsupported is None else None,
        tuned=tuning if unsupported is None else None,
    )


def _llama_cpp_view(header: Header) -> tuple[str | None, int | None, int | None]:
    """Why Mesa cannot read with the model, its number of weights and its RoPE type, by llama.cpp's view of it."""
    try:
        return header.llama_cpp_view
    except ModelError:
        return "this llama.cpp cannot load it", None, None


def _weight_types(header: Header) -> dict[str, float]:
    sizes: Counter[str] = Counter()
    for _, weight_type, n_bytes in header.tensors:
        sizes[weight_type] += n_bytes
    return {weight_type: n_bytes / max(1, sizes.total()) for weight_type, n_bytes in sizes.most_common()}


def _has_rope(rope_type: int | None) -> bool:
    return rope_type is not None and rope_type != llama_cpp.LLAMA_ROPE_TYPE_NONE


def _rope(header: Header, rope_type: int | None) -> dict[str, str | float]:
    if rope_type is None or not _has_rope(rope_type):
        return {}
    # Llama 3's and LongRoPE's scaling are tensors
    factors = any(name.startswith(("rope_freqs.", "rope_factors_")) for name, _, _ in header.tensors)
    kind = ROPE_KINDS.get(rope_type, str(rope_type))
    return {"kind": kind, **header.rope, **({"factors": "per frequency"} if factors else {})}


def _position(header: Header, rope_type: int | None) -> str:
    if _has_rope(rope_type):
        return "rope"
    if header.get("attention.max_alibi_bias", 0) > 0:
        return "alibi"
    return "unknown" if rope_type is None else "none"


def _memory(header: Header, n_tokens: int) -> Memory:
    try:
        kv_q8_0 = header.kv_bytes(n_tokens, llama_cpp.GGML_TYPE_Q8_0, llama_cpp.GGML_TYPE_Q8_0)
    except ConfigError:
        kv_q8_0 = None
    return Memory(n_tokens, header.weight_bytes, header.kv_bytes(n_tokens), kv_q8_0)


def _defaults(config: MesaConfig, header: Header) -> Defaults:
    params = config.params(header.train_length)
    return Defaults(params.reading_length, params.first_chunk, params.chunk, params.last_chunk, params.room)


#
# as text
#


def format_report(report: ModelReport) -> str:
    """The report in lines."""
    types = ", ".join(f"{name} {share:.1%}" for name, share in report.weight_types.items())
    rope = ", ".join(f"{key} {value if isinstance(value, str) else f'{value:g}'}" for key, value in report.rope.items())
    per_token = report.kv_bytes_per_token
    rows = [
        ("model", report.path),
        ("name", report.name),
        ("architecture", report.architecture),
        ("parameters", "unknown" if report.n_params is None else format_count(report.n_params)),
        ("weights", f"{format_bytes(report.weight_bytes)} ({types})"),
        ("layers", f"{report.n_layer}, {_heads(report.n_head)} heads, {_heads(report.n_head_kv)} KV heads"),
        ("trained length", f"{report.train_length} tokens"),
        ("positions", f"{report.position} ({rope})" if rope else report.position),
        ("chat template", "yes" if report.chat_template else "no"),
        ("KV cache", f"{format_bytes(per_token.kv_f16)} a token (f16), {_optional(per_token.kv_q8_0)} (q8_0)"),
        ("Mesa", "supported" if report.unsupported is None else f"not supported: {report.unsupported}"),
    ]
    if report.defaults is not None:
        d = report.defaults
        lengths = f"first chunk {d.first_chunk}, chunk {d.chunk}, last chunk {d.last_chunk}, room {d.room}"
        rows.append(("reading length", f"{d.reading_length} tokens"))
        rows.append(("defaults", f"{lengths} tokens"))
        if report.tuned is not None:
            rows.append(("tuned", f"{report.tuned} ({report.tuned.date})"))
    lines = [f"{key:<16}{value}" for key, value in rows]
    lines += ["", f"{'tokens':>10}  {'weights':>10}  {'KV f16':>10}  {'KV q8_0':>10}  {'sum (f16)':>10}"]
    lines += [
        f"{m.n_tokens:>10}  {format_bytes(m.weights):>10}  {format_bytes(m.kv_f16):>10}  {_optional(m.kv_q8_0):>10}"
        f"  {format_bytes(m.weights + m.kv_f16):>10}"
        for m in report.memory
    ]
    return "\n".join(lines)


def format_bytes(n: int) -> str:
    """1536 -> 1.5 KiB"""
    value = float(n)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def format_count(n: int) -> str:
    """1500000 -> 1.5 M"""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)


def _optional(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else format_bytes(n_bytes)


def _heads(n: int | list[int]) -> str:
    if isinstance(n, int):
        return str(n)
    return str(n[0]) if len(set(n)) == 1 else f"{min(n)} … {max(n)}"
