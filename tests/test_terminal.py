"""``mesa-gguf chat``: through pipes, in a pseudo terminal, and interrupted."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import BUNDLED
from mesa_gguf import MesaLlama, _llama_cpp, cli, llama
from mesa_gguf.cli import chat, output
from mesa_gguf.lab.documents import is_right, make_document

MADE = make_document(4711, 4000, n_facts=8)
OTHER = make_document(99, 700, n_facts=2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "log.txt").write_text(MADE.text, encoding="utf-8")
    (tmp_path / "other log.txt").write_text(OTHER.text, encoding="utf-8")
    monkeypatch.setenv("MESA_LIBRARY", str(tmp_path / "library"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture
def talk(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Says lines to a chat about log.txt -> (exit code, standard output, standard error)."""

    def talk(*lines: str | bytes, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        data = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        code = cli.main(["chat", "-f", "log.txt", "--threads", "1", "--max-tokens", "32", *options])
        out, err = capsys.readouterr()
        return code, out, err

    return talk


def test_a_conversation_through_a_pipe(talk: Talk) -> None:
    code, out, err = talk(MADE.facts[0].question, "", MADE.facts[1].question, "/cite")
    assert code == 0
    first, second = out.splitlines()
    assert is_right(MADE.facts[0], first) and is_right(MADE.facts[1], second)
    lines = err.splitlines()
    assert lines[0].startswith("read ") and "chunks of log.txt" in lines[0]
    assert lines[2].startswith("[1] log.txt") and MADE.facts[1].answer in lines[2]
    assert talk("/exit", MADE.facts[0].question) == (0, "", "")
    assert talk(options=("--quiet",)) == (0, "", "")


def test_commands(talk: Talk) -> None:
    fact = OTHER.facts[0]
    code, out, err = talk("/read all", fact.question, "/add 'other log.txt'", fact.question, "/clear", "/read", "/help")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "questions read: all" and lines[2] == "added other log.txt"
    assert not is_right(fact, lines[1]) and is_right(fact, lines[3])
    assert lines[4:6] == ["the conversation begins anew", "questions read: all"] and "/cite" in out
    assert "chunks of log.txt, other log.txt" in err


def test_reading_ahead(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a question in other words would gain from it is told once, while it would; it is stopped like an answer."""
    strange = "Which zebra xylophone gleams quietly?"
    hint = "questions in other words find more once all was read: /ahead reads it"
    own = MADE.facts[0].question
    code, _, err = talk("/read all", strange, "/read auto", own, options=("--library", "another"))
    assert code == 0 and hint not in err  # it was read by then, and the second question is not in other words
    save, n_saved = MesaLlama.save_chunk, []

    def save_and_press(self: MesaLlama, start: int, stop: int) -> bytes:
        n_saved.append(stop)
        if len(n_saved) == 3:
            press()
        return save(self, start, stop)

    monkeypatch.setattr(MesaLlama, "save_chunk", save_and_press)
    code, _, err = talk("/ahead", strange, strange)
    lines = err.splitlines()
    assert code == 0 and lines.count(hint) == 1 and lines[1] == "stopped; the chunks that were read are kept"
    code, out, err = talk("/ahead", strange, "/read all", own)
    assert code == 0 and hint not in err and "log.txt: " in out.splitlines()[0]
    assert " 0 kept before" not in out and err.count(": 0 tokens computed") == 2


def test_mistakes_do_not_end_a_chat(talk: Talk) -> None:
    code, out, err = talk(
        "/what", "/read some", "/add", "/add missing.txt", "/cite", b"caf\xe9?", "/read 700", MADE.facts[0].question
    )
    said = err.splitlines()
    assert code == 0 and is_right(MADE.facts[0], out.splitlines()[1])
    for line, part in zip(
        said,
        (
            "there is no command /what: /help lists them",
            "read is 'some': it must be auto, all, each",
            "/add needs a file or a folder",
            "missing.txt: there is no such file",
            "there is no answer yet",
            "the question is not UTF-8 text: byte 0xe9 at character 3",
        ),
    ):
        assert line.startswith("mesa-gguf: ") and part in line
    assert len(said) == 7


def test_what_a_question_sees_of_the_conversation(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    asked = chat.Conversation._history

    def history(self: chat.Conversation) -> list[object]:
        found = asked(self)
        seen.append([turn.question for turn in found])
        return list(found)

    monkeypatch.setattr(chat.Conversation, "_history", history)
    monkeypatch.setattr(chat, "HISTORY_TOKENS", 40)
    questions = [fact.question for fact in MADE.facts[:4]]
    _, _, err = talk(*questions, "/clear", questions[0])
    assert seen[0] == [] and seen[1] == questions[:1] and seen[-1] == []
    assert seen[3] and seen[3][-1] == questions[2] and len(seen[3]) < 3
    assert "the oldest turn is left out: a question sees 40 tokens" in err


def test_a_context_that_grows(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    before = MesaLlama.__init__

    def init(self: MesaLlama, *args: object, **kwargs: object) -> None:
        before(self, *args, **kwargs)  # type: ignore[arg-type]
        made.append(self.n_ctx())

    monkeypatch.setattr(MesaLlama, "__init__", init)
    code, out, _ = talk(MADE.facts[0].question, "/read all", MADE.facts[1].question, MADE.facts[2].question)
    assert code == 0 and len(made) == 3 and made[1] < made[2]  # the vocabulary, and two contexts
    answers = [line for line in out.splitlines() if "questions read" not in line]
    assert all(is_right(fact, answer) for fact, answer in zip(MADE.facts, answers))
    code, _, err = talk("/read all", MADE.facts[1].question, options=("--n-ctx", "1024"))
    assert code == 0 and "more than n_ctx (1024) has room for: make --n-ctx" in err and "give --read auto" in err


def test_nothing_to_talk_about(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["chat"], "no document: give a file with -f"),
        (["chat", "-f", "-"], "the questions come from standard input"),
        (["chat", "-f", "missing.txt"], "there is no such file"),
        (["chat", "-f", "log.txt", "--instructions", " "], "--instructions is empty"),
        (["chat", "--collection", "none"], "there is no collection none"),
    ):
        assert cli.main(arguments) == 2
        assert said in capsys.readouterr().err


#
# Ctrl-C
#


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    """Ctrl-C is heard, as in a terminal: a shell that starts tests in the background switches it off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_answer_is_stopped_and_the_chat_goes_on(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    write, pressed = output.write, []

    def write_and_press(text: str) -> None:
        write(text)
        if not pressed:
            pressed.append(text)
            press()

    monkeypatch.setattr(output, "write", write_and_press)
    code, out, err = talk(MADE.facts[0].question, "/cite", MADE.facts[1].question)
    assert code == 0
    stopped, whole = out.splitlines()
    assert stopped == pressed[0].strip() and is_right(MADE.facts[1], whole)
    assert err.splitlines()[:2] == ["stopped", "mesa-gguf: there is no answer yet"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_reading_is_stopped_and_goes_on_where_it_stopped(
    talk: Talk, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, n_saved = MesaLlama.save_chunk, []

    def save_and_press(self: MesaLlama, start: int, stop: int) -> bytes:
        if start > 0:  # not the preamble
            n_saved.append(stop - start)
        if len(n_saved) == 2:
            press()
        return save(self, start, stop)

    monkeypatch.setattr(MesaLlama, "save_chunk", save_and_press)
    code, out, err = talk("/read all", MADE.facts[0].question, MADE.facts[0].question)
    assert code == 0 and is_right(MADE.facts[0], out.splitlines()[1])
    assert err.splitlines()[0] == "stopped; the chunks that were read are kept"
    assert f"{sum(n_saved[2:])} tokens computed, {sum(n_saved[:2])} reused" in err


def test_a_model_that_is_being_loaded_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes while llama.cpp logs, where Python drops what is raised."""
    has_stderr, n_asked = _llama_cpp.has_stderr, []

    def ask_and_press() -> bool:
        n_asked.append(1)
        if len(n_asked) == 20:  # by the log: for each line that it shows
            press()
        return has_stderr()

    monkeypatch.setattr(_llama_cpp, "has_stderr", ask_and_press)
    with pytest.raises(KeyboardInterrupt):
        MesaLlama(BUNDLED, n_ctx=512, verbose=True)
    assert len(n_asked) > 20


def test_a_reading_is_stopped_within_a_batch(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is the whole chunk; what was read before it is kept."""
    monkeypatch.setattr(llama, "LOOK_SECONDS", 0.0)
    check, save, n_saved, n_looks = chat.Interrupts.check, MesaLlama.save_chunk, [], []

    def check_and_press(self: chat.Interrupts, *arguments: object) -> None:
        if len(n_saved) == 2:  # the preamble, and a chunk
            n_looks.append(1)
            if len(n_looks) == 20:
                press()
        check(self, *arguments)

    def count_and_save(self: MesaLlama, start: int, stop: int) -> bytes:
        n_saved.append(stop - start)
        return save(self, start, stop)

    monkeypatch.setattr(chat.Interrupts, "check", check_and_press)
    monkeypatch.setattr(MesaLlama, "save_chunk", count_and_save)
    code, out, err = talk("/read all", MADE.facts[0].question, MADE.facts[0].question)
    assert code == 0 and is_right(MADE.facts[0], out.splitlines()[1])
    assert err.splitlines()[0] == "stopped; the chunks that were read are kept"
    assert len(n_looks) > 20 and f"{sum(n_saved[2:])} tokens computed, {n_saved[1]} reused" in err


def test_twice_ends_the_chat(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_and_press(text: str) -> None:
        press()
        press()

    monkeypatch.setattr(output, "write", write_and_press)
    code, _, err = talk(MADE.facts[0].question, MADE.facts[1].question)
    assert code == 130 and err.splitlines()[-1] == "mesa-gguf: interrupted"


def test_one_at_the_prompt_after_one_within_an_answer(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not two in a row: the first stopped the answer, and the chat goes on."""
    write, reader_of, pressed = output.write, chat._line_reader, []

    def write_and_press(text: str) -> None:
        write(text)
        if not pressed:
            pressed.append("answer")
            press()

    def line_reader() -> Callable[[], str]:
        read_line = reader_of()

        def pressed_line() -> str:
            if pressed == ["answer"]:
                pressed.append("prompt")
                press()
            return read_line()

        return pressed_line

    monkeypatch.setattr(output, "write", write_and_press)
    monkeypatch.setattr(chat, "_line_reader", line_reader)
    code, out, err = talk(MADE.facts[0].question, MADE.facts[1].question)
    assert code == 0 and pressed == ["answer", "prompt"] and is_right(MADE.facts[1], out.splitlines()[-1])
    assert err.splitlines()[:3] == ["stopped", "", "Ctrl-C again, or Ctrl-D, ends the chat"]


def test_what_a_command_does_is_stopped(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    add = chat.add_files

    def add_and_press(*args: object) -> object:
        press()
        return add(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(chat, "add_files", add_and_press)
    code, out, err = talk("/add 'other log.txt'", MADE.facts[0].question)
    assert code == 0 and is_right(MADE.facts[0], out.splitlines()[0])
    assert err.splitlines()[0] == "stopped" and "other log.txt" not in err


#
# a terminal
#


class Terminal:
    """A pseudo terminal with a chat in it."""

    def __init__(self, end: int, process: subprocess.Popen[bytes]) -> None:
        self.end, self.process = end, process
        self._shown = b""
        os.set_blocking(end, False)

    def wait_for(self, what: str, seconds: float = 60) -> str:
        """What is shown, up to a text."""
        limit = time.monotonic() + seconds
        while what.encode() not in self._shown and time.monotonic() < limit:
            try:
                self._shown += os.read(self.end, 4096)
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:  # the other end was closed
                break
        before, found, self._shown = self._shown.partition(what.encode())
        assert found, f"{what!r} was not shown: {before.decode(errors='replace')}"
        return before.decode(errors="replace")

    def interrupt(self, what: str) -> None:
        """Ctrl-C, until a text is shown: Python's input() misses one that comes before it has begun to wait."""
        for _ in range(10):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.wait_for(what, 3)
                return
        raise AssertionError(f"{what!r} was not shown")

    def type(self, keys: str) -> None:
        os.write(self.end, keys.encode())


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    # note: a process of its own makes it the terminal that Ctrl-C comes from
    program = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "from mesa_gguf.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "chat", "-f", "log.txt", "--threads", "1", "--max-tokens", "32"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    yield Terminal(ours, process)
    if process.poll() is None:
        process.kill()
    process.wait()
    os.close(ours)


def test_in_a_terminal(terminal: Terminal) -> None:
    assert "/help lists the commands" in terminal.wait_for("> ")
    terminal.type(f"{MADE.facts[0].question}\n")
    assert MADE.facts[0].answer in terminal.wait_for("reused")
    terminal.wait_for("> ")
    terminal.type("half a line")
    # note: Ctrl-C drops what was typed; readline, if it is about to take that, then waits for a key and for no signal
    terminal.wait_for("half a line")
    terminal.interrupt("Ctrl-C again, or Ctrl-D, ends the chat")
    terminal.type(f"{MADE.facts[1].question}\n")
    assert MADE.facts[1].answer in terminal.wait_for("reused")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0


def test_ctrl_c_twice_at_the_prompt(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.interrupt("ends the chat")
    terminal.interrupt("interrupted")
    assert terminal.process.wait(20) == 130
