"""The options that commands share, and what they come to."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ConfigError, ModelError
from ..model.hub import HUB_FORM, find_model

if TYPE_CHECKING:
    from ..config import MesaConfig
    from ..reading.embeddings import EmbeddingModel

MESA = "Reading past the trained length (lengths in tokens)"
LIBRARY = "Documents that are kept"
GENERATION = "Generation"
ENGINE = "llama.cpp"
EMBEDDING_ENVIRONMENT = "MESA_EMBEDDING_MODEL"


def option(*names: str, help: str, panel: str | None = None, **kwargs: Any) -> Any:
    """A typer option whose help stands in a panel."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **kwargs)


ModelOption = Annotated[
    str | None,
    option("-m", "--model", metavar="MODEL", help=f"The model: a GGUF file, or {HUB_FORM}. Default: the bundled one."),
]
JsonOption = Annotated[bool, option("--json", help="Print the result as JSON.")]

FilesOption = Annotated[
    list[str] | None,
    option(
        "-f",
        "--file",
        metavar="DOC",
        help="A document: a text, PDF, HTML, DOCX, EPUB or Markdown file, or a folder of such; - reads a text from standard input. "
        "May be given several times.",
    ),
]
ReadOption = Annotated[
    str,
    option(
        "--read",
        metavar="auto|all|each|N",
        help="How much a question reads. all: every chunk. auto: every chunk of a short text, else those that match the question. "
        "N: matching chunks of N tokens together. each: every chunk alone, then the answers together.",
        panel=LIBRARY,
    ),
]
CollectionOption = Annotated[
    str | None,
    option(
        "--collection",
        metavar="NAME",
        help="Ask about the documents of this collection; those given with -f are added to it.",
        panel=LIBRARY,
    ),
]
LibraryOption = Annotated[
    str | None,  # a Path makes the current folder of an empty name
    option(
        "--library",
        metavar="DIR",
        help="Folder of the library. Default: the environment variable MESA_LIBRARY, or the user's data folder.",
        panel=LIBRARY,
    ),
]
EmbeddingModelOption = Annotated[
    str | None,
    option(
        "--embedding-model",
        metavar="MODEL",
        help=f"An embedding model, which finds passages in other words than the question's: a GGUF file, or {HUB_FORM}. Default: the "
        "environment variable MESA_EMBEDDING_MODEL, or none.",
        panel=LIBRARY,
    ),
]
EmbeddingQuery = Annotated[
    str | None,
    option(
        "--embedding-query",
        metavar="TEXT",
        help="What the embedding model was trained to see before a question. Default: by the name in its file, for well-known families.",
        panel=LIBRARY,
    ),
]
EmbeddingPassage = Annotated[
    str | None,
    option("--embedding-passage", metavar="TEXT", help="The same before a passage of a document.", panel=LIBRARY),
]
NoLibrary = Annotated[
    bool, option("--no-library", help="Read one text file whole, and keep nothing of it.", panel=LIBRARY)
]
QuestionOption = Annotated[
    list[str] | None,
    option(
        "-q",
        "--question",
        metavar="QUESTION",
        help="A question; may be given several times. The document is read once.",
    ),
]
QuestionsFile = Annotated[
    str | None, option("--questions", metavar="FILE", help="A file with questions, one on each line.")
]
Encoding = Annotated[
    str | None,
    option(
        "--encoding",
        metavar="NAME",
        help="Encoding of the document and of the file with questions. Default: UTF-8 or UTF-16, whichever it is.",
    ),
]
Plain = Annotated[bool, option("--plain", help="Do not use the model's chat template.")]
JsonLines = Annotated[bool, option("--json", help="Print one JSON object for each question.")]
Quiet = Annotated[bool, option("--quiet", help="Print nothing but the answers.")]
Verbose = Annotated[bool, option("--verbose", help="Show llama.cpp's own messages.")]

