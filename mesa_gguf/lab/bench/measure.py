"""What is measured, in which order, and how long that takes."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ... import _core
from ...config import MesaConfig
from ...errors import ConfigError, MesaError, ModelError, OutOfMemoryError, Remedy
from ...machine import available_memory
from ...model.header import Header, check_model
from ...model.memory import KV_TYPES
from ..methods import renamed
from .builds import Build, run_worker
from .shapes import cache_dir

N_CTX_STEP = 256  # tokens, llama.cpp's own step
STOCK, DISABLED, MESA = "stock", "disabled", "mesa"
"""The unpatched library; the patched one with Mesa disabled; with Mesa."""
RENAMED = {"off": DISABLED}
"""Names that methods had in version 0.1."""


def method_names() -> tuple[str, ...]:
    """All that can be measured."""
    return (STOCK, DISABLED, *_core.METHODS)


def check_names(methods: Sequence[str]) -> None:
    """Raise ConfigError if one of them is no method."""
    for method in methods:
        if method in RENAMED:
            raise renamed(method, RENAMED[method])
        if method not in method_names():
            raise ConfigError(f"there is no method {method}: use one of {', '.join(method_names())}")


@dataclass(frozen=True)
class Settings:
    """What is the same for all measurements.

    Attributes:
        tokens: lengths of text.
        methods: names of `method_names`.
        decode: tokens that are decoded after each text.
        whole_max: longest text for the methods that read it in one piece, which takes time with its square; None: any.
        decode_only: beyond whole_max, stock llama.cpp decodes after the text that Mesa has read.
        train_length: T; None: the model's.
        n_gpu_layers: -1: all.
        read_budget: for decoding by Mesa once more, reading less (`MesaConfig.read_budget`); 0: not.
        mesa: other fields of `MesaConfig`.
    """

    model: Path
    tokens: tuple[int, ...]
    methods: tuple[str, ...]
    runs: int = 3
    decode: int = 32
    whole_max: int | None = None
    decode_only: bool = False
    train_length: int | None = None
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool = True
    threads: int = 1
    n_gpu_layers: int = 0
    n_batch: int = 2048
    n_ubatch: int = 512
    read_budget: int = 0
    mesa: dict[str, Any] = field(default_factory=dict)

    def n_ctx(self, n_tokens: int) -> int:
        """The context for a text of n_tokens: the same for every method."""
        return -(-(n_tokens + self.decode) // N_CTX_STEP) * N_CTX_STEP

    def config(self, method: str) -> dict[str, Any]:
        """The fields of `MesaConfig` for a method of the patched library."""
        if method == DISABLED:
            return {"enabled": False}
        fields = {"train_length": self.train_length, "tuned": False, **self.mesa}
        if method != MESA:
            fields["method"] = method
        elif self.read_budget:
            fields["read_budget"] = self.read_budget
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "model"}


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        decode_only: on the cache that a job with save_state has left.
    """

    run: int
    tokens: int
    method: str
    decode_only: bool = False
    save_state: bool = False

    @property
    def key(self) -> tuple[int, str]:
        return self.tokens, self.method


@dataclass(frozen=True)
class Measurement:
    """What a job gave: the fields of worker.py's answer, or why it failed."""

    job: Job
    seconds: float
    values: dict[str, Any]
    error: str | None = None

    @property
    def json(self) -> dict[str, Any]:
        job = {
            "run": self.job.run,
            "tokens": self.job.tokens,
            "method": self.job.method,
            "decode_only": self.job.decode_only,
        }
        return {**job, "wall_s": self.seconds, **({"error": self.error} if self.error is not None else self.values)}


def check(settings: Settings) -> None:
    """Find out what cannot work before anything is measured.

    Raises:
        MesaError: as `MesaLlama` would, or the settings exclude each other.
    """
    check_names(settings.methods)
    if not jobs(settings):
        raise ConfigError(
            f"nothing is left to measure: every length is beyond {settings.whole_max} tokens", Remedy("whole_max")
        )
    if settings.decode_only and (settings.whole_max is None or MESA not in settings.methods or settings.decode < 1):
        raise ConfigError(
            "measuring generation alone takes a longest length for stock, the method mesa, which reads the texts, and tokens to generate",
            Remedy("whole_max", "N"),
            Remedy("methods", MESA),
            Remedy("decode", 1, "or more"),
        )
    header = check_model(settings.model)
    weaving = [method for method in settings.methods if method not in (STOCK, DISABLED)]
    if weaving and header.unsupported is not None:
        raise ModelError(
            f"{header.path}: Mesa-Extrapolation does not support this model (architecture {header.architecture}): "
            f"{header.unsupported}",
            Remedy("methods", STOCK, why="which measures it without"),
        )
    for method in weaving:
        MesaConfig(**settings.config(method)).params(header.train_length)
    _check_memory(settings, header)
    # a quantized V cache is refused by llama.cpp without flash attention, for each measurement anew
    if settings.type_v not in ("f32", "f16", "bf16") and not settings.flash_attn:
        raise ConfigError(f"values in {settings.type_v} need flash attention", Remedy("flash_attn", True))


