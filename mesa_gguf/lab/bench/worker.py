"""One measurement in a process of its own, in whichever Python and with whichever llama.cpp is to be measured.

    python worker.py '{"method": "stock", "model": "model.gguf", ...}'

It is run by its path and needs nothing but llama_cpp and its numpy, so that it works where mesa_gguf is not installed. The
last line of its output is JSON. "stock" is llama_cpp as it is found (LLAMA_CPP_LIB_PATH chooses the library), "disabled"
the patched library with Mesa disabled, everything else a method of MesaConfig.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import resource
import sys
import threading
import time
from typing import Any

# this folder is not where modules are to be found
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != os.path.dirname(os.path.abspath(__file__))]

import numpy as np  # noqa: E402

WARM_UP = 32  # tokens: pages of the weights, threads
READ_BYTES = 2**28  # more than a processor's cache holds
COPY_STEP = 2**24  # bytes

BUFFER = re.compile(r":\s+(\S+)\s+(model|KV|RS|compute|output) buffer size =\s+([\d.]+) MiB")
DEVICE = re.compile(r"using device (.+?)(?: \((?:[0-9a-fA-F:.]+|unknown id)\))? - \d+ MiB free")
KINDS = {"model": "weights", "KV": "kv", "RS": "kv", "compute": "compute", "output": "output"}


class Log:
    """What llama.cpp tells about its buffers while it loads a model, to 0.01 MiB; and what went wrong."""

    def __init__(self) -> None:
        self.buffers: dict[str, dict[str, int]] = {"weights": {}, "kv": {}, "compute": {}, "output": {}}
        self.devices: list[str] = []
        self.error = ""

    def install(self, bindings: Any) -> None:
        self._callback = bindings.llama_log_callback(self._log)
        bindings.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _log(self, level: int, text: bytes, user_data: object) -> None:
        line = text.decode("utf-8", "replace").strip()
        buffer = BUFFER.search(line)
        if buffer is not None:
            name, kind, size = buffer.groups()
            buffers = self.buffers[KINDS[kind]]
            n_bytes = round(float(size) * 2**20)
            # a model in several files, or a cache for each kind of layer, has several buffers; compute buffers are made
            # again, and then only grow, when the graphs change
            buffers[name] = (
                max(n_bytes, buffers.get(name, 0)) if kind in ("compute", "output") else buffers.get(name, 0) + n_bytes
            )
        device = DEVICE.search(line)
        if device is not None and device[1] not in self.devices:
            self.devices.append(device[1])
        if re.search(r"error|fail|unable|cannot", line, re.IGNORECASE):
            self.error = line


def load_bindings(patched: bool) -> Any:
    """The ctypes bindings, on the patched library or on the one that llama_cpp finds by itself."""
    if patched:
        import mesa_gguf  # noqa: F401
    import llama_cpp.llama_cpp as bindings

    return bindings


def probe(patched: bool) -> dict[str, Any]:
    """What is installed."""
    bindings = load_bindings(patched)
    import llama_cpp

    log = Log()
    log.install(bindings)
    library = getattr(bindings, "_lib", None)
    return {
        "llama_cpp_python": llama_cpp.__version__,
        "python": platform.python_version(),
        "patched": hasattr(library, "llama_mesa_version"),
        "library": str(getattr(library, "_name", "")),
        "system_info": bindings.llama_print_system_info().decode("utf-8", "replace").strip(),
        "gpus": gpus(library),
    }


def gpus(library: Any) -> list[str]:
    """GPUs that ggml knows; llama_supports_gpu_offload() is true for a library that could use other machines' as well."""
    try:
        count, get = library.ggml_backend_dev_count, library.ggml_backend_dev_get
        kind, describe = library.ggml_backend_dev_type, library.ggml_backend_dev_description
    except AttributeError:
        return []
    count.restype, get.restype, describe.restype = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p
    get.argtypes, kind.argtypes, describe.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_void_p]
    devices = [get(i) for i in range(count())]
    # enum ggml_backend_dev_type: a GPU of its own, or one in the processor
    return [describe(device).decode("utf-8", "replace") for device in devices if kind(device) in (1, 2)]


def load(request: dict[str, Any]) -> Any:
    options = request["options"]
    if request["method"] == "stock":
        import llama_cpp

        return llama_cpp.Llama(request["model"], verbose=False, **options)
    from mesa_gguf import MesaConfig, MesaLlama

    llm = MesaLlama(request["model"], mesa=MesaConfig(**request["mesa"]), verbose=False, **options)
    llm._token_breaks  # noqa: B018 - looked up once for a model, not for a text
    return llm