Stock = Annotated[bool, option("--stock", help="Read as stock llama.cpp does, without Mesa-Extrapolation.", panel=MESA)]
TrainLength = Annotated[
    int | None,
    option(
        "--train-length",
        metavar="T",
        help="Length that the model was trained at. Default: what the GGUF file says.",
        panel=MESA,
    ),
]
ReadingLength = Annotated[
    int | None,
    option(
        "--reading-length",
        metavar="R",
        help="Length that the model reads well, at most T: longer texts are read in chunks, and distances are kept below R. "
        "Default: T.",
        panel=MESA,
    ),
]
FirstChunk = Annotated[
    int | None,
    option(
        "--first-chunk",
        metavar="F",
        help="Length of the first chunk, which every chunk reads. Default: 100, less for a short R.",
        panel=MESA,
    ),
]
Chunk = Annotated[
    int | None,
    option(
        "--chunk",
        metavar="C",
        help="Longest middle chunk; F + C may be at most R. Default: R - F, and 1,024 at most where T is 4,096 or more.",
        panel=MESA,
    ),
]
LastChunk = Annotated[
    int | None,
    option(
        "--last-chunk",
        metavar="N",
        help="Least length of the last chunk, which reads everything. Default: 512, less for a short R.",
        panel=MESA,
    ),
]
StairWidth = Annotated[
    str,
    option(
        "--stair-width",
        metavar="E",
        help="How many tokens share a step of the stair; auto takes the fewest that fit.",
        panel=MESA,
    ),
]
StairBias = Annotated[
    float | None,
    option(
        "--stair-bias",
        min=0,
        metavar="B",
        help="Lower the logits of keys on the stair by B ln(E). With 1 a step of the stair weighs as one key, with 0 as "
        "E keys. Default: 0.5, for other methods 0.",
        panel=MESA,
    ),
]
LogScaling = Annotated[
    bool | None,
    option(
        "--log-scaling/--no-log-scaling",
        help="Scale queries by the logarithm of their place in the text. Default: as the method has it.",
        panel=MESA,
    ),
]
Tuned = Annotated[
    bool,
    option(
        "--tuned/--no-tuned",
        help="Use the numbers that mesa-gguf tune keeps of the model, where it does, in place of defaults.",
        panel=MESA,
    ),
]
Method = Annotated[
    str,
    option(
        "--method",
        metavar="NAME",
        help="How a long text is read: mesa, which is the fast way, or another method of docs/METHODS.md, to compare with.",
        panel=MESA,
    ),
]

ReadBudget = Annotated[
    int | None,
    option(
        "--read-budget",
        min=0,
        metavar="N",
        help="Each token of an answer reads no more of a long text than its first chunk, its last tokens, and N tokens between, those that "
        "drew most attention: faster on the CPU, but some models answer worse. Default: 0, everything.",
        panel=MESA,
    ),
]

MaxTokens = Annotated[
    int, option("--max-tokens", min=1, metavar="N", help="Length of the longest answer, in tokens.", panel=GENERATION)
]
Temperature = Annotated[
    float,
    option(
        "--temperature",
        min=0,
        metavar="X",
        help="How freely tokens are chosen; 0 always takes the most likely one.",
        panel=GENERATION,
    ),
]
Seed = Annotated[
    int | None,
    option(
        "--seed",
        min=0,
        max=2**32 - 2,
        metavar="N",
        help="Seed of the random choice of tokens, for temperatures above 0. Default: another one each time.",
        panel=GENERATION,
    ),
]

