"""Devices that compute besides the CPU: GPUs of this machine, and those of other machines through ggml's RPC servers.

Servers are named as HOST:PORT. ggml's RPC client aborts the process where a server cannot be reached, speaks another
version or goes away, so each server is asked with a timeout before ggml is, and looked at before each batch.

note: devices of servers are handed to the model that asked for them and never registered with ggml, which would give
them to every model of the process.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import re
import signal
import socket
import stat
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import llama_cpp.llama_cpp as bindings

from . import _core
from .errors import ConfigError, DeviceError
from .machine import MAX_THREADS, check_kernels, usable_cores

DEFAULT_PORT = 50052  # as llama.cpp's own rpc-server
TIMEOUT = 5.0  # seconds for a server to answer

CPU, GPU, INTEGRATED_GPU, ACCELERATOR = range(4)  # enum ggml_backend_dev_type

HELLO = 14  # RPC_CMD_HELLO, the same in all versions
HELLO_REQUEST = struct.pack("<BQ24x", HELLO, 24)  # command, size, no special transport
HELLO_ANSWER = struct.Struct("<QBBBB24x")  # size, version (major, minor, patch), padding, transport


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


#
# ggml
#

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_reg_by_name": (_POINTER, [ctypes.c_char_p]),
    "ggml_backend_reg_get_proc_address": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "ggml_backend_reg_dev_count": (_SIZE, [_POINTER]),
    "ggml_backend_reg_dev_get": (_POINTER, [_POINTER, _SIZE]),
    "ggml_backend_dev_count": (_SIZE, []),
    "ggml_backend_dev_get": (_POINTER, [_SIZE]),
    "ggml_backend_dev_type": (ctypes.c_int, [_POINTER]),
}


@cache
def _ggml(name: str) -> Any:
    """A function of ggml, which libllama brings with it."""
    function = getattr(bindings._lib, name)
    function.restype, function.argtypes = _PROTOTYPES[name]
    return function


def _rpc_function(name: str, restype: Any, *argtypes: Any) -> Any:
    """A function of ggml's RPC backend.

    Raises:
        ConfigError: this build has none.
    """
    bindings.llama_supports_rpc()  # loads the backends
    backend = _ggml("ggml_backend_reg_by_name")(b"RPC")
    address = backend and _ggml("ggml_backend_reg_get_proc_address")(backend, name.encode())
    if not address:
        raise ConfigError(
            "this build has no RPC backend: build it with -DGGML_RPC=ON (CMAKE_ARGS), which is the default"
        )
    return ctypes.CFUNCTYPE(restype, *argtypes)(address)


def _local(*kinds: int) -> list[int]:
    """Addresses of this machine's devices of the given kinds."""
    bindings.llama_supports_rpc()  # loads the backends
    devices = [_ggml("ggml_backend_dev_get")(i) for i in range(_ggml("ggml_backend_dev_count")())]
    return [device for device in devices if _ggml("ggml_backend_dev_type")(device) in kinds]


def has_gpu() -> bool:
    """Whether this machine has a GPU that this build can use. llama_supports_gpu_offload says so of any build with RPC."""
    return bool(_local(GPU, INTEGRATED_GPU))


#
# servers
#


def parse(servers: str | Sequence[str]) -> list[Endpoint]:
    """Endpoints from "host:port,host:port", or a list of such.

    Raises:
        ConfigError: one is not host:port, or is named twice.
    """
    texts = servers.split(",") if isinstance(servers, str) else [str(server) for server in servers]
    endpoints = []
    for text in map(str.strip, texts):
        match = re.fullmatch(r"([^\s:]+):([0-9]{1,5})", text)
        if not match or not 0 < int(match[2]) < 65536:
            raise ConfigError(f"RPC server {text!r}: it must be HOST:PORT, such as 127.0.0.1:{DEFAULT_PORT}")
        endpoints.append(Endpoint(match[1], int(match[2])))
    if not endpoints:
        raise ConfigError("no RPC server is given: rpc_servers is empty")
    for endpoint in endpoints:
        if endpoints.count(endpoint) > 1:
            raise ConfigError(f"RPC server {endpoint} is named twice")
    return endpoints


