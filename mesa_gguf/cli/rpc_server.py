"""``mesa-gguf rpc-server``: compute layers for other machines."""

from __future__ import annotations

from typing import Annotated

from . import output
from .options import option

EXAMPLES = """\
Examples:\n
  mesa-gguf rpc-server --port 50052\n
  mesa-gguf ask -m model.gguf -f log.txt "Who?" --rpc 127.0.0.1:50052
"""


def rpc_server(
    host: Annotated[str, option("--host", metavar="HOST", help="Address of this machine to listen at.")] = "127.0.0.1",
    port: Annotated[int, option("--port", min=1, max=65535, metavar="N", help="TCP port to listen at.")] = 50052,
    threads: Annotated[
        int | None,
        option(
            "--threads",
            min=1,
            metavar="N",
            help="Number of threads, where the CPU computes. Default: one for each core.",
        ),
    ] = None,
    cpu: Annotated[bool, option("--cpu", help="Offer the CPU and its memory even where there is a GPU.")] = False,
) -> None:
    """Compute layers for mesa-gguf ask --rpc, with this machine's GPUs or its CPU, until it is ended (Ctrl-C).

    There is no authentication: whoever reaches the port can crash this process or worse. One client is served at a time.
    """
    from .. import rpc

    if not rpc.is_loopback(host):
        output.say(
            f"mesa-gguf: warning: {host} is reached by other machines, and an RPC server asks nobody who he is. Never run it "
            "on a network with machines or people that you do not trust (docs/RPC.md)"
        )
    output.say(f"mesa-gguf: listening at {host}:{port}, without authentication; Ctrl-C ends it")
    rpc.serve(host, port, threads, cpu)
