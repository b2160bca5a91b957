"""``mesa-gguf chat``: a conversation about documents, in the terminal or through pipes."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import MesaError, PromptError
from ..library.library import Document, Library
from ..model.hub import find_model
from ..paths import expanded
from ..reading.text import check_text
from . import output
from .ask import documents_of, loader_of, mode_of, n_ctx_for, say_citations, say_read, say_unread
from .library import add_files, open_library, read_ahead, say_notes
from .options import (
    GENERATION,
    Batch,
    CollectionOption,
    EmbeddingModelOption,
    EmbeddingPassage,
    EmbeddingQuery,
    Encoding,
    FilesOption,
    FlashAttn,
    LibraryOption,
    MaxTokens,
    ModelOption,
    NCtx,
    NGpuLayers,
    Plain,
    Quiet,
    ReadBudget,
    ReadOption,
    RpcServers,
    Seed,
    Temperature,
    Threads,
    TypeK,
    TypeV,
    UBatch,
    Verbose,
    load_options_of,
    open_embedding,
    option,
)

if TYPE_CHECKING:
    from ..llama import MesaLlama
    from ..reading.prompts import PromptForm, Turn
    from ..reading.reader import Answer, Reader

EXAMPLES = """\
Examples:\n
  mesa-gguf chat -m model.gguf -f report.pdf\n
  mesa-gguf chat -m model.gguf --collection work --read all\n
  mesa-gguf chat -m model.gguf -f report.pdf < questions.txt