NCtx = Annotated[
    int | None,
    option(
        "--n-ctx",
        min=1,
        metavar="N",
        help="Size of the context in tokens. Default: what document, question and answer need.",
        panel=ENGINE,
    ),
]
TypeK = Annotated[
    str, option("--type-k", metavar="TYPE", help="Type of the keys in the KV cache, such as f16 or q8_0.", panel=ENGINE)
]
TypeV = Annotated[
    str,
    option("--type-v", metavar="TYPE", help="Type of the values in the KV cache, such as f16 or q8_0.", panel=ENGINE),
]
FlashAttn = Annotated[
    str,
    option(
        "--flash-attn",
        metavar="on|off|auto",
        help="Whether to use flash attention; auto uses it where it is faster, which is measured on the CPU.",
        panel=ENGINE,
    ),
]
Threads = Annotated[
    int | None,
    option(
        "--threads",
        min=1,
        metavar="N",
        help="Number of threads. Default: all CPUs to read, one a core to generate, fewer while other programs need them.",
        panel=ENGINE,
    ),
]
NGpuLayers = Annotated[
    int | None,
    option(
        "--n-gpu-layers",
        min=-1,
        metavar="N",
        help="How many layers are computed on the GPU; -1 is all. Default: all, where there is a GPU.",
        panel=ENGINE,
    ),
]
RpcServers = Annotated[
    str | None,
    option(
        "--rpc",
        metavar="HOST:PORT,…",
        help="RPC servers that compute the layers; mesa-gguf rpc-server starts one.",
        panel=ENGINE,
    ),
]
Batch = Annotated[
    int, option("--batch", min=1, metavar="N", help="How many tokens are handed to llama.cpp at once.", panel=ENGINE)
]
UBatch = Annotated[
    int, option("--ubatch", min=1, metavar="N", help="How many tokens are computed at once.", panel=ENGINE)
]


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
    reading_length: int | None,
    use_tuned: bool,
    read_budget: int | None = None,
) -> MesaConfig:
    from ..config import MesaConfig

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
        reading_length=reading_length,
        tuned=use_tuned,
        read_budget=read_budget,
    )


_SIZE = re.compile(r"(\d{1,40}(?:\.\d{1,40})?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)


def bytes_of(name: str, text: str) -> int:
    """A number of bytes: "2000000", "500MB" (of a thousand each), "4.9 GiB" (of 1,024), as other messages have it.

    Raises:
        ConfigError: it is none.
    """
    found = _SIZE.fullmatch(text.strip()) if text.isascii() else None
    if found is None:
        raise ConfigError(f"{name} {text}: it must be a number of bytes, or a size such as 500MB or 2GiB")
    number, letter, binary = found.groups()
    unit = (1024 if binary else 1000) ** " kmgt".index(letter.lower()) if letter else 1
    return int(Fraction(number) * unit)


def kv_type_of(name: str) -> int:
    from ..model.memory import KV_TYPES

    if name.lower() not in KV_TYPES:
        raise ConfigError(f"there is no KV type {name}: use one of {', '.join(KV_TYPES)}")
    return KV_TYPES[name.lower()]


@contextlib.contextmanager
def open_embedding(
    model: str | None,
    query: str | None,
    passage: str | None,
    *,
    threads: int | None,
    n_gpu_layers: int | None = None,
    verbose: bool = False,
) -> Iterator[EmbeddingModel | None]:
    """The embedding model that is named, on the command line or in the environment; None where none is.

    Raises:
        ModelError: its file cannot be used.
        ConfigError: there is what stands before texts, and no model.
    """
    name = model if model is not None else os.environ.get(EMBEDDING_ENVIRONMENT, "").strip() or None
    if name is None:
        if query is not None or passage is not None:
            raise ConfigError(
                "--embedding-query and --embedding-passage are for an embedding model: name one with --embedding-model"
            )
        yield None
        return
    from ..reading.embeddings import EmbeddingModel

    gpu = {} if n_gpu_layers is None else {"n_gpu_layers": n_gpu_layers}
    try:
        opened = EmbeddingModel(
            find_model(name),
            query=query,
            passage=passage,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=verbose,
            **gpu,
        )
    except ModelError as err:
        if model is not None:
            raise
        raise ModelError(f"{EMBEDDING_ENVIRONMENT} in the environment: {err}") from None
    with opened:
        yield opened


def load_options_of(
    type_k: str,
    type_v: str,
    flash_attn: str,
    threads: int | None,
    n_gpu_layers: int | None,
    rpc: str | None,
    batch: int,
    ubatch: int,
    *,
    verbose: bool,
) -> dict[str, Any]:
    """`MesaLlama`'s arguments from the options that llama.cpp has too.

    Raises:
        ConfigError: there is no such KV type, or no such choice of flash attention.
    """
    return {
        "type_k": kv_type_of(type_k),
        "type_v": kv_type_of(type_v),
        "flash_attn": flash_attn_of(flash_attn),
        "n_batch": batch,
        "n_ubatch": ubatch,
        "n_threads": threads,
        "n_threads_batch": threads,
        "n_gpu_layers": n_gpu_layers,
        "rpc_servers": rpc,
        "verbose": verbose,
    }
