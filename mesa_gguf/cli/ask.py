"""``mesa-gguf ask``: questions about a document."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PromptError, Remedy
from ..library.library import Document, Library, check_name
from ..model.hub import find_model
from ..reading.text import check_text, read_bytes, read_text, source_name
from . import output
from .library import add_file, kept_if_interrupted, open_library, say_notes
from .options import (
    Batch,
    Chunk,
    CollectionOption,
    EmbeddingModelOption,
    EmbeddingPassage,
    EmbeddingQuery,
    Encoding,
    FilesOption,
    FirstChunk,
    FlashAttn,
    JsonLines,
    LastChunk,
    LibraryOption,
    LogScaling,
    MaxTokens,
    Method,
    ModelOption,
    NCtx,
    NGpuLayers,
    NoLibrary,
    Plain,
    QuestionOption,
    QuestionsFile,
    Quiet,
    ReadBudget,
    ReadingLength,
    ReadOption,
    RpcServers,
    Seed,
    StairBias,
    StairWidth,
    Stock,
    Temperature,
    Threads,
    TrainLength,
    Tuned,
    TypeK,
    TypeV,
    UBatch,
    Verbose,
    config_of,
    load_options_of,
    open_embedding,
)

if TYPE_CHECKING:
    from ..config import MesaPlan
    from ..llama import MesaLlama
    from ..reading.embeddings import EmbeddingModel
    from ..reading.prompts import PromptForm, Turn
    from ..reading.reader import Answer, AnswerStream, Citation, Reader, Reading
    from ..reading.shelf import Catalogue, ReadMode

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
    files: FilesOption = None,
    questions: QuestionOption = None,
    questions_file: QuestionsFile = None,
    encoding: Encoding = None,
    read: ReadOption = "auto",
    collection: CollectionOption = None,
    library: LibraryOption = None,
    embedding_model: EmbeddingModelOption = None,
    embedding_query: EmbeddingQuery = None,
    embedding_passage: EmbeddingPassage = None,
    no_library: NoLibrary = False,
    plain: Plain = False,
    as_json: JsonLines = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    stock: Stock = False,
    train_length: TrainLength = None,
    reading_length: ReadingLength = None,
    first_chunk: FirstChunk = None,
    chunk: Chunk = None,
    last_chunk: LastChunk = None,
    stair_width: StairWidth = "auto",
    log_scaling: LogScaling = None,
    stair_bias: StairBias = None,
    use_tuned: Tuned = True,
    method: Method = "mesa",
    read_budget: ReadBudget = None,
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
    """Answer questions about documents, which are read once, kept, and may be longer than the model's context.

    What was read is kept in the library: the same document, or one that was edited, is not read again. With --no-library one
    text is read whole, and nothing is kept.
    """
    from ..reading.prompts import PromptForm
    from ..reading.reader import load_vocabulary

    config = config_of(
        stock,
        train_length,
        first_chunk,
        chunk,
        last_chunk,
        stair_width,
        log_scaling,
        stair_bias,
        method,
        reading_length,
        use_tuned,
        read_budget,
    )
    load_options = load_options_of(
        type_k, type_v, flash_attn, threads, n_gpu_layers, rpc, batch, ubatch, verbose=verbose
    )
    if "-" in (files or ()) and questions_file == "-":
        raise PromptError("the document and the questions cannot both come from standard input")
    mode = mode_of(read)
    own_numbers = any(
        value is not None
        for value in (train_length, reading_length, first_chunk, chunk, last_chunk, log_scaling, stair_bias)
    )
    whole = no_library or stock or method != "mesa" or own_numbers or stair_width != "auto"
    embeds = any(value is not None for value in (embedding_model, embedding_query, embedding_passage))
    if whole and (collection is not None or library is not None or read != "auto" or len(files or ()) > 1 or embeds):
        raise PromptError(
            "--library, --collection, --read, --embedding-model and several documents are for the library, which reads by Mesa-Extrapolation "
            "with its own numbers: leave out --no-library, --stock, --method, --reading-length and the other lengths"
        )
    asked = _questions(question, questions or [], questions_file, encoding)
    document = _document(files[0] if files else None, encoding) if whole else ""
    if not whole and not files and collection is None:
        raise PromptError(
            "no document: give a file with -f, or -f - to read standard input, or a collection with --collection"
        )

    path = find_model(model)
    form = PromptForm(load_vocabulary(path, verbose), plain=plain)
    load = loader_of(path, n_ctx, mesa=config, seed=seed, **load_options)
    show = _Show(as_json, quiet, bar=not quiet and not verbose)
    generation = _Generation(max_tokens, temperature)
    if whole:
        _ask_whole(path, form, document, asked, load, n_ctx, generation, show)
        return
    prefixes = embedding_query, embedding_passage
    with (
        open_embedding(
            embedding_model, *prefixes, threads=threads, n_gpu_layers=n_gpu_layers, verbose=verbose
        ) as embedding,
        open_library(library) as opened,
    ):
        documents = documents_of(opened, files or [], collection, encoding)
        _ask_library(path, form, opened, documents, asked, mode, load, generation, show, embedding)


@dataclass(frozen=True)
class _Show:
    """What is printed besides answers."""

    as_json: bool
    quiet: bool
    bar: bool


@dataclass(frozen=True)
class _Generation:
    max_tokens: int
    temperature: float


Load = Callable[[int], "MesaLlama"]


def loader_of(path: Path, n_ctx: int | None, **options: Any) -> Load:
    """Loads a model with a context of the tokens that are needed, or of n_ctx where it is given."""
    from ..reading.reader import load_model

    return lambda n_needed: load_model(path, n_ctx=n_needed if n_ctx is None else n_ctx, **options)


def mode_of(text: str) -> ReadMode:
    """What --read says.

    Raises:
        PromptError: it is no mode.
    """
    from ..reading.shelf import check_mode

    return check_mode(int(text) if text.isascii() and text.isdigit() else text)


#
# one text, whole
#


def _ask_whole(
    path: Path,
    form: PromptForm,
    document: str,
    asked: Sequence[str],
    load: Load,
    n_ctx: int | None,
    generation: _Generation,
    show: _Show,
) -> None:
    from ..reading.reader import Reader, context_for

    head, tails = form.head(document), [form.tail(text) for text in asked]
    n_longest = len(head) + max(map(len, tails))
    if n_ctx is not None and n_longest >= n_ctx:
        raise PromptError(
            f"document and question have {n_longest} tokens, which is too much for --n-ctx {n_ctx}",
            Remedy("n_ctx", n_longest + generation.max_tokens, "or more"),
        )
    start = time.perf_counter()
    llm = load(context_for(n_longest, generation.max_tokens))
    load_s = time.perf_counter() - start
    if not show.quiet:
        output.say_tuning(path.name, llm.tuning)
    with contextlib.closing(llm):
        reader = Reader(llm, form=form)
        with output.reading_bar(show.bar) as llm.progress:
            reading = reader.read(head)
        llm.progress = None
        if show.bar and not show.as_json:
            output.say(_reading_line(reader, reading))
        for index, text in enumerate(asked):
            stream = reader.ask(tails[index], max_tokens=generation.max_tokens, temperature=generation.temperature)
            if show.as_json:
                output.write_json(_result(text, stream.answer, reader, reading, path, load_s))
                continue
            _write_answer(text, stream, index, len(asked), show)


def _write_answer(question: str, stream: AnswerStream, index: int, n: int, show: _Show) -> None:
    if n > 1 and not show.quiet:
        output.write(f"> {question}\n")
    with output.line_ended_by_interrupt():
        for piece in stream:
            output.write(piece)
    output.write("\n\n" if n > index + 1 and not show.quiet else "\n")


#
# documents of a library
#


def documents_of(
    library: Library, files: Sequence[str], collection: str | None, encoding: str | None
) -> list[Document]:
    """The documents that are asked about, those of the files added to the library."""
    if collection is not None:
        check_name(collection, "a collection's name")
    found: list[Document] = []
    for file in files:
        if file == "-":
            found.append(
                library.add_bytes(read_bytes(file), source_name(file), collection=collection, encoding=encoding)
            )
            continue
        documents = add_file(library, file, collection, encoding)
        if not documents:
            raise PromptError(f"{source_name(file)}: there is no document in this folder that can be read")
        found += documents
    each = list({document.id: document for document in found}.values())
    for document in each:
        say_notes(document)
    return each if collection is None else library.documents(collection)


def _ask_library(
    path: Path,
    form: PromptForm,
    library: Library,
    documents: Sequence[Document],
    asked: Sequence[str],
    mode: ReadMode,
    load: Load,
    generation: _Generation,
    show: _Show,
    embedding: EmbeddingModel | None,
) -> None:
    from ..reading.reader import Reader
    from ..reading.shelf import Catalogue

    begin: float | None = time.perf_counter()
    catalogue = Catalogue(form.vocabulary, form, library, embedding)
    llm = load(max(n_ctx_for(catalogue, documents, text, mode, generation.max_tokens) for text in asked))
    if not show.quiet:
        output.say_tuning(path.name, llm.tuning)
    with contextlib.closing(llm):
        reader = Reader(llm, catalogue=catalogue)
        for index, text in enumerate(asked):
            with output.reading_bar(show.bar) as progress, kept_if_interrupted():
                stream = reader.ask(
                    text,
                    documents=documents,
                    read=mode,
                    max_tokens=generation.max_tokens,
                    temperature=generation.temperature,
                    progress=progress,
                    begin=begin,
                )
            begin = None
            if show.as_json:
                output.write_json(_kept_result(text, stream.answer, path))
                continue
            _write_answer(text, stream, index, len(asked), show)
            if not show.quiet:
                say_citations(stream.answer.citations, documents)
                say_read(stream.answer)
                say_unread(reader, stream.answer, "mesa-gguf library add -m MODEL FILE")


def n_ctx_for(
    catalogue: Catalogue,
    documents: Sequence[Document],
    question: str,
    mode: ReadMode,
    max_tokens: int,
    history: Sequence[Turn] = (),
    instructions: str | None = None,
) -> int:
    """The n_ctx that a question about documents and its answer need, in tokens."""
    from ..reading.reader import context_for
    from ..reading.shelf import MOST_AUTO_TOKENS

    sizes = [row.n_tokens for document in documents for row in catalogue.rows(document)]
    budget = MOST_AUTO_TOKENS if mode == "auto" else mode
    if isinstance(budget, int) and sum(sizes) > budget:
        n_read = max(budget, *sizes)  # whichever they are: that is found out when the model is there
    else:
        everything = catalogue.select(question, documents, "each")  # all of it, in whichever order
        n_read = everything.room
        if mode == "each":  # the answers together come last
            n_longest = max(len(piece.tokens) for piece in everything.pieces)
            n_read = max(n_longest, len(everything.pieces) * (max_tokens + 32))
    n_tail = len(catalogue.form.tail(question, history=history, instructions=instructions))
    n_preamble = len(catalogue.preamble)
    return max(
        context_for(n_preamble + n_read + n_tail + 8, max_tokens), context_for(n_preamble + catalogue.chunk_tokens, 8)
    )


def say_citations(citations: Sequence[Citation], documents: Sequence[Document]) -> None:
    """Where an answer stands.

    Args:
        documents: that were asked about: where several have one name, paths tell them apart.
    """
    names = Counter(document.name for document in documents)
    for number, citation in enumerate(citations, 1):
        where = citation.document
        if names[where] > 1:
            where = citation.path or f"{where} (document {citation.document_id})"
        if citation.page is not None:
            where += f", page {citation.page}"
        if citation.heading:
            where += f", {' > '.join(citation.heading)}"
        text = " ".join(citation.text.split())
        output.say(f"[{number}] {where}: {text if len(text) <= 240 else f'{text[:240]}…'}")


def say_read(answer: Answer) -> None:
    """How much was read for an answer."""
    if answer.read is None:
        return
    if not answer.stands:
        output.say("most of the answer's words do not stand in what was read")
    read = answer.read
    output.say(f"{read}: {read.tokens_computed} tokens computed, {read.tokens_reused} reused")
    for note in read.notes:
        output.say(f"mesa-gguf: {note}")


def say_unread(reader: Reader, answer: Answer, how: str) -> None:
    """That reading ahead would help, once, where it would.

    Args:
        how: what reads all.
    """
    is_partial = answer.read is not None and answer.read.chunks < answer.read.of_chunks
    if is_partial and reader.shelf is not None and reader.shelf.is_unread:
        output.say_once(f"questions in other words find more once all was read: {how}")


def _citation(citation: Citation) -> dict[str, Any]:
    """A citation by the names that --json has."""
    fields = asdict(citation)
    return {("end" if name == "stop" else name): value for name, value in fields.items()}


def _kept_result(question: str, answer: Answer, path: Path) -> dict[str, Any]:
    """What --json prints for a question about documents of the library."""
    read = answer.read
    assert read is not None
    return {
        "question": question,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "citations": [_citation(citation) for citation in answer.citations],
        "stands": answer.stands,
        "read": asdict(read),
        "n_tokens": {"question": answer.n_question, "answer": answer.n_tokens},
        "timings": {
            "first_token_s": answer.first_token_seconds,
            "answer_s": answer.seconds,
        },
        "model": str(path),
    }


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
    from ..reading.plans import range_of

    line = f"read {reading.n_tokens} tokens in {reading.seconds:.1f} s ({reading.tokens_per_second:.0f} tokens/s)"
    llm, plan = reader.llm, reading.plan
    if not llm.mesa.enabled:
        return f"{line}, stock llama.cpp"
    if plan.is_plain:
        return f"{line}, within the {range_of(llm)}"
    return f"{line} in {len(plan.chunk_starts)} chunks, stair width {plan.stair_width}, {range_of(llm)}"


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
        "plan": {
            "enabled": llm.mesa.enabled,
            "train_length": llm.train_length,
            "reading_length": llm.reading_length,
            **_plan_fields(llm.plan()),
        },
        "model": str(path),
    }


def _plan_fields(plan: MesaPlan) -> dict[str, Any]:
    return {"chunk_starts": plan.chunk_starts, "anchor": plan.anchor, "stair_width": plan.stair_width}
