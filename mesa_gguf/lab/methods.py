"""Methods that extend a model's context without training, by name: the one place that knows how each becomes a `Llama`.

    >>> llm = open_model(path, "yarn", 8192)

A text that fits into the trained length T is read alike by all of them: as stock llama.cpp reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import llama_cpp

from ..config import MesaConfig
from ..errors import ConfigError, ModelError
from ..llama import MesaLlama
from ..model.header import Header, check_model
from ..reading.reader import load_model
from ..reading.shelf import ReadMode

Rope = Callable[[Header, int, int], dict[str, Any]]
"""Of (model, trained length, length of the text): the arguments of `llama_cpp.Llama` that scale RoPE for that length."""


@dataclass(frozen=True)
class Method:
    """A method by its name.

    Attributes:
        source: where it is defined.
        engine: the `MesaConfig.method` that it is; None: stock attention.
        rope: how it scales RoPE past the trained length; None: not at all.
        quadratic: the time to read a text grows with the square of its length.
        default: it is compared where no method is named.
    """

    name: str
    description: str
    source: str
    engine: str | None = None
    rope: Rope | None = None
    quadratic: bool = True
    default: bool = True


# s of Dynamic NTK: the one that is best for the bundled model, see docs/EVALUATION.md. 1 is NTK-aware scaling by L/T.
NTK_FACTOR = 3.0


def _rope_scaling(header: Header) -> str:
    """How the model itself scales RoPE: "none", "linear", "yarn", …"""
    return str(header.get("rope.scaling.type", "linear" if _trained_scale(header) != 1 else "none"))


def _trained_scale(header: Header) -> float:
    """The factor on positions that the model was trained with."""
    factor = float(header.get("rope.scaling.factor", header.get("rope.scale_linear", 0)))
    return 1 / factor if factor else 1.0


def _linear(header: Header, train_length: int, n_tokens: int) -> dict[str, Any]:
    if _rope_scaling(header) not in ("none", "linear"):
        raise ModelError(
            f"{header.path}: linear interpolation on top of the model's own {_rope_scaling(header)} is not defined"
        )
    return {"rope_freq_scale": _trained_scale(header) * train_length / n_tokens}


def _dynamic_ntk(header: Header, train_length: int, n_tokens: int) -> dict[str, Any]:
    n_head = header.number("attention.head_count", 1, layer=0)
    head = header.get("attention.key_length", int(header.get("embedding_length", 0)) // max(1, n_head))
    n_dims = int(header.get("rope.dimension_count", head))
    scale = NTK_FACTOR * n_tokens / train_length - (NTK_FACTOR - 1)
    return {"rope_freq_base": float(header.get("rope.freq_base", 10000.0)) * scale ** (n_dims / (n_dims - 2))}


def _yarn(header: Header, train_length: int, n_tokens: int) -> dict[str, Any]:
    own = _rope_scaling(header)
    if own == "yarn":  # its factor counts from the length before the model's own extension
        train_length = int(header.get("rope.scaling.original_context_length", train_length))
    elif _trained_scale(header) != 1:
        raise ModelError(f"{header.path}: YaRN on top of the model's own {own} scaling is not defined")
    return {
        "rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN,
        "rope_freq_scale": train_length / n_tokens,
        "yarn_orig_ctx": train_length,
        "yarn_ext_factor": 1.0,  # llama.cpp then multiplies cos and sin by 0.1 ln(n_tokens / T) + 1, YaRN's temperature
    }


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "mesa",
            "chunk-triangular attention and the anchored stair",
            "Mesa-Extrapolation, arXiv 2410.15859",
            engine="mesa",
            quadratic=False,
        ),
        Method("stock", "stock llama.cpp, positions past T as they come", "llama.cpp"),
        Method("linear", "positions times T/L", "position interpolation, arXiv 2306.15595", rope=_linear),
        Method(
            "dynamic-ntk", "RoPE's base grown with the length", "Dynamic NTK, see arXiv 2309.00071", rope=_dynamic_ntk
        ),
        Method("yarn", "RoPE scaled by frequency, and a temperature", "YaRN, arXiv 2309.00071", rope=_yarn),
        *(
            Method(name, description, source, engine=name, quadratic=name not in ("mesa-exact", "star"), default=False)
            for name, description, source in (
                ("mesa-exact", "mesa with equation 3 for every query, not anchored", "arXiv 2410.15859"),
                ("star", "blocks behind an anchor block, true positions", "Star Attention, arXiv 2411.17116"),
                ("stair", "equation 3 without chunks", "arXiv 2410.15859"),
                ("rerope", "distances up to N, then N", "ReRoPE, Su 2023"),
                ("leaky-rerope", "distances that grow slower past N", "Leaky ReRoPE, Su 2023"),
                ("self-extend", "grouped positions past N", "Self-Extend, arXiv 2401.01325"),
                ("lm-infinite", "the first tokens and a window, distances up to N", "LM-Infinite, arXiv 2308.16137"),
                (
                    "streaming-llm",
                    "the first tokens and a window, places in that cache",
                    "StreamingLLM, arXiv 2309.17453",
                ),
            )
        ),
    )
}


OPTIONS = tuple(field.name for field in fields(MesaConfig) if field.name not in ("enabled", "plan", "method"))
"""Fields of `MesaConfig` that a setting may change."""

READ = "read"
"""The option of a setting that says how much a question reads of a document that is kept in a library."""

RENAMED = {"origin": "stock"}
"""Names that methods had in version 0.1."""


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    if name in RENAMED:
        raise renamed(name, RENAMED[name])
    if name not in METHODS:
        raise ConfigError(f"there is no method {name}: use one of {', '.join(METHODS)}")
    return METHODS[name]


@dataclass(frozen=True)
class Setting:
    """A method with options of its own.

    Attributes:
        name: as it is written: "mesa,chunk=1024,stair_bias=0".
        overrides: fields of `MesaConfig`.
        read: how much of a document that is kept in a library each question reads; None: it is read whole, in one go.
    """

    name: str
    method: Method
    overrides: Mapping[str, Any]
    read: ReadMode | None = None


def find_setting(text: str) -> Setting:
    """The method of a name, with the fields of `MesaConfig` that are written behind it, and "read".

    Raises:
        ConfigError: there is no such method or field, or the method has no options.
    """
    name, *written = text.split(",")
    method = find_method(name.strip())
    overrides: dict[str, Any] = {}
    read: ReadMode | None = None
    for option in written:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals or key not in (*OPTIONS, READ):
            raise ConfigError(
                f"{text}: {key} is no option of a method: write NAME=VALUE, with one of {', '.join((*OPTIONS, READ))}"
            )
        if key == READ:
            read = _read_mode(text, value)
            continue
        try:
            overrides[key] = json.loads(value)
        except (ValueError, RecursionError):
            raise ConfigError(f"{text}: {value} is no number, true or false") from None
    if method.engine is None and not overrides.keys() <= {"train_length"}:
        raise ConfigError(f"{text}: {method.name} has no options but train_length")
    if read is not None and method.engine not in ("mesa", "mesa-exact"):
        raise ConfigError(f"{text}: {method.name} cannot read chunks that are kept: write mesa,{READ}={read}")
    return Setting(text, method, overrides, read)


def _read_mode(text: str, value: str) -> ReadMode:
    if value == "auto":
        return "auto"
    if value == "all":
        return "all"
    if value.isdecimal() and value.isascii() and int(value) > 0:
        return int(value)
    raise ConfigError(f"{text}: {READ} is {value}: it must be auto, all, or a number of tokens")


def renamed(old: str, new: str) -> ConfigError:
    """The error to raise for a method's former name."""
    return ConfigError(f"the method {old} is called {new} now: give {new}")


