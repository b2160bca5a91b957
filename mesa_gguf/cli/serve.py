"""``mesa-gguf serve``: OpenAI's API, and a page."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import missing_package
from ..model.hub import find_model
from . import output
from .library import open_library
from .options import (
    Batch,
    EmbeddingModelOption,
    EmbeddingPassage,
    EmbeddingQuery,
    FlashAttn,
    LibraryOption,
    ModelOption,
    NGpuLayers,
    Plain,
    ReadBudget,
    RpcServers,
    Stock,
    Threads,
    TypeK,
    TypeV,
    UBatch,
    Verbose,
    load_options_of,
    open_embedding,
    option,
)

EXAMPLES = """\
Examples:\n
  mesa-gguf serve -m model.gguf\n
  MESA_API_KEY=… mesa-gguf serve -m model.gguf --host 0.0.0.0 --port 8000\n
  mesa-gguf serve -m model.gguf --library ~/papers --n-ctx 65536 --type-k q8_0
"""
WHO = "Who may ask"
LOAD = "Load"


def serve(
    model: ModelOption = None,
    host: Annotated[
        str,
        option(
            "--host",
            metavar="HOST",
            help="Address to listen at; other machines reach it only with an API key.",
            panel=WHO,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        option("--port", min=0, max=65535, metavar="N", help="TCP port to listen at; 0 takes a free one.", panel=WHO),
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="MESA_API_KEY",
            show_envvar=False,
            help="What requests must bear. Better in the environment variable MESA_API_KEY, where other users do not see it.",
            rich_help_panel=WHO,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        option(
            "--allow-host",
            metavar="NAME",
            help="A name that the server is called by. May be given several times.",
            panel=WHO,
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        option(
            "--allow-origin",
            metavar="ORIGIN",
            help="Pages of this origin may ask, as in https://example.org. May be given several times.",
            panel=WHO,
        ),
    ] = None,
    max_queue: Annotated[
        int, option("--max-queue", min=1, metavar="N", help="How many requests may wait; more are refused.", panel=LOAD)
    ] = 64,
    timeout: Annotated[
        float,
        option("--timeout", min=1, metavar="SECONDS", help="Longest time of a request, waiting included.", panel=LOAD),
    ] = 600.0,
    max_tokens: Annotated[
        int | None,
        option(
            "--max-tokens",
            min=1,
            metavar="N",
            help="Longest answer where a chat names none. Default: to the end of the context; 256 about documents.",
            panel=LOAD,
        ),
    ] = None,
    max_upload: Annotated[
        int, option("--max-upload", min=1, metavar="MIB", help="Largest file that is taken, in MiB.", panel=LOAD)
    ] = 256,
    library: LibraryOption = None,
    embedding_model: EmbeddingModelOption = None,
    embedding_query: EmbeddingQuery = None,
    embedding_passage: EmbeddingPassage = None,
    plain: Plain = False,
    stock: Stock = False,
    read_budget: ReadBudget = None,
    verbose: Verbose = False,
    n_ctx: Annotated[
        int | None,
        option(
            "--n-ctx",
            min=1,
            metavar="N",
            help="Size of the context in tokens. Default: 32,768, or less where memory has no room for it.",
            panel="llama.cpp",
        ),
    ] = None,
    type_k: TypeK = "f16",
    type_v: TypeV = "f16",
    flash_attn: FlashAttn = "on",
    threads: Threads = None,
    n_gpu_layers: NGpuLayers = None,
    rpc: RpcServers = None,
    batch: Batch = 512,
    ubatch: UBatch = 512,
) -> None:
    """Serve a model: OpenAI's API under /v1, documents that are read once and kept, and a page for the browser (docs/SERVER.md).

    It ends with Ctrl-C. What was being read goes on at the next start.
    """
    try:
        from ..server.guard import MIB, Limits
        from ..server.run import Settings, address_of, listen, logging_to_stderr, open_records
        from ..server.run import serve as serve_model
    except ModuleNotFoundError as err:
        if (err.name or "").partition(".")[0] not in (
            "fastapi",
            "starlette",
            "uvicorn",
            "python_multipart",
            "prometheus_client",
            "pydantic",
            "h11",
        ):
            raise
        raise missing_package("mesa-gguf serve", str(err.name), "server") from None
    from ..config import MesaConfig
    from ..server.served import load

    settings = Settings(
        host, port, api_key, tuple(allow_host or ()), tuple(allow_origin or ()), max_queue, timeout, Limits(upload=max_upload * MIB), plain, max_tokens
    )  # fmt: skip
    settings.check()
    path = find_model(model)
    load_options = load_options_of(
        type_k, type_v, flash_attn, threads, n_gpu_layers, rpc, batch, ubatch, verbose=verbose
    )
    listener = listen(host, port)
    prefixes = embedding_query, embedding_passage
    with (
        open_embedding(
            embedding_model, *prefixes, threads=threads, n_gpu_layers=n_gpu_layers, verbose=verbose
        ) as embedding,
        open_library(library, writes=True) as opened,
        open_records(opened) as records,
        logging_to_stderr(),
    ):
        llm = load(
            path,
            mesa=MesaConfig(enabled=not stock, read_budget=read_budget),
            n_ctx=n_ctx,
            **load_options,
        )
        output.say_tuning(path.name, llm.tuning)
        output.say(
            f"mesa-gguf: {path.name} at {address_of(listener)} (a context of {llm.n_ctx()} tokens); Ctrl-C ends it"
        )
        serve_model(llm, opened, records, settings, listener, embedding=embedding)