def check_server(endpoint: Endpoint) -> None:
    """Ask a server whether it is there and speaks this library's version of the protocol.

    Raises:
        DeviceError: it cannot be used; the message says why.
    """
    try:
        # note: by IPv4, as ggml does
        address = socket.gethostbyname(endpoint.host)
    except (OSError, UnicodeError):
        raise DeviceError(f"RPC server {endpoint}: there is no host of this name") from None
    try:
        with socket.create_connection((address, endpoint.port), TIMEOUT) as connection:
            connection.sendall(HELLO_REQUEST)
            answer = b""
            while len(answer) < HELLO_ANSWER.size:
                part = connection.recv(HELLO_ANSWER.size - len(answer))
                if not part:
                    break
                answer += part
    except TimeoutError:
        raise DeviceError(
            f"RPC server {endpoint} does not answer within {TIMEOUT:g} s: it serves one client at a time and may have "
            "another, or is no RPC server"
        ) from None
    except OSError as err:
        raise DeviceError(
            f"RPC server {endpoint} cannot be reached: {err.strerror or err}; start it with mesa-gguf rpc-server --port {endpoint.port}"
        ) from None
    size, major, minor, patch, _ = HELLO_ANSWER.unpack(answer.ljust(HELLO_ANSWER.size, b"\0"))
    if len(answer) < HELLO_ANSWER.size or size != HELLO_ANSWER.size - 8:
        raise DeviceError(f"{endpoint} answers, but not as an RPC server of this version of ggml does")
    ours = _core.RPC_PROTOCOL
    if major != ours[0] or minor > ours[1]:
        raise DeviceError(
            f"RPC server {endpoint} speaks version {major}.{minor}.{patch} of the protocol, this library {'.'.join(map(str, ours))}: "
            "run the same version of mesa-gguf on both machines"
        )


class Servers:
    """The RPC servers of a model.

    Raises:
        ConfigError: an address is wrong, or this build has no RPC backend.
        DeviceError: a server cannot be used.
    """

    def __init__(self, servers: str | Sequence[str]) -> None:
        self.endpoints = parse(servers)
        self._lost: str | None = None
        self._connections: dict[int, Endpoint] = {}
        add_server = _rpc_function("ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)
        # ggml would let them share a connection; but then each buffer that one frees makes the server forget the other's graph,
        # and the process aborts when that is computed again
        for fd, endpoint in _connections(self.endpoints).items():
            if not _is_closed(fd):
                raise DeviceError(
                    f"RPC server {endpoint} is in use by another model of this process: close that one, or start a second "
                    "server on another port"
                )
        for endpoint in self.endpoints:
            check_server(endpoint)
        devices = []
        for endpoint in self.endpoints:
            backend = add_server(_name(endpoint))
            n_devices = _ggml("ggml_backend_reg_dev_count")(backend) if backend else 0
            if not n_devices:
                raise DeviceError(f"RPC server {endpoint} offers no device")
            devices += [_ggml("ggml_backend_reg_dev_get")(backend, i) for i in range(n_devices)]
        # in llama.cpp's own order: servers, then GPUs; integrated ones only where there are no others
        devices += _local(GPU) or _local(INTEGRATED_GPU)
        self.devices = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)
        """For llama_model_params.devices."""

    def watch(self) -> None:
        """Remember the connections that a model, now loaded, has opened."""
        self._connections = _connections(self.endpoints)

    @property
    def lost(self) -> str | None:
        """A server that has closed its connection, as it does when it ends; None while all are there."""
        if self._lost is None:
            self._lost = next((str(endpoint) for fd, endpoint in self._connections.items() if _is_closed(fd)), None)
        return self._lost

    def abandon(self) -> None:
        """Let go of servers of which one is lost: the others become free for their next client."""
        for fd in self._connections:
            _libc.shutdown(fd, socket.SHUT_RDWR)
        for endpoint in self.endpoints if self._connections else ():
            _n_abandoned[endpoint] = _n_abandoned.get(endpoint, 0) + 1
        self._connections = {}

    def check(self) -> None:
        """Raises:
        DeviceError: a server is gone.
        """
        if self.lost is not None:
            raise DeviceError(
                f"RPC server {self.lost} has gone away, and with it a part of the model: start it again, and load the model again"
            )