"""

HISTORY_TOKENS = 1024  # of earlier turns that stand before a question; older ones are left out
PROMPT = "> "

HELP = """\
/read auto|all|each|N   how much a question reads: what matches, everything, each chunk alone, or N tokens
/cite                   where the last answer stands
/add FILE               add a file or folder to the conversation
/ahead                  read all of the documents now: questions in other words find more, and none waits for a reading
/clear                  forget the questions and answers so far
/help                   this
/exit                   end; so do Ctrl-D, and Ctrl-C twice
Ctrl-C stops an answer. Everything else is a question.
"""

Instructions = Annotated[
    str | None,
    option("--instructions", metavar="TEXT", help="How to answer, in words, as in a system message.", panel=GENERATION),
]


def chat(
    model: ModelOption = None,
    files: FilesOption = None,
    encoding: Encoding = None,
    read: ReadOption = "auto",
    collection: CollectionOption = None,
    library: LibraryOption = None,
    embedding_model: EmbeddingModelOption = None,
    embedding_query: EmbeddingQuery = None,
    embedding_passage: EmbeddingPassage = None,
    plain: Plain = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    instructions: Instructions = None,
    read_budget: ReadBudget = None,
    max_tokens: MaxTokens = 512,
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
    """Talk about documents. They are read once and kept; each question sees the conversation before it.

    Lines that begin with / are commands: /help lists them. Questions may come through a pipe too, one a line.
    """
    from ..config import MesaConfig
    from ..reading.prompts import PromptForm
    from ..reading.reader import load_vocabulary
    from ..reading.shelf import Catalogue

    if "-" in (files or ()):
        raise PromptError("the questions come from standard input: give the documents as files")
    if not files and collection is None:
        raise PromptError("no document: give a file with -f, or a collection with --collection")
    mode = mode_of(read)
    if instructions is not None:
        instructions = check_text(instructions, "--instructions")
    load_options = load_options_of(
        type_k, type_v, flash_attn, threads, n_gpu_layers, rpc, batch, ubatch, verbose=verbose
    )
    path = find_model(model)
    form = PromptForm(load_vocabulary(path, verbose), plain=plain)
    load = loader_of(path, n_ctx, mesa=MesaConfig(read_budget=read_budget), seed=seed, **load_options)
    prefixes = embedding_query, embedding_passage
    with (
        open_embedding(
            embedding_model, *prefixes, threads=threads, n_gpu_layers=n_gpu_layers, verbose=verbose
        ) as embedding,
        open_library(library) as opened,
        Interrupts() as interrupts,
    ):
        if embedding is not None:
            embedding.interrupt = interrupts.check
        conversation = Conversation(
            opened,
            Catalogue(form.vocabulary, form, opened, embedding),
            documents_of(opened, files or [], collection, encoding),
            load,
            interrupts,
            read=mode,
            collection=collection,
            encoding=encoding,
            quiet=quiet,
            bar=not quiet and not verbose,
            grows=n_ctx is None,
            instructions=instructions,
            generation={"max_tokens": max_tokens, "temperature": temperature},
        )
        with contextlib.closing(conversation):
            conversation.run()


class Stopped(Exception):
    """Ctrl-C, while something is read or answered."""


class Interrupts:
    """Ctrl-C: stops what runs now, where it can be stopped; a second one, or one while nothing runs, is a KeyboardInterrupt.

    note: not raised anywhere, as Python does it, so that a chunk that is being kept is kept.
    """

    def __init__(self) -> None:
        self.n = 0  # since the last line that was typed
        self._works = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._pressed)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _pressed(self, *_: object) -> None:
        self.n += 1
        if not self._works or self.n > 1:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """What can be stopped."""
        self.n, self._works = 0, True
        try:
            yield
        finally:
            self._works = False

    def check(self, *_: object) -> None:
        """A place to stop."""
        if self._works and self.n:
            raise Stopped


class Conversation:
    """A chat: its documents, its turns, and a model whose context grows with what is read.

    Args:
        load: the model with a context of so many tokens.
        grows: the context is made anew where a question needs a larger one.
        generation: `Reader.ask`'s max_tokens and temperature.
    """

    def __init__(
        self,
        library: Library,
        catalogue: Any,
        documents: Sequence[Document],
        load: Callable[[int], MesaLlama],
        interrupts: Interrupts,
        *,
        read: Any,
        collection: str | None,
        encoding: str | None,
        quiet: bool,
        bar: bool,
        grows: bool,
        instructions: str | None,
        generation: dict[str, Any],
    ) -> None:
        self.library, self.catalogue, self.documents = library, catalogue, list(documents)
        self.read, self.collection, self.encoding = read, collection, encoding
        self.turns: list[Turn] = []
        self.last: Answer | None = None
        self._load, self._interrupts, self._grows = load, interrupts, grows
        self._quiet, self._bar = quiet, bar
        self._instructions, self._generation = instructions, generation
        self._reader: Reader | None = None
        self._n_left_out = 0

    def close(self) -> None:
        if self._reader is not None:
            self._reader.llm.close()
            self._reader = None

    def run(self) -> None:
        """Take lines until they end."""
        if output.is_terminal(sys.stdin) and not self._quiet:
            names = ", ".join(document.name for document in self.documents[:4])
            more = f" and {len(self.documents) - 4} more" if len(self.documents) > 4 else ""
            output.say(f"About {names}{more}. /help lists the commands.")
        for line in self._lines():
            try:
                if not self.take(line):
                    return
            except (MesaError, OSError) as err:
                if isinstance(err, BrokenPipeError):
                    raise
                output.say_error(err)
            except KeyboardInterrupt:
                if self._interrupts.n > 1:
                    raise
                output.say("stopped")

    def _lines(self) -> Iterator[str]:
        read_line = _line_reader()
        while True:
            try:
                line = read_line()
            except EOFError:
                return
            except KeyboardInterrupt:
                if self._interrupts.n > 1:
                    raise
                output.say("\nCtrl-C again, or Ctrl-D, ends the chat")
                continue
            if line.strip():
                self._interrupts.n = 0
                yield line.strip()
            self._interrupts.n = 0

    def take(self, line: str) -> bool:
        """A command or a question; False ends the chat.

        Raises:
            MesaError: it cannot be answered; the chat can go on.
        """
        name, _, rest = line.partition(" ")
        if not (name.startswith("/") and name[1:].isalpha()):
            self._answer(check_text(line, "the question"))
            return True
        commands: dict[str, Callable[[str], None]] = {
            "/read": self._set_read,
            "/cite": self._cite,
            "/add": self._add,
            "/ahead": self._ahead,
            "/clear": self._clear,
            "/help": lambda _: output.write(HELP),
        }
        if name in ("/exit", "/quit"):
            return False
        if name not in commands:
            raise PromptError(f"there is no command {name}: /help lists them")
        commands[name](rest.strip())
        return True

    #
    # commands
    #

    def _set_read(self, value: str) -> None:
        if value:
            self.read = mode_of(value)
        output.write(f"questions read: {self.read}\n")

    def _cite(self, _: str) -> None:
        if self.last is None:
            raise PromptError("there is no answer yet")
        if not self.last.citations:
            raise PromptError("no passage of what was read shares words with the last answer")
        say_citations(self.last.citations, self.documents)

    def _add(self, value: str) -> None:
        if not value:
            raise PromptError("/add needs a file or a folder")
        names = [value]
        if not expanded(value).exists():
            with contextlib.suppress(ValueError):  # a quote without its other one
                names = shlex.split(value)
        documents, _ = add_files(self.library, names, self.collection, self.encoding)
        for document in documents:
            say_notes(document)
            # one that has changed takes the place of what it was
            self.documents = [
                d for d in self.documents if d.id != document.id and (d.source is None or d.source != document.source)
            ]
            self.documents.append(document)
            output.write(f"added {document.name}\n")

    def _ahead(self, _: str) -> None:
        self.library.check_writable()
        with self._interrupts.working():
            try:
                reader = self._reader_for("?", [])
                assert reader.shelf is not None
                read_ahead(reader.shelf, self.documents, bar=self._bar, check=self._interrupts.check)
            except Stopped:
                output.say("stopped; the chunks that were read are kept")

    def _clear(self, _: str) -> None:
        self.turns, self.last, self._n_left_out = [], None, 0
        output.write("the conversation begins anew\n")

    #
    # questions
    #

    def _answer(self, question: str) -> None:
        from ..reading.prompts import Turn

        said: list[str] = []
        self.last = None
        with self._interrupts.working():
            try:
                history = self._history()
                reader = self._reader_for(question, history)
                with output.reading_bar(self._bar) as bar:

                    def progress(n_done: int, n_all: int) -> None:
                        if bar is not None:
                            bar(n_done, n_all)
                        self._interrupts.check()

                    stream = reader.ask(
                        question,
                        documents=self.documents,
                        read=self.read,
                        history=history,
                        instructions=self._instructions,
                        progress=progress,
                        **self._generation,
                    )
                with stream:
                    for piece in stream:
                        output.write(piece)
                        said.append(piece)
                        self._interrupts.check()
                self.last = stream.answer
                output.write("\n")
            except Stopped:
                output.write("\n" if said else "")
                output.say("stopped" if said else "stopped; the chunks that were read are kept")
        if said:
            self.turns.append(Turn(question, "".join(said)))
        if self.last is not None and not self._quiet:
            say_read(self.last)
            if self._reader is not None:
                say_unread(self._reader, self.last, "/ahead reads it")

    def _history(self) -> list[Turn]:
        """The last turns, as many as there is room for."""
        form: PromptForm = self.catalogue.form
        kept: list[Turn] = []
        n_tokens = 0
        for turn in reversed(self.turns):
            n_tokens += len(form.tokenize(f"{turn.question}\n{turn.answer}\n"))
            if n_tokens > HISTORY_TOKENS:
                break
            kept.insert(0, turn)
        left_out = len(self.turns) - len(kept)
        if left_out > self._n_left_out and not self._quiet:
            what = "turn is" if left_out == 1 else f"{left_out} turns are"
            output.say(f"the oldest {what} left out: a question sees {HISTORY_TOKENS} tokens of what was said before")
        self._n_left_out = left_out
        return kept

    def _reader_for(self, question: str, history: Sequence[Turn]) -> Reader:
        """The reader; with a larger context than before, where the question needs one."""
        from ..reading.reader import Reader

        needed = n_ctx_for(
            self.catalogue,
            self.documents,
            question,
            self.read,
            self._generation["max_tokens"],
            history,
            self._instructions,
        )
        if self._reader is not None and (not self._grows or self._reader.llm.n_ctx() >= needed):
            return self._reader
        self.close()
        llm = self._load(needed + HISTORY_TOKENS)
        if not self._quiet:
            output.say_tuning(Path(llm.model_path).name, llm.tuning)
        llm.interrupt = self._interrupts.check
        self._reader = Reader(llm, catalogue=self.catalogue)
        return self._reader


def _line_reader() -> Callable[[], str]:
    """A function that returns the next line: with editing where a person types it.

    note: editing is by the readline of Python's standard library, which is there wherever terminals are.
    """
    if not output.is_terminal(sys.stdin):
        return _piped_line
    if not output.is_terminal(sys.stdout):
        return _prompted_line
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() edits with it

    def typed_line() -> str:
        try:
            return input(PROMPT)
        except EOFError:
            output.write("\n")
            raise

    return typed_line


def _prompted_line() -> str:
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    return _piped_line()


def _piped_line() -> str:
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    line = stream.readline() if stream is not None else b""
    if not line:
        raise EOFError
    # what is not UTF-8 is told, with the place, where the question is looked at
    return line.decode("utf-8", "surrogateescape") if isinstance(line, bytes) else str(line)
