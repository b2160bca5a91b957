"""The command line: ``mesa-gguf ask``, ``inspect``, ``plan``, ``demo``, ``rpc-server``, ``bench`` and ``eval``.

What the user got wrong is told in one line on standard error, with exit code 2.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import __version__, _library
from .bundled import HUB_FORM
from .config import MesaConfig, MesaPlan
from .errors import ConfigError, MesaError, PromptError

if TYPE_CHECKING:
    from . import ask as asking
    from .llama import MesaLlama, Progress

# Modules that import matplotlib, huggingface_hub and the like are imported where they are used: --help must be quick.

_given: list[str] = []  # the arguments of this process's command

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# click's own class, or that of the copy inside newer versions of typer, which has no public name
_ClickException: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="mesa-gguf",
    help="Ask questions of documents longer than a local model's context.",
    epilog="""\
Examples:\n
  mesa-gguf demo\n
  mesa-gguf ask -m model.gguf -f report.txt "What was decided in March?"\n
  mesa-gguf inspect model.gguf
""",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    _given[:] = arguments
    command = typer.main.get_command(app)
    try:
        with contextlib.nullcontext() if "--verbose" in arguments else _silent_llama_cpp():
            code = command.main(arguments, prog_name="mesa-gguf", standalone_mode=False)
        sys.stdout.flush()
    except (MesaError, OSError) as err:
        if isinstance(err, BrokenPipeError):  # the reader of a pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
            return 1
        return _fail(_in_options(str(err)))
    except _ClickException as err:
        return _fail(err.format_message())  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        print("mesa-gguf: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def _silent_llama_cpp() -> Iterator[None]:
    """Without llama.cpp's log, errors included: they come back as exceptions, which are told in one line."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(silence, None)
    try:
        yield
    finally:
        llama_cpp.llama_log_set(_library._callback, None)