_n_abandoned: dict[Endpoint, int] = {}


def _name(endpoint: Endpoint) -> bytes:
    """What ggml is told. It knows connections by this name, so one that was abandoned must not have the name of the next."""
    return f"{endpoint.host}:{'0' * _n_abandoned.get(endpoint, 0)}{endpoint.port}".encode()


#
# sockets of this process. ggml opens them and does not tell which
#

_libc = ctypes.CDLL(None, use_errno=True)


def _connections(endpoints: Sequence[Endpoint]) -> dict[int, Endpoint]:
    """Open connections to these servers, by file descriptor."""
    peers: dict[tuple[bytes, int], Endpoint] = {}
    for endpoint in endpoints:
        try:
            addresses = socket.gethostbyname_ex(endpoint.host)[2]
        except (OSError, UnicodeError):
            continue
        peers |= {(socket.inet_aton(address), endpoint.port): endpoint for address in addresses}
    found = {}
    try:
        open_fds = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:  # no /proc
        return {}
    for fd in open_fds:
        peer = _peer(fd)
        if peer in peers:
            found[fd] = peers[peer]
    return found


def _peer(fd: int) -> tuple[bytes, int] | None:
    """IPv4 address and port at the other end of a connection; None for anything else.

    note: not through socket.socket, which may change the descriptor's blocking mode
    """
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return None
    except OSError:  # closed by now
        return None
    name = ctypes.create_string_buffer(128)
    if _libc.getpeername(fd, name, ctypes.byref(ctypes.c_uint32(len(name)))) != 0:
        return None
    family = name.raw[1] if sys.platform == "darwin" else struct.unpack_from("=H", name.raw)[0]
    if family != socket.AF_INET:
        return None
    return name.raw[4:8], struct.unpack_from("!H", name.raw, 2)[0]


def _is_closed(fd: int) -> bool:
    """Whether the other end has closed the connection, or it broke. Takes nothing from it."""
    byte = ctypes.create_string_buffer(1)
    n = _libc.recv(fd, byte, ctypes.c_size_t(1), socket.MSG_PEEK | socket.MSG_DONTWAIT)
    return n == 0 or (n < 0 and ctypes.get_errno() not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR))


#
# being a server
#


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at host."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except (OSError, UnicodeError):
        return False


def serve(host: str = "127.0.0.1", port: int = DEFAULT_PORT, n_threads: int | None = None, cpu: bool = False) -> None:
    """Offer this machine's GPUs, or its CPU if there is none, to other machines. Does not return; Ctrl-C ends the process.

    There is no authentication, and what comes in is not checked well: whoever reaches the port can run the server out
    of memory, crash it, or worse. Bind it to loopback or to a network of which every machine is trusted.

    Args:
        host: address to listen at.
        port: TCP port.
        n_threads: of the CPU; None: one for each core that this process may use.
        cpu: offer the CPU even if there is a GPU.

    Raises:
        ConfigError: this build has no RPC backend, the address is none of this machine, or MESA_KERNELS is no name of kernels.
        DeviceError: it cannot listen there.
    """
    check_kernels()
    start_server = _rpc_function(
        "ggml_backend_rpc_start_server",
        *(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)),
    )
    try:
        address = socket.gethostbyname(host)
    except (OSError, UnicodeError):
        raise ConfigError(f"{host}: there is no host of this name") from None
    try:  # ggml does not say why it cannot listen
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
    except OSError as err:
        raise DeviceError(f"cannot listen at {address}:{port}: {err.strerror}") from None
    found = _local(CPU) if cpu else _local(GPU) or _local(INTEGRATED_GPU) or _local(CPU)
    devices = (ctypes.c_void_p * len(found))(*found)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for the server to return
    threads = n_threads or min(usable_cores(), MAX_THREADS)
    start_server(f"{address}:{port}".encode(), None, threads, len(devices), devices)
    raise DeviceError(f"the RPC server at {address}:{port} has stopped")