def _check_memory(settings: Settings, header: Header) -> None:
    n_tokens = max(settings.tokens)
    need = kv_bytes(settings, header, settings.n_ctx(n_tokens))
    free = available_memory()
    if settings.n_gpu_layers == 0 and free is not None and need > free:
        raise OutOfMemoryError(
            f"the KV cache of {n_tokens} tokens needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            Remedy("tokens", why="none that long"),
            Remedy("type_k", "q8_0", why="and the same for the values: about half the size"),
            needed=need,
            available=free,
        )
    if settings.decode_only:
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(folder).free
        if 2 * need > room:  # as Mesa saves it, and as stock llama.cpp takes it
            raise ConfigError(
                f"measuring generation alone keeps the KV cache in {folder} for a while, which takes {2 * need / 2**30:.1f} GiB, "
                f"{room / 2**30:.1f} GiB are free: set XDG_CACHE_HOME to a folder with more room"
            )


def kv_bytes(settings: Settings, header: Header, n_tokens: int) -> int:
    """Bytes of keys and values of n_tokens."""
    return header.kv_bytes(n_tokens, KV_TYPES[settings.type_k], KV_TYPES[settings.type_v])


def in_chunks(method: str) -> bool:
    """A text is read in chunks: in time that grows with its length, not with its square."""
    return method not in (STOCK, DISABLED) and _core.Params.default(N_CTX_STEP, method).chunked


def jobs(settings: Settings) -> list[Job]:
    """All measurements, in order.

    Lengths and methods take turns, so that a machine whose speed drifts does not favour one of them.
    """
    made: list[Job] = []
    for run in range(settings.runs):
        for tokens in settings.tokens:
            is_long = settings.whole_max is not None and tokens > settings.whole_max
            saves = settings.decode_only and is_long and any(m in (STOCK, DISABLED) for m in settings.methods)
            round_: list[Job] = []
            for method in settings.methods:
                if not is_long or in_chunks(method):
                    round_.append(Job(run, tokens, method, save_state=saves and method == MESA))
                elif settings.decode_only and method in (STOCK, DISABLED):
                    round_.append(Job(run, tokens, method, decode_only=True))
            made += sorted(round_, key=lambda job: job.decode_only)  # they need what Mesa has read
    return made


class Estimate:
    """How long the remaining jobs take, from those that are done."""

    HALF = 5000  # tokens: where attention costs about what the rest of the model does
    START = 500  # tokens that could be read while a process starts

    def __init__(self, all_jobs: Sequence[Job]) -> None:
        self._jobs = list(all_jobs)
        self._done: list[tuple[Job, float]] = []

    def add(self, job: Job, seconds: float) -> None:
        """A job is done."""
        self._done.append((job, seconds))

    @property
    def seconds_left(self) -> float | None:
        """None while nothing was measured."""
        if not self._done:
            return None
        return sum(self._seconds(job) for job in self._jobs[len(self._done) :])

    def _seconds(self, job: Job) -> float:
        """From the same job's earlier runs, else from the method's other lengths, else from all."""
        same = [seconds for done, seconds in self._done if done.key == job.key]
        if same:
            return sum(same) / len(same)
        known = [
            (d, s) for d, s in self._done if d.method == job.method and d.decode_only == job.decode_only
        ] or self._done
        return self._weight(job) * sum(s for _, s in known) / sum(self._weight(d) for d, _ in known)

    def _weight(self, job: Job) -> float:
        if job.decode_only:
            return self.START
        return self.START + job.tokens * (1 if in_chunks(job.method) else 1 + job.tokens / self.HALF)


OnJob = Callable[[Job], None]
"""Called when a measurement begins."""


def measure(
    settings: Settings, patched: Build, stock: Build | None, on_job: OnJob | None = None
) -> Iterator[Measurement]:
    """Run all measurements, each in a process of its own, one after another.

    A measurement that fails is not repeated in later runs.
    """
    failed: dict[tuple[int, str], str] = {}
    with ExitStack() as stack:
        state: Path | None = None
        if settings.decode_only:
            # not in /tmp, which may lie in memory
            state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="state-", dir=cache_dir()))) / "state"
        for job in jobs(settings):
            if on_job is not None:
                on_job(job)
            start = time.perf_counter()
            values: dict[str, Any] = {}
            error = failed.get(job.key)
            if job.save_state and state is not None:
                state.unlink(missing_ok=True)  # of another length
            if error is None:
                try:
                    build = stock if job.method == STOCK else patched
                    if build is None:
                        raise MesaError("there is no unpatched library")
                    values = run_worker(build, _request(settings, job, state))
                except MesaError as err:
                    error = failed[job.key] = str(err)
            yield Measurement(job, time.perf_counter() - start, values, error)


def _request(settings: Settings, job: Job, state: Path | None) -> dict[str, Any]:
    return {
        "method": job.method,
        "model": str(settings.model),
        "tokens": job.tokens,
        "decode": settings.decode,
        "mesa": settings.config(job.method),
        "read_budget": settings.read_budget if job.method == MESA and settings.decode > 1 else 0,
        "load_state": str(state) if job.decode_only else None,
        "save_state": str(state) if job.save_state else None,
        "options": {
            "n_ctx": settings.n_ctx(job.tokens),
            "n_batch": settings.n_batch,
            "n_ubatch": settings.n_ubatch,
            "n_threads": settings.threads,
            "n_threads_batch": settings.threads,
            "n_gpu_layers": settings.n_gpu_layers,
            "flash_attn": settings.flash_attn,
            "type_k": KV_TYPES[settings.type_k],
            "type_v": KV_TYPES[settings.type_v],
        },
    }
