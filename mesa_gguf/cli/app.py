"""``mesa-gguf``: the commands, and what happens to errors.

What the user got wrong is told in one line on standard error, with exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from ..errors import MesaError
from . import (
    EXIT_INTERRUPTED,
    ask,
    bench,
    chat,
    demo,
    evaluate,
    inspect,
    library,
    output,
    plan,
    rpc_server,
    serve,
    tune,
)

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
app.command("ask", epilog=ask.EXAMPLES)(ask.ask)
app.command("chat", epilog=chat.EXAMPLES)(chat.chat)
app.add_typer(library.library_app, name="library")
app.command("serve", epilog=serve.EXAMPLES)(serve.serve)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.command("tune", epilog=tune.EXAMPLES)(tune.tune)
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)
app.command("rpc-server", epilog=rpc_server.EXAMPLES)(rpc_server.rpc_server)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    output.set_up(arguments)
    try:
        command = typer.main.get_command(app)
        with output.llama_cpp_log(shown="--verbose" in arguments):
            code = command.main(arguments, prog_name="mesa-gguf", standalone_mode=False)
        output.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough
        output.give_up_stdout()
        return 1
    except (MesaError, OSError) as err:
        return _fail(output.worded(err))
    except _ClickException as err:
        message: str = err.format_message()  # type: ignore[attr-defined]
        if message.startswith("Got unexpected extra argument"):
            asks = arguments[:1] in (["ask"], ["chat"])
            message += (
                ": give documents with -f, and a question in quotes"
                if asks
                else ": put quotes around a name with spaces"
            )
        return _fail(message)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        output.say("mesa-gguf: interrupted")
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    if message:  # empty where help was printed instead
        output.say_error(message)
    return output.EXIT_USER_ERROR


def _version(show: bool) -> None:
    if show:
        output.write(f"mesa-gguf {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