def _fail(message: str) -> int:
    if message:  # empty where help was printed instead
        print(f"mesa-gguf: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR


# what the library calls by its arguments, by the names that they have here
_OPTION_NAMES = {
    "verbose=True": "--verbose",
    "flash_attn=True": "--flash-attn on",
    "MesaConfig(enabled=False)": "--stock",
    "type_k=8, type_v=8 (q8_0)": "--type-k q8_0 --type-v q8_0",
    "train_length": "--train-length",
    "first_chunk": "--first-chunk",
    "last_chunk": "--last-chunk",
    "stair_width": "--stair-width",
    "n_ctx": "--n-ctx",
}
_OPTION_NAME = re.compile(r"(?<![\w/.-])(?:" + "|".join(map(re.escape, _OPTION_NAMES)) + r")(?![\w/-]|\.\w)")


def _in_options(message: str) -> str:
    """A message of the library, with options in place of arguments."""
    return _OPTION_NAME.sub(lambda match: _OPTION_NAMES[match[0]], message)


#
# options
#

MESA = "Reading past the trained length (lengths in tokens)"
GENERATION = "Generation"
ENGINE = "llama.cpp"


def _option(*names: str, help: str, panel: str | None = None, **kwargs: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **kwargs)


ModelOption = Annotated[
    str | None,
    _option("-m", "--model", metavar="MODEL", help=f"A GGUF file, or {HUB_FORM}. Default: the bundled model."),
]
JsonOption = Annotated[bool, _option("--json", help="Print JSON.")]

FileOption = Annotated[
    str | None, _option("-f", "--file", metavar="DOC", help="The document, a text file; - reads standard input.")
]
QuestionOption = Annotated[
    list[str] | None,
    _option("-q", "--question", metavar="QUESTION", help="A question; may be repeated. The document is read once."),
]
QuestionsFile = Annotated[str | None, _option("--questions", metavar="FILE", help="A file with one question a line.")]
Encoding = Annotated[str, _option("--encoding", metavar="NAME", help="Of the document and of the questions' file.")]
Plain = Annotated[bool, _option("--plain", help="Do not use the model's chat template.")]
JsonLines = Annotated[bool, _option("--json", help="Print one JSON object a question.")]
Quiet = Annotated[bool, _option("--quiet", help="Print answers only.")]
Verbose = Annotated[bool, _option("--verbose", help="Show llama.cpp's messages.")]

Stock = Annotated[bool, _option("--stock", help="Switch Mesa-Extrapolation off.", panel=MESA)]
TrainLength = Annotated[
    int | None,
    _option("--train-length", metavar="T", help="What the model was trained at. Default: the GGUF's.", panel=MESA),
]
FirstChunk = Annotated[
    int | None,
    _option("--first-chunk", metavar="F", help="Read by every chunk. Default: 100, less for a short T.", panel=MESA),
]
Chunk = Annotated[
    int | None, _option("--chunk", metavar="C", help="Longest middle chunk; F + C <= T. Default: T - F.", panel=MESA)
]
LastChunk = Annotated[
    int | None,
    _option(
        "--last-chunk",
        metavar="N",
        help="At least; the last chunk reads everything. Default: 512, less for a short T.",
        panel=MESA,
    ),
]
StairWidth = Annotated[
    str,
    _option("--stair-width", metavar="E", help="Tokens on a step of the stair. auto: the fewest that fit.", panel=MESA),
]
StairBias = Annotated[
    float | None,
    _option(
        "--stair-bias",
        min=0,
        metavar="B",
        help="Lower the logits of far keys by B ln(E). 1: a step of the stair weighs as one key; 0: as E keys. Default: 0.5.",
        panel=MESA,
    ),
]
LogScaling = Annotated[
    bool | None,
    _option("--log-scaling/--no-log-scaling", help="Scale queries with the logarithm of the length.", panel=MESA),
]
Method = Annotated[
    str,
    _option(
        "--method",
        metavar="NAME",
        help="Another member of the weave family, to compare with: docs/METHODS.md. mesa: the default, and the fast one.",
        panel=MESA,
    ),
]

MaxTokens = Annotated[
    int, _option("--max-tokens", min=1, metavar="N", help="Longest answer in tokens.", panel=GENERATION)
]
Temperature = Annotated[
    float, _option("--temperature", min=0, metavar="X", help="0 takes the most likely token.", panel=GENERATION)
]
Seed = Annotated[
    int | None,
    _option("--seed", min=0, max=2**32 - 2, metavar="N", help="For temperatures above 0.", panel=GENERATION),
]

NCtx = Annotated[
    int | None, _option("--n-ctx", min=1, metavar="N", help="Context in tokens. Default: what is needed.", panel=ENGINE)
]
TypeK = Annotated[
    str, _option("--type-k", metavar="TYPE", help="Of the keys in the KV cache: f16, q8_0, …", panel=ENGINE)
]
TypeV = Annotated[str, _option("--type-v", metavar="TYPE", help="Of the values in the KV cache.", panel=ENGINE)]
FlashAttn = Annotated[
    str,
    _option("--flash-attn", metavar="on|off|auto", help="Flash attention. auto: where the devices have it.", panel=ENGINE),
]
Threads = Annotated[
    int | None,
    _option("--threads", min=1, metavar="N", help="Default: all cores to read, half to generate.", panel=ENGINE),
]
NGpuLayers = Annotated[
    int | None,
    _option(
        "--n-gpu-layers",
        min=-1,
        metavar="N",
        help="Layers on the GPU, -1: all. Default: all where there is a GPU.",
        panel=ENGINE,
    ),
]
RpcServers = Annotated[
    str | None,
    _option("--rpc", metavar="HOST:PORT,…", help="Servers that take the layers: see mesa-gguf rpc-server.", panel=ENGINE),
]
Batch = Annotated[int, _option("--batch", min=1, metavar="N", help="Tokens handed over at once.", panel=ENGINE)]
UBatch = Annotated[int, _option("--ubatch", min=1, metavar="N", help="Tokens computed at once.", panel=ENGINE)]


def _stair_width(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--stair-width {text}: it must be a whole number, or auto") from None


def _flash_attn(text: str) -> bool | Literal["auto"]:
    if text not in ("on", "off", "auto"):
        raise ConfigError(f"--flash-attn {text}: it must be on, off or auto")
    return "auto" if text == "auto" else text == "on"


def _config(
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
        stair_width=_stair_width(stair_width),
        log_scaling=log_scaling,
        stair_bias=stair_bias,
        method=method,
    )


def command_line() -> str:
    """The command as it was given, to be kept with results: of absolute paths only the last part."""
    words = (Path(word).name if Path(word).is_absolute() else word for word in _given)
    return "mesa-gguf " + shlex.join(words)


def _version(show: bool) -> None:
    if show:
        print(f"mesa-gguf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


#
# ask
#


@dataclass(frozen=True)
class _Times:
    """Seconds that came before the first answer."""

    load: float
    prefill: float


@app.command(
    epilog="""\
Examples:\n
  mesa-gguf ask -m model.gguf -f report.txt "What was decided in March?"\n
  mesa-gguf ask -m hf:owner/repo/file.gguf -f log.txt -q "When?" -q "Who?"\n
  pdftotext in.pdf - | mesa-gguf ask -m model.gguf -f - --questions q.txt\n
  mesa-gguf ask -m model.gguf -f log.txt "Who?" --json --type-k q8_0
"""
)
def ask(
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="The question.")] = None,
    model: ModelOption = None,
    file: FileOption = None,
    questions: QuestionOption = None,
    questions_file: QuestionsFile = None,
    encoding: Encoding = "utf-8",
    plain: Plain = False,
    as_json: JsonLines = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    stock: Stock = False,
    train_length: TrainLength = None,
    first_chunk: FirstChunk = None,
    chunk: Chunk = None,
    last_chunk: LastChunk = None,
    stair_width: StairWidth = "auto",
    log_scaling: LogScaling = None,
    stair_bias: StairBias = None,
    method: Method = "mesa",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    n_ctx: NCtx = None,
    type_k: TypeK = "f16",
    type_v: TypeV = "f16",
    flash_attn: FlashAttn = "on",
    threads: Threads = None,
    n_gpu_layers: NGpuLayers = None,
    rpc: RpcServers = None,
    batch: Batch = 512,
    ubatch: UBatch = 512,
) -> None:
    """Answer questions about a document, which is read once and may be longer than the model's context."""
    from . import ask as asking
    from .bundled import find_model

    config = _config(stock, train_length, first_chunk, chunk, last_chunk, stair_width, log_scaling, stair_bias, method)
    attention = {"type_k": _kv_type(type_k), "type_v": _kv_type(type_v), "flash_attn": _flash_attn(flash_attn)}
    if file == questions_file == "-":
        raise PromptError("the document and the questions cannot both come from standard input")
    asked = _questions(question, questions or [], questions_file, encoding)
    document = _document(file, encoding)

    path = find_model(model)
    prompts = asking.make_prompts(asking.load_vocabulary(path, verbose), document, asked, plain=plain)
    if n_ctx is not None and prompts.n_longest >= n_ctx:
        raise PromptError(
            f"document and question have {prompts.n_longest} tokens, which is too much for --n-ctx {n_ctx}: "
            f"make it {prompts.n_longest + max_tokens} or more, or leave it out"
        )
    start = time.perf_counter()
    llm = asking.load_model(
        path,
        mesa=config,
        n_ctx=prompts.n_ctx(max_tokens) if n_ctx is None else n_ctx,
        n_batch=batch,
        n_ubatch=ubatch,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=n_gpu_layers,
        rpc_servers=rpc,
        seed=seed,
        verbose=verbose,
        **attention,
    )
    load = time.perf_counter() - start
    show = not quiet and not verbose
    with _progress_bar(show and sys.stderr.isatty()) as llm.progress:
        prefill = asking.read_document(llm, prompts)
    llm.progress = None
    if show and not as_json:
        print(_reading_line(llm, len(prompts.document), prefill), file=sys.stderr)

    def answer(index: int, on_text: Callable[[str], None] | None = None) -> asking.Answer:
        return asking.answer(llm, prompts, index, max_tokens=max_tokens, temperature=temperature, on_text=on_text)

    for index, text in enumerate(asked):
        if as_json:
            result = _result(text, answer(index), llm, path, prompts, _Times(load, prefill))
            print(json.dumps(result, ensure_ascii=False), flush=True)
            continue
        if len(asked) > 1 and not quiet:
            print(f"> {text}")
        answer(index, _write)
        print("\n" if len(asked) > index + 1 and not quiet else "", flush=True)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _questions(first: str | None, others: list[str], file: str | None, encoding: str) -> list[str]:
    lines = _read_text(file, encoding).splitlines() if file is not None else []
    given = [*([] if first is None else [first]), *others]
    if any(not text.strip() for text in given):
        raise PromptError("a question is empty")
    asked = [text.strip() for text in (*given, *lines) if text.strip()]
    if not asked:
        reason = "no question" if file is None else f"{file}: there is no question in it"
        raise PromptError(
            f'{reason}: give one at the end ("Who was there?"), with -q, or one a line with --questions FILE'
        )
    return asked


def _document(file: str | None, encoding: str) -> str:
    if file is None:
        raise PromptError("no document: give a text file with -f, or -f - to read standard input")
    text = _read_text(file, encoding).strip()
    if not text:
        raise PromptError(f"{_name(file)}: the document is empty")
    return text


def _read_text(file: str, encoding: str) -> str:
    """A text file, or standard input for "-", with line ends as \\n and without a byte order mark."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
    except IsADirectoryError:
        raise PromptError(f"{file}: is a folder, not a text file") from None
    except FileNotFoundError:
        raise PromptError(f"{file}: there is no such file") from None
    except OSError as err:
        raise PromptError(f"{_name(file)}: cannot be read: {err.strerror}") from None
    try:
        text = data.decode(encoding)
    except LookupError:
        raise PromptError(f"there is no encoding {encoding}: try utf-8, latin-1, cp1252 or utf-16") from None
    except UnicodeDecodeError as err:
        raise PromptError(
            f"{_name(file)}: is not {encoding}: byte 0x{data[err.start]:02x} at offset {err.start}; name its encoding "
            f"(--encoding latin-1), or convert it (iconv -f latin1 -t utf-8)"
        ) from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _name(file: str) -> str:
    return "standard input" if file == "-" else file


def _kv_type(name: str) -> int:
    from .ask import KV_TYPES

    if name.lower() not in KV_TYPES:
        raise ConfigError(f"there is no KV type {name}: use one of {', '.join(KV_TYPES)}")
    return KV_TYPES[name.lower()]


@contextlib.contextmanager
def _progress_bar(shown: bool) -> Iterator[Progress | None]:
    """A bar on standard error that MesaLlama moves while it reads; None if it is not to be shown."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    class Speed(ProgressColumn):
        def render(self, task: Task) -> str:
            return "" if task.speed is None else f"{task.speed:.0f} tokens/s"

    columns = (
        TextColumn("reading"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total} tokens"),
        Speed(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda n_done, n_all: bar.update(task, completed=n_done, total=n_all)


def _reading_line(llm: MesaLlama, n_tokens: int, seconds: float) -> str:
    line = f"read {n_tokens} tokens in {seconds:.1f} s ({n_tokens / seconds:.0f} tokens/s)"
    plan = llm.plan()
    if not llm.mesa.enabled:
        return f"{line}, stock llama.cpp"
    if plan.is_plain:
        return f"{line}, within the trained length ({llm.train_length})"
    return (
        f"{line} in {len(plan.chunk_starts)} chunks, stair width {plan.stair_width}, trained length {llm.train_length}"
    )


def _result(
    question: str, result: asking.Answer, llm: MesaLlama, path: Path, prompts: asking.Prompts, times: _Times
) -> dict[str, Any]:
    """What --json prints for a question."""
    n_document = len(prompts.document)
    return {
        "question": question,
        "answer": result.text,
        "finish_reason": result.finish_reason,
        "n_tokens": {"document": n_document, "question": result.n_question, "answer": result.n_tokens},
        "timings": {
            "load_s": times.load,
            "prefill_s": times.prefill,
            "prefill_tokens_per_s": n_document / times.prefill,
            "first_token_s": result.first_token_seconds,
            "answer_s": result.seconds,
            "answer_tokens_per_s": result.n_tokens / result.seconds,
        },
        "plan": {"enabled": llm.mesa.enabled, "train_length": llm.train_length, **_plan_fields(llm.plan())},
        "model": str(path),
    }


def _plan_fields(plan: MesaPlan) -> dict[str, Any]:
    return {"chunk_starts": plan.chunk_starts, "anchor": plan.anchor, "stair_width": plan.stair_width}


#
# inspect
#


@app.command(
    epilog="""\
Examples:\n
  mesa-gguf inspect model.gguf\n
  mesa-gguf inspect hf:owner/repo/file.gguf --tokens 32768 --tokens 131072
"""
)
def inspect(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=f"A GGUF file, or {HUB_FORM}. Default: the bundled model.")
    ] = None,
    tokens: Annotated[
        list[int] | None, _option("--tokens", min=1, metavar="N", help="Memory for N tokens; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what a model is, whether Mesa-Extrapolation supports it, and the memory that a text takes."""
    from .bundled import find_model
    from .inspect_model import format_report, inspect_model

    report = inspect_model(find_model(model), tokens or ())
    print(json.dumps(asdict(report), ensure_ascii=False) if as_json else format_report(report))


#
# plan
#


@app.command(
    epilog="""\
Examples:\n
  mesa-gguf plan -m model.gguf --tokens 32768\n
  mesa-gguf plan --train-length 2048 --tokens 16384 --plot plan.png
"""
)
def plan(
    tokens: Annotated[int, _option("--tokens", min=1, max=2**31 - 1, metavar="N", help="Length of the text.")],
    model: ModelOption = None,
    plot: Annotated[
        Path | None, _option("--plot", metavar="FILE.png", help="Save a picture: mask and positions.")
    ] = None,
    as_json: JsonOption = False,
    train_length: TrainLength = None,
    first_chunk: FirstChunk = None,
    chunk: Chunk = None,
    last_chunk: LastChunk = None,
    stair_width: StairWidth = "auto",
    log_scaling: LogScaling = None,
    stair_bias: StairBias = None,
    method: Method = "mesa",
) -> None:
    """Show how a text of some length is read: its chunks, the anchor, the stair width and the positions.

    Borders lie on the grid here; in a real text they move back to the ends of its sentences.
    """
    from .plot import check_picture, format_summary, plan_figure, summarize

    if plot is not None:
        check_picture(plot)
    config = _config(False, train_length, first_chunk, chunk, last_chunk, stair_width, log_scaling, stair_bias, method)
    length = train_length if train_length is not None and model is None else _train_length(model)
    made = config.make_plan(tokens, length)
    summary = summarize(made, tokens, config.train_length or length)
    print(json.dumps(asdict(summary)) if as_json else format_summary(summary))
    if plot is not None:
        plan_figure(made, tokens, summary.train_length).savefig(plot)


def _train_length(model: str | None) -> int:
    from . import gguf_file
    from .bundled import find_model

    return gguf_file.check(find_model(model)).train_length


#
# demo
#


@app.command(
    epilog="""\
Examples:\n
  mesa-gguf demo\n
  mesa-gguf demo --length 64 --seed 7 --output demo-64.png
"""
)
def demo(
    length: Annotated[
        int,
        _option("--length", min=2, max=1024, metavar="N", help="Of the document, in multiples of the trained length."),
    ] = 32,
    seed: Annotated[int, _option("--seed", min=0, metavar="N", help="Of the document.")] = 1,
    output: Annotated[Path, _option("--output", metavar="FILE.png", help="The picture that is saved.")] = Path(
        "demo.png"
    ),
    threads: Threads = None,
) -> None:
    """Ask the bundled model about a document far longer than its context, with Mesa-Extrapolation and without."""
    from .demo import run_demo

    def progress(what: str) -> contextlib.AbstractContextManager[Progress | None]:
        print(what, file=sys.stderr)
        return _progress_bar(sys.stderr.isatty())

    run_demo(length, seed, output, threads, progress)


#
# rpc-server
#


@app.command(
    name="rpc-server",
    epilog="""\
Examples:\n
  mesa-gguf rpc-server --port 50052\n
  mesa-gguf ask -m model.gguf -f log.txt "Who?" --rpc 127.0.0.1:50052
""",
)
def rpc_server(
    host: Annotated[str, _option("--host", metavar="HOST", help="Address of this machine to listen at.")] = "127.0.0.1",
    port: Annotated[int, _option("--port", min=1, max=65535, metavar="N", help="TCP port.")] = 50052,
    threads: Annotated[
        int | None, _option("--threads", min=1, metavar="N", help="Where the CPU computes. Default: half of the cores.")
    ] = None,
    cpu: Annotated[bool, _option("--cpu", help="Offer the CPU and its memory even where there is a GPU.")] = False,
) -> None:
    """Compute layers for mesa-gguf ask --rpc, with this machine's GPUs or its CPU, until it is ended (Ctrl-C).

    There is no authentication: whoever reaches the port can crash this process or worse. One client is served at a time.
    """
    from . import devices

    if not devices.is_loopback(host):
        print(
            f"mesa-gguf: warning: {host} is reached by other machines, and an RPC server asks nobody who he is. Never run it "
            "on a network with machines or people that you do not trust (docs/RPC.md)",
            file=sys.stderr,
        )
    print(f"mesa-gguf: listening at {host}:{port}, without authentication; Ctrl-C ends it", file=sys.stderr, flush=True)
    devices.serve(host, port, threads, cpu)


from . import cli_bench, cli_eval  # noqa: E402, F401 - they add their commands, and need the options above