def measure(request: dict[str, Any], log: Log) -> dict[str, Any]:
    bindings = load_bindings(request["method"] != "stock")
    if request["method"] == "stock" and hasattr(getattr(bindings, "_lib", None), "llama_mesa_version"):
        raise RuntimeError("llama_cpp has loaded mesa-gguf's patched library, not a stock one")
    log.install(bindings)
    before = memory("VmRSS")

    start = time.perf_counter()
    llm = load(request)
    log.install(bindings)
    load_s = time.perf_counter() - start

    n_tokens = request["tokens"]
    tokens = np.random.default_rng(0).integers(0, llm.n_vocab(), n_tokens + request["decode"]).tolist()
    llm.eval(tokens[: min(WARM_UP, n_tokens)])
    llm._ctx.get_logits()
    llm.reset()

    prefill_s = first_token_s = None
    if request.get("load_state"):
        load_state(bindings, llm, request["load_state"], tokens[:n_tokens])
    else:
        start = time.perf_counter()
        llm.eval(tokens[:n_tokens])
        llm._ctx.get_logits()  # waits until it is computed
        prefill_s = time.perf_counter() - start
        llm.sample(temp=0.0)
        first_token_s = time.perf_counter() - start
    peak = memory("VmHWM")  # writing the state is not what is measured
    if request.get("save_state"):
        save_state(bindings, llm, request["save_state"], tokens[:n_tokens])

    less: list[float] = []
    read_every = 0
    if request.get("read_budget"):
        read_every = llm._params.read_every
        if llm._params.read_budget < n_tokens - llm._params.first_chunk - llm._params.last_chunk:
            less = decode(llm, tokens[n_tokens:])
            llm.n_tokens = n_tokens
        llm.set_read_ranges([(0, n_tokens)])  # everything from here on
    steps = decode(llm, tokens[n_tokens:])
    if not request.get("save_state"):
        peak = memory("VmHWM")

    plan = llm.plan() if request["method"] not in ("stock", "disabled") else None
    return {
        "load_s": load_s,
        "prefill_s": prefill_s,
        "first_token_s": first_token_s,
        "decode_s": float(np.median(steps)) if steps else None,
        "decode_mean_s": float(np.mean(steps)) if steps else None,
        "decode_less_s": mean_of_rounds(less, read_every) if less else None,
        "read_every": read_every or None,
        "read": n_read(llm) if less else None,
        "memory_bytes_per_s": bandwidth(request["options"]["n_threads"])
        if steps
        else None,  # note: takes memory itself
        "peak_bytes": peak,
        "before_bytes": before,
        "tensor_bytes": int(bindings.llama_model_size(llm._model.model)),
        "buffers": log.buffers,
        "devices": log.devices,
        "plan": plan and {"n_chunks": len(plan.chunk_starts), "anchor": plan.anchor, "stair_width": plan.stair_width},
    }


def decode(llm: Any, tokens: list[int]) -> list[float]:
    """Seconds of each token."""
    steps = []
    for token in tokens:
        start = time.perf_counter()
        llm.eval([token])
        llm._ctx.get_logits()
        steps.append(time.perf_counter() - start)
    return steps


def n_read(llm: Any) -> int:
    """Keys that a token reads which does not read everything."""
    params = llm._params
    return int(params.first_chunk + params.last_chunk + params.read_budget)


def mean_of_rounds(steps: list[float], every: int) -> float:
    """Seconds of a token on the average: of every so many one that reads everything, and others that do not; medians of both."""
    whole, others = steps[::every], [s for i, s in enumerate(steps) if i % every]
    return float(np.median(whole) + (every - 1) * np.median(others or whole)) / every


def bandwidth(n_threads: int, n_bytes: int = READ_BYTES) -> float:
    """Bytes a second that threads read of an array: what the memory allows."""
    data = np.ones(n_bytes // 8, np.int64)
    parts = np.array_split(data, n_threads)

    def read(part: Any) -> None:
        for piece in np.array_split(part, 16):
            np.bitwise_or.reduce(piece)

    best = float("inf")
    for _ in range(5):
        threads = [threading.Thread(target=read, args=(part,)) for part in parts]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = min(best, time.perf_counter() - start)
    return n_bytes / best


def memory(field: str) -> int:
    """Resident bytes of this process: now ("VmRSS") or at most so far ("VmHWM").

    note: ru_maxrss is the second choice, on Linux it begins with what the parent had before it started this program
    """
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


#
# states: streamed to and from files, so that they take no memory
#


def save_state(bindings: Any, llm: Any, path: str, tokens: list[int]) -> None:
    """Write the cache as stock llama.cpp takes it, whose speed does not depend on where keys stand."""
    own = path + ".mesa"
    array = (bindings.llama_token * len(tokens))(*tokens)
    if not bindings.llama_state_save_file(llm._ctx.ctx, own.encode(), array, len(tokens)):
        raise RuntimeError(f"the state cannot be written to {own}")
    try:
        with open(own, "rb") as source, open(path, "wb") as target:
            target.write(source.read(8))  # magic, version
            n_tokens = source.read(4)
            target.write(n_tokens + source.read(4 * int.from_bytes(n_tokens, "little")))
            name = source.read(int.from_bytes(source.read(4), "little"))
            if name.endswith(b"+mesa"):
                name = name[: -len(b"+mesa")]
                source.seek(int.from_bytes(source.read(4), "little"), 1)
            target.write(len(name).to_bytes(4, "little") + name)
            while True:
                data = source.read(COPY_STEP)
                if not data:
                    break
                target.write(data)
    finally:
        os.unlink(own)


def load_state(bindings: Any, llm: Any, path: str, tokens: list[int]) -> None:
    if not os.path.exists(path):
        raise RuntimeError("there is no text to decode after: Mesa's measurement of this length failed")
    n_tokens = len(tokens)
    array, count = (bindings.llama_token * n_tokens)(), ctypes.c_size_t()
    loaded = bindings.llama_state_load_file(llm._ctx.ctx, path.encode(), array, n_tokens, ctypes.byref(count))
    if not loaded or count.value != n_tokens:
        raise RuntimeError("the state of the patched library cannot be loaded: is this another version of llama.cpp?")
    llm.input_ids[:n_tokens] = tokens
    llm.n_tokens = n_tokens


def main() -> int:
    request = json.loads(sys.argv[1])
    log = Log()
    try:
        result = probe(request["patched"]) if "patched" in request else measure(request, log)
    except Exception as err:
        reason = (
            f"{type(err).__name__}: {err}" if not str(err) or isinstance(err, (KeyError, AttributeError)) else str(err)
        )
        print(json.dumps({"error": reason + (f" ({log.error})" if log.error and log.error not in reason else "")}))
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
