"""The options that commands share, and what they come to."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from ..config import MesaConfig
from ..errors import ConfigError
from ..model.hub import HUB_FORM

MESA = "Reading past the trained length (lengths in tokens)"
GENERATION = "Generation"
ENGINE = "llama.cpp"


def option(*names: str, help: str, panel: str | None = None, **kwargs: Any) -> Any:
    """A typer option whose help stands in a panel."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **kwargs)


ModelOption = Annotated[
    str | None,
    option("-m", "--model", metavar="MODEL", help=f"A GGUF file, or {HUB_FORM}. Default: the bundled model."),
]
JsonOption = Annotated[bool, option("--json", help="Print JSON.")]

FileOption = Annotated[
    str | None, option("-f", "--file", metavar="DOC", help="The document, a text file; - reads standard input.")
]
QuestionOption = Annotated[
    list[str] | None,
    option("-q", "--question", metavar="QUESTION", help="A question; may be repeated. The document is read once."),
]
QuestionsFile = Annotated[str | None, option("--questions", metavar="FILE", help="A file with one question a line.")]
Encoding = Annotated[
    str | None,
    option("--encoding", metavar="NAME", help="Of the document and of the questions' file. Default: UTF-8 or UTF-16."),
]
Plain = Annotated[bool, option("--plain", help="Do not use the model's chat template.")]
JsonLines = Annotated[bool, option("--json", help="Print one JSON object a question.")]
Quiet = Annotated[bool, option("--quiet", help="Print answers only.")]
Verbose = Annotated[bool, option("--verbose", help="Show llama.cpp's messages.")]

Stock = Annotated[bool, option("--stock", help="Switch Mesa-Extrapolation off.", panel=MESA)]
TrainLength = Annotated[
    int | None,
    option("--train-length", metavar="T", help="What the model was trained at. Default: the GGUF's.", panel=MESA),
]
FirstChunk = Annotated[
    int | None,
    option("--first-chunk", metavar="F", help="Read by every chunk. Default: 100, less for a short T.", panel=MESA),
]
Chunk = Annotated[
    int | None, option("--chunk", metavar="C", help="Longest middle chunk; F + C <= T. Default: T - F.", panel=MESA)
]
LastChunk = Annotated[
    int | None,
    option(
        "--last-chunk",
        metavar="N",
        help="At least; the last chunk reads everything. Default: 512, less for a short T.",
        panel=MESA,
    ),
]
StairWidth = Annotated[
    str,
    option("--stair-width", metavar="E", help="Tokens on a step of the stair. auto: the fewest that fit.", panel=MESA),
]
StairBias = Annotated[
    float | None,
    option(
        "--stair-bias",
        min=0,
        metavar="B",
        help="Lower the logits of far keys by B ln(E). 1: a step of the stair weighs as one key; 0: as E keys. Default: 0.5.",
        panel=MESA,
    ),
]
LogScaling = Annotated[
    bool | None,
    option("--log-scaling/--no-log-scaling", help="Scale queries with the logarithm of the length.", panel=MESA),
]
Method = Annotated[
    str,
    option(
        "--method",
        metavar="NAME",
        help="Another member of the weave family, to compare with: docs/METHODS.md. mesa: the default, and the fast one.",
        panel=MESA,
    ),
]

MaxTokens = Annotated[
    int, option("--max-tokens", min=1, metavar="N", help="Longest answer in tokens.", panel=GENERATION)
]
Temperature = Annotated[
    float, option("--temperature", min=0, metavar="X", help="0 takes the most likely token.", panel=GENERATION)
]
Seed = Annotated[
    int | None,
    option("--seed", min=0, max=2**32 - 2, metavar="N", help="For temperatures above 0.", panel=GENERATION),
]

NCtx = Annotated[
    int | None, option("--n-ctx", min=1, metavar="N", help="Context in tokens. Default: what is needed.", panel=ENGINE)
]
TypeK = Annotated[
    str, option("--type-k", metavar="TYPE", help="Of the keys in the KV cache: f16, q8_0, …", panel=ENGINE)
]
TypeV = Annotated[str, option("--type-v", metavar="TYPE", help="Of the values in the KV cache.", panel=ENGINE)]
FlashAttn = Annotated[
    str,
    option(
        "--flash-attn", metavar="on|off|auto", help="Flash attention. auto: where the devices have it.", panel=ENGINE
    ),
]
Threads = Annotated[
    int | None,
    option("--threads", min=1, metavar="N", help="Default: all CPUs to read, one a core to generate.", panel=ENGINE),
]
NGpuLayers = Annotated[
    int | None,
    option(
        "--n-gpu-layers",
        min=-1,
        metavar="N",
        help="Layers on the GPU, -1: all. Default: all where there is a GPU.",
        panel=ENGINE,
    ),
]
RpcServers = Annotated[
    str | None,
    option(
        "--rpc", metavar="HOST:PORT,…", help="Servers that take the layers: see mesa-gguf rpc-server.", panel=ENGINE
    ),
]
Batch = Annotated[int, option("--batch", min=1, metavar="N", help="Tokens handed over at once.", panel=ENGINE)]
UBatch = Annotated[int, option("--ubatch", min=1, metavar="N", help="Tokens computed at once.", panel=ENGINE)]


def stair_width_of(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--stair-width {text}: it must be a whole number, or auto") from None


def flash_attn_of(text: str) -> bool | Literal["auto"]:
    if text not in ("on", "off", "auto"):
        raise ConfigError(f"--flash-attn {text}: it must be on, off or auto")
    return "auto" if text == "auto" else text == "on"


def config_of(
    stock: bool,
    train_length: int | None,
    first_chunk: int | None,
    chunk: int | None,
    last_chunk: int | None,
    stair_width: str,
    log_scaling: bool | None,
    stair_bias: float | None,
    method: str,
) -> MesaConfig:
    return MesaConfig(
        enabled=not stock,
        train_length=train_length,
        first_chunk=first_chunk,
        chunk=chunk,
        last_chunk=last_chunk,
        stair_width=stair_width_of(stair_width),
        log_scaling=log_scaling,
        stair_bias=stair_bias,
        method=method,
    )


def kv_type_of(name: str) -> int:
    from ..model.memory import KV_TYPES

    if name.lower() not in KV_TYPES:
        raise ConfigError(f"there is no KV type {name}: use one of {', '.join(KV_TYPES)}")
    return KV_TYPES[name.lower()]