def check_method(header: Header, method: Method, overrides: Mapping[str, Any] | None = None) -> None:
    """Raise if the model cannot be read with the method, before anything is loaded.

    Raises:
        ModelError: the model has no RoPE to scale, or its architecture is not supported.
        ConfigError: the overrides cannot work.
    """
    if method.engine is not None:
        _config(method, overrides or {}).params(header.train_length)
        if header.unsupported is not None:
            raise ModelError(
                f"{header.path}: {method.name} cannot read with this model (architecture {header.architecture}): "
                f"{header.unsupported}"
            )
    if method.rope is not None:
        if header.llama_cpp_view[2] == llama_cpp.LLAMA_ROPE_TYPE_NONE:
            raise ModelError(f"{header.path}: {method.name} scales RoPE, which this model does not have")
        method.rope(header, header.train_length, 2 * header.train_length)


def _config(method: Method, overrides: Mapping[str, Any]) -> MesaConfig:
    if method.engine is None:
        return MesaConfig(enabled=False, train_length=overrides.get("train_length"))
    # the default is left out, so that it stays the default's business
    named: dict[str, Any] = {} if method.engine == "mesa" else {"method": method.engine}  # "mesa" is the default
    # nor are numbers that were kept: a result depends on nothing that is not written beside it
    return MesaConfig(**{"tuned": False, **overrides, **named})


def open_model(
    path: Path,
    method: str,
    n_tokens: int,
    *,
    overrides: Mapping[str, Any] | None = None,
    kept: bool = False,
    **llama_kwargs: Any,
) -> MesaLlama:
    """A model that reads texts of up to n_tokens tokens, answers included, with a method.

    Args:
        n_tokens: the length asked; the methods that scale RoPE scale it for exactly that.
        overrides: fields of `MesaConfig`, for the methods that the engine computes; "train_length" counts for all.
        kept: a text comes in chunks that are kept, a short one too.
        **llama_kwargs: other arguments of `MesaLlama`.

    Raises:
        MesaError: as `MesaLlama` does; the method is unknown, or does not apply to the model.
    """
    found = find_method(method)
    header = check_model(path)
    overrides = overrides or {}
    check_method(header, found, overrides)
    train_length = overrides.get("train_length") or header.train_length
    plain = train_length if found.engine is None else _config(found, overrides).params(train_length).reading_length
    if n_tokens <= plain and not kept:
        return load_model(path, mesa=MesaConfig(enabled=False), n_ctx=n_tokens, **llama_kwargs)
    rope = found.rope(header, train_length, n_tokens) if found.rope is not None else {}
    return load_model(path, mesa=_config(found, overrides), n_ctx=n_tokens, **rope, **llama_kwargs)
