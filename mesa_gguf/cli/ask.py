"""``mesa-gguf ask``: questions about a document."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PromptError, Remedy
from ..model.hub import find_model
from ..reading.text import check_text, read_text, source_name
from . import output
from .options import (
    Batch,
    Chunk,
    Encoding,
    FileOption,
    FirstChunk,
    FlashAttn,
    JsonLines,
    LastChunk,
    LogScaling,
    MaxTokens,
    Method,
    ModelOption,
    NCtx,
    NGpuLayers,
    Plain,
    QuestionOption,
    QuestionsFile,
    Quiet,
    RpcServers,
    Seed,
    StairBias,
    StairWidth,
    Stock,
    Temperature,
    Threads,
    TrainLength,
    TypeK,
    TypeV,
    UBatch,
    Verbose,
    config_of,
    flash_attn_of,
    kv_type_of,
)

if TYPE_CHECKING:
    from ..config import MesaPlan
    from ..reading.reader import Answer, Reader, Reading

EXAMPLES = """\
Examples:\n
  mesa-gguf ask -m model.gguf -f report.txt "What was decided in March?"\n
  mesa-gguf ask -m hf:owner/repo/file.gguf -f log.txt -q "When?" -q "Who?"\n
  pdftotext in.pdf - | mesa-gguf ask -m model.gguf -f - --questions q.txt\n
  mesa-gguf ask -m model.gguf -f log.txt "Who?" --json --type-k q8_0
"""


def ask(
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="The question; further ones are given with -q or --questions."),
    ] = None,
    model: ModelOption = None,
    file: FileOption = None,
    questions: QuestionOption = None,
    questions_file: QuestionsFile = None,
    encoding: Encoding = None,
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
    from ..reading.prompts import PromptForm
    from ..reading.reader import Reader, context_for, load_model, load_vocabulary

    config = config_of(
        stock, train_length, first_chunk, chunk, last_chunk, stair_width, log_scaling, stair_bias, method
    )
    attention = {
        "type_k": kv_type_of(type_k),
        "type_v": kv_type_of(type_v),
        "flash_attn": flash_attn_of(flash_attn),
    }
    if file == questions_file == "-":
        raise PromptError("the document and the questions cannot both come from standard input")
    asked = _questions(question, questions or [], questions_file, encoding)
    document = _document(file, encoding)

    path = find_model(model)
    form = PromptForm(load_vocabulary(path, verbose), plain=plain)
    head, tails = form.head(document), [form.tail(text) for text in asked]
    n_longest = len(head) + max(map(len, tails))
    if n_ctx is not None and n_longest >= n_ctx:
        raise PromptError(
            f"document and question have {n_longest} tokens, which is too much for --n-ctx {n_ctx}",
            Remedy("n_ctx", n_longest + max_tokens, "or more"),
        )
    start = time.perf_counter()
    llm = load_model(
        path,
        mesa=config,
        n_ctx=context_for(n_longest, max_tokens) if n_ctx is None else n_ctx,
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
    load_s = time.perf_counter() - start
    with contextlib.closing(llm):
        reader = Reader(llm, form)
        show = not quiet and not verbose
        with output.reading_bar(show) as llm.progress:
            reading = reader.read(head)
        llm.progress = None
        if show and not as_json:
            output.say(_reading_line(reader, reading))
        for index, text in enumerate(asked):
            stream = reader.ask(tails[index], max_tokens=max_tokens, temperature=temperature)
            if as_json:
                output.write_json(_result(text, stream.answer, reader, reading, path, load_s))
                continue
            if len(asked) > 1 and not quiet:
                output.write(f"> {text}\n")
            for piece in stream:
                output.write(piece)
            output.write("\n\n" if len(asked) > index + 1 and not quiet else "\n")


def _questions(first: str | None, others: list[str], file: str | None, encoding: str | None) -> list[str]:
    given = [check_text(text, "the question") for text in (*([] if first is None else [first]), *others)]
    lines = read_text(file, encoding).splitlines() if file is not None else []
    asked = [*given, *(text.strip() for text in lines if text.strip())]
    if not asked:
        reason = "no question" if file is None else f"{source_name(file)} has no question in it"
        raise PromptError(
            f'{reason}: give one at the end ("Who was there?"), with -q, or one a line with --questions FILE'
        )
    return asked


def _document(file: str | None, encoding: str | None) -> str:
    if file is None:
        raise PromptError("no document: give a text file with -f, or -f - to read standard input")
    text = read_text(file, encoding).strip()
    if not text:
        raise PromptError(f"{source_name(file)} is empty: give a document with text in it")
    return text


def _reading_line(reader: Reader, reading: Reading) -> str:
    line = f"read {reading.n_tokens} tokens in {reading.seconds:.1f} s ({reading.tokens_per_second:.0f} tokens/s)"
    llm, plan = reader.llm, reading.plan
    if not llm.mesa.enabled:
        return f"{line}, stock llama.cpp"
    if plan.is_plain:
        return f"{line}, within the trained length ({llm.train_length})"
    return (
        f"{line} in {len(plan.chunk_starts)} chunks, stair width {plan.stair_width}, trained length {llm.train_length}"
    )


def _result(
    question: str, answer: Answer, reader: Reader, reading: Reading, path: Path, load_s: float
) -> dict[str, Any]:
    """What --json prints for a question."""
    llm = reader.llm
    return {
        "question": question,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "n_tokens": {"document": reading.n_tokens, "question": answer.n_question, "answer": answer.n_tokens},
        "timings": {
            "load_s": load_s,
            "prefill_s": reading.seconds,
            "prefill_tokens_per_s": reading.tokens_per_second,
            "first_token_s": answer.first_token_seconds,
            "answer_s": answer.seconds,
            "answer_tokens_per_s": answer.n_tokens / answer.seconds,
        },
        "plan": {"enabled": llm.mesa.enabled, "train_length": llm.train_length, **_plan_fields(llm.plan())},
        "model": str(path),
    }


def _plan_fields(plan: MesaPlan) -> dict[str, Any]:
    return {"chunk_starts": plan.chunk_starts, "anchor": plan.anchor, "stair_width": plan.stair_width}
