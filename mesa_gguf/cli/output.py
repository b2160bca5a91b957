"""What commands print: answers and results on standard output, everything else on standard error.

Both may be anything: closed, a pipe whose reader has gone, or of an encoding that lacks half of an answer. What can be delivered is.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _llama_cpp
from ..errors import ConfigError, MesaError, Remedy

if TYPE_CHECKING:
    from rich.console import Console

    from ..llama import Progress
    from ..model.tuning import Tuning

_given: list[str] = []  # the arguments of this process's command
_said: set[str] = set()  # by this command


def set_up(arguments: Sequence[str]) -> None:
    """Make standard output and standard error fit to be written to, whatever they are."""
    _given[:] = arguments
    _said.clear()
    _flags.clear()
    _flags.update(_FLAGS)
    _open_closed()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _open_closed() -> None:
    """What was closed leads nowhere."""
    _llama_cpp.keep_standard_streams()
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def give_up_stdout() -> None:
    """Nobody reads it any more: the flush at exit must not fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush() -> None:
    with contextlib.suppress(ValueError):  # closed
        sys.stdout.flush()


def write(text: str) -> None:
    """To standard output, at once. Characters that it cannot have are escaped; those that command a terminal too, where it is one."""
    if is_terminal(sys.stdout):
        text = harmless(text)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except UnicodeEncodeError:  # a stream that set_up could not change
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()


def write_json(value: Any) -> None:
    """A line of JSON to standard output; JSON's own escapes stand for what commands a terminal, and for what that is not Unicode lacks."""
    line = json.dumps(value, ensure_ascii=not _is_unicode(sys.stdout))
    write(_COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n")


# what moves the cursor, colours, answers or turns the text around; not line ends, tabs and form feeds
_COMMANDS = re.compile("[\x00-\x08\x0b\x0d-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """A text of which nothing is a command to the terminal: whoever wrote a document, or named a file, may have put some there."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _is_unicode(stream: Any) -> bool:
    try:
        return codecs.lookup(stream.encoding or "ascii").name.startswith("utf")
    except (AttributeError, LookupError, TypeError):
        return True  # a StringIO has no encoding, and takes everything


def say(text: str) -> None:
    """A line to standard error, if anybody listens there. Nothing in it commands a terminal."""
    _said.add(text)
    text = harmless(text)
    with contextlib.suppress(OSError, ValueError):
        try:
            print(text, file=sys.stderr, flush=True)
        except UnicodeEncodeError:
            print(text.encode("ascii", "backslashreplace").decode(), file=sys.stderr, flush=True)


def say_once(text: str) -> None:
    """The same, unless this command said it before."""
    if text not in _said:
        say(text)


def is_terminal(stream: Any) -> bool:
    """Whether a person sees the stream."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def console(width: int) -> Console:
    """Standard output for tables.

    Args:
        width: in characters, where it is no terminal.
    """
    from rich.console import Console

    return Console(width=None if is_terminal(sys.stdout) else width, highlight=False)


def command_line() -> str:
    """The command as it was given, to be kept with results: of absolute paths only the last part."""
    words = (Path(word).name if Path(word).is_absolute() else word for word in _given)
    return "mesa-gguf " + shlex.join(words)


def check_output(path: Path, what: str) -> None:
    """Raise ConfigError if a file cannot be saved there, before work is spent on it."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: {what} cannot be saved there: there is no such folder, or it is a folder itself")


@contextlib.contextmanager
def line_ended_by_interrupt() -> Iterator[None]:
    """What is told of Ctrl-C begins on a line of its own."""
    try:
        yield
    except KeyboardInterrupt:
        write("\n")
        raise


#
# errors
#

EXIT_USER_ERROR = 2


def say_error(err: BaseException | str) -> None:
    """An error in one line."""
    said = err if isinstance(err, str) else worded(err)
    say(f"mesa-gguf: {' '.join(said.split())}")


# arguments whose options are not their names with dashes
_OPTIONS = {
    "enabled": "stock",
    "rpc_servers": "rpc",
    "n_threads": "threads",
    "n_batch": "batch",
    "n_ubatch": "ubatch",
    "whole_max": "stock-max",
    "methods": "method",
}
# limits of loaders have no options
_LIMITS = {
    "limits.file_bytes": "split it into smaller files",
    "limits.unpacked_bytes": "save it in parts, or as plain text",
    "limits.ratio": "save it as plain text, if you trust it",
    "limits.members": "save it in parts, or as plain text",
    "limits.pages": "split it into smaller files",
    "limits.characters": "split it into smaller files",
    "limits.depth": "save it as plain text",
    "limits.files": "name the folders in it that matter",
    "limits.seconds": "split it into smaller files, or save it as plain text",
    "limits.memory": "split it into smaller files, or save it as plain text",
}
_FLAGS = {("enabled", False): "--stock", ("verbose", True): "--verbose", ("plain", True): "--plain"}
_flags: dict[tuple[str, Any], str] = {}  # of this process's command: _FLAGS, and what call_option added


def call_option(option: str, value: Any, flag: str) -> None:
    """In this command, that value of an argument is given by another flag than elsewhere."""
    _flags[option, value] = flag


def worded(err: BaseException) -> str:
    """An error in one sentence, with this program's options where the library names arguments."""
    if not isinstance(err, MesaError) or not err.remedies:
        return str(err)
    # what else has a dot is of an object that no option makes
    remedies = [
        _LIMITS.get(remedy.option) or _worded(remedy)
        for remedy in err.remedies
        if "." not in remedy.option or remedy.option in _LIMITS
    ]
    return f"{err.what}: {', or '.join(remedies)}" if remedies else err.what


def _worded(remedy: Remedy) -> str:
    option = f"--{_OPTIONS.get(remedy.option, remedy.option).replace('_', '-')}"
    if (remedy.option, remedy.value) in _flags:
        said = f"give {_flags[remedy.option, remedy.value]}"
    elif remedy.value is None:
        said = f"give another {option}"
    elif remedy.bound:
        said = f"make {option} {remedy.value} {remedy.bound}"
    else:
        value = (
            {True: "on", False: "off"}.get(remedy.value, remedy.value)
            if remedy.option == "flash_attn"
            else remedy.value
        )
        said = f"give {option} {value}"
    return f"{said}, {remedy.why}" if remedy.why else said


#
# llama.cpp's messages, and progress
#


@contextlib.contextmanager
def llama_cpp_log(shown: bool) -> Iterator[None]:
    """llama.cpp's log, or nothing of it, errors included: they come back as exceptions, which are told in one line."""
    with contextlib.nullcontext() if shown else _llama_cpp.silence():
        yield


def say_tuning(name: str, tuning: Tuning | None) -> None:
    """That numbers are not the defaults; once a command."""
    line = f"mesa-gguf: {name}: {tuning} (measured by mesa-gguf tune)"
    if tuning is not None:
        say_once(line)


@contextlib.contextmanager
def reading_bar(shown: bool) -> Iterator[Progress | None]:
    """A bar on standard error that MesaLlama moves while it reads; None if it is not to be shown."""
    if not shown or not is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    class Speed(ProgressColumn):
        def render(self, task: Task) -> str:
            return "" if task.speed is None else f"{task.speed:.0f} tokens/s"

    class Read(ProgressColumn):
        def render(self, task: Task) -> str:
            return "" if task.total is None else f"{task.completed:.0f} of {task.total:.0f} tokens"

    columns = (
        TextColumn("reading"),
        BarColumn(),
        Read(),
        Speed(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda n_done, n_all: bar.update(task, completed=n_done, total=n_all)
