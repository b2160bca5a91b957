"""`MesaLlama`: llama-cpp-python's `Llama`, reading past the trained length."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import llama_cpp
import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from llama_cpp import LlamaState
from llama_cpp.llama_speculative import LlamaDraftModel
from llama_cpp.llama_tokenizer import LlamaTokenizer

from . import _core, _llama_cpp, chat, completion, embedding, machine, rpc, sampling
from .config import MesaConfig, MesaPlan
from .crew import Crew
from .errors import ConfigError, MesaError, ModelError, OutOfMemoryError, PromptError, Remedy
from .model.attention import AttentionTimes, time_attention
from .model.header import SHOW_REASON, check_adapter, check_model, damaged, fingerprint
from .model.memory import check_kv_types, check_memory, is_quantized
from .model.tuning import Tuning, tuned
from .state import MesaState
from .vocabulary import APART, Closed, WholeTokens, tokenize_piece

Progress = Callable[[int, int], None]
"""Called with (tokens read, tokens to read) while a prompt is read."""


N_CTX_STEP = 256  # tokens; llama.cpp's context length is a multiple of it
CHANGES_MODEL = {
    "kv_overrides": None, "lora_path": None, "rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,
    "rope_freq_base": 0.0, "rope_freq_scale": 0.0, "yarn_ext_factor": -1.0,
}  # fmt: skip
"""Arguments, with their defaults, that make another model of a file: what was measured of it does not hold."""
LOOK_SECONDS = 0.2  # between two looks for a signal while a batch is computed
MOST_DRAFTS = 64  # tokens; with a draft model, a batch of at most this many has the logits of all of them

Heads = Literal["mean", "max", "all"]
_KINDS = {"mean": _core.ATTENTION_MEAN, "max": _core.ATTENTION_MAX, "all": _core.ATTENTION_HEADS}

_Constructor = TypeVar("_Constructor", bound=Callable[..., None])


def _or_close(init: _Constructor) -> _Constructor:
    """A constructor that frees what it has taken when it fails: the exception's traceback would keep it all alive."""

    @functools.wraps(init)
    def init_or_close(self: MesaLlama, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except BaseException:
            self.close()
            raise

    return cast(_Constructor, init_or_close)


class MesaLlama(llama_cpp.Llama):
    """`llama_cpp.Llama` with Mesa-Extrapolation.

    Everything that `Llama` does works past the trained length: completion, chat, streaming, stop strings, grammars,
    logits_all, eval, generate, save_state and load_state, prefix reuse, prompt-lookup speculation. A text that fits
    into the trained length is read as stock llama.cpp reads it, with the same logits.

    Attributes:
        mesa: the config in use: numbers that nobody gave are those that ``mesa-gguf tune`` keeps of the model, if it does.
        tuning: these; None: there are none, or they are not used.
        interrupt: called before each batch, and a few times a second while it is computed, in the thread that reads. What it raises
            ends the batch on the CPU and reaches the caller, as a signal does (Ctrl-C); what was read whole stays in the context.

    Args:
        model_path: a GGUF file.
        mesa: how texts are read; `MesaConfig(enabled=False)` is stock llama.cpp.
        n_ctx: longest text in tokens, answer included; may exceed the trained length. 0: the trained length. Rounded up to
            a multiple of 256, as llama.cpp does.
        n_batch: tokens handed to llama.cpp at once.
        n_ubatch: tokens computed at once; default 512.
        flash_attn: on by default, other than in `Llama`. "auto": on the CPU what is faster, which is measured when the model is loaded
            (`attention_times`); with other devices llama.cpp decides, by what they can do.
        progress: called with (tokens read, tokens to read) while a prompt of more than one batch is read.
        rpc_servers: "host:port,host:port", or a list of such: servers whose devices take the layers (docs/RPC.md), before
            this machine's GPUs. n_gpu_layers is -1, all layers, unless it is given; tensor_split says how many go where.
        **kwargs: all other arguments of `llama_cpp.Llama`. Of them
            n_threads: to generate; default: one for each physical core that the process may use (by affinity, cpuset and quota).
            n_threads_batch: to read; default: one for each logical CPU that it may use. Where a number is not given and no other device
                computes, fewer threads are used while other programs have some of the cores (`mesa_gguf.crew`).
            logits_all: keeps n_vocab floats for each token read; not needed for a draft model.
            embedding: embed() and create_embedding() work, besides completion.

    Raises:
        ModelError: the file cannot be used, or Mesa does not support its architecture; names the reason.
        ConfigError: the options cannot work.
        OutOfMemoryError: weights and a KV cache of n_ctx tokens do not fit into memory.
        DeviceError: an RPC server cannot be used.
    """

    interrupt: Callable[[], object] | None = None

    @_or_close
    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        mesa: MesaConfig | None = None,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        flash_attn: bool | Literal["auto"] = True,
        progress: Progress | None = None,
        rpc_servers: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._free_cpus = machine.FreeCpus()
        self._sampler = None
        self._servers: rpc.Servers | None = None
        self._with_logits = range(0)  # tokens whose logits llama.cpp holds: those of the last batch
        self._first_scored = 0  # scores has the logits of the tokens from this one on
        self._end_of_scores = 0  # and was never written to from this row on
        self._params: _core.Params | None = None
        self._heads: Heads | None = None  # of attention(), where it is on
        self._attended: list[int] = []  # and its layers

        self.mesa = mesa if mesa is not None else MesaConfig()
        _check_config(self.mesa)
        machine.check_kernels()
        self.progress = progress

        for name, value in (("n_ctx", n_ctx), ("n_batch", n_batch), ("n_ubatch", n_ubatch)):
            least = 0 if name == "n_ctx" else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
                raise ConfigError(f"{name} is {value!r}: it must be a whole number of tokens, {least} or more")

        threads = _threads(kwargs)
        kwargs |= {name: given or default for (name, given), default in zip(threads.items(), machine.default_threads())}
        self._threads = self._threads_set = kwargs["n_threads"], kwargs["n_threads_batch"]
        # those that were chosen are kept to; and beside other devices CPU time says little
        free = rpc_servers is None and not rpc.has_gpu()
        self._crews = tuple(
            Crew(n) if free and given is None else None for given, n in zip(threads.values(), self._threads)
        )
        embedding.check(kwargs, self.mesa.enabled)
        self._embeds = self.mesa.enabled and bool(kwargs.get("embedding", False))
        logits_all = bool(kwargs.get("logits_all", False))
        check_kv_types(type_k=kwargs.get("type_k"), type_v=kwargs.get("type_v"))
        if flash_attn not in (True, False, "auto"):
            raise ConfigError(f'flash_attn is {flash_attn!r}: it must be True, False or "auto"')
        self._auto_flash_attn = flash_attn == "auto"
        self.attention_times: AttentionTimes | None = None
        if flash_attn is False and is_quantized(kwargs.get("type_v")):
            raise ConfigError(
                "a quantized V cache needs flash attention",
                Remedy("flash_attn", True),
                Remedy("type_v", 1, why="which is f16"),
            )
        header = check_model(Path(model_path), kwargs.get("kv_overrides"))
        self.tuning: Tuning | None = None
        as_in_file = all(kwargs.get(name, default) == default for name, default in CHANGES_MODEL.items())
        if as_in_file and not kwargs.get("vocab_only", False):
            self.mesa, self.tuning = tuned(self.mesa, Path(model_path), header.train_length)
            if self.tuning is not None and kwargs.get("verbose", False) and _llama_cpp.has_stderr():
                print(f"mesa-gguf: {model_path}: {self.tuning} (mesa-gguf tune)", file=sys.stderr)
        lora_path = kwargs.pop("lora_path", None)
        if lora_path is not None:
            check_adapter(Path(lora_path))
        pooling_type = kwargs.get("pooling_type", llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED)
        self._pooling_type = embedding.pooling_type(header, pooling_type) if self._embeds else pooling_type
        # llama.cpp rounds it up; Llama makes its buffers of what it was given
        n_ctx = -(-(n_ctx or header.train_length) // N_CTX_STEP) * N_CTX_STEP
        vocab_only = kwargs.get("vocab_only", False)
        if not vocab_only:
            if rpc_servers is not None:
                kwargs.setdefault("n_gpu_layers", -1)
                self._servers = rpc.Servers(rpc_servers)
            offloads = self._servers is not None or rpc.has_gpu()
            n_gpu_layers = kwargs.get("n_gpu_layers", 0) if offloads else 0
            kv_types = kwargs.get("type_k"), kwargs.get("type_v")
            check_memory(header, n_ctx, *kv_types, n_gpu_layers, n_batch if logits_all else 0)
            reason = header.unsupported  # raises if llama.cpp cannot load it
            if self.mesa.enabled:
                if reason is not None:
                    raise ModelError(
                        f"{header.path}: Mesa-Extrapolation does not support this model (architecture "
                        f"{header.architecture}): {reason}",
                        Remedy("enabled", False, why="which runs it as stock llama.cpp"),
                    )
                self.mesa.params(header.train_length)  # raises before anything is loaded
            elif header.rehearsal.fatal:
                raise damaged(header.path, f"llama.cpp {header.rehearsal.reason}")
            if self._auto_flash_attn and not offloads and not is_quantized(kwargs.get("type_v")):
                self.attention_times = time_attention(header, n_ctx, self._threads[1], *kv_types)
                if self.attention_times is not None:
                    self._auto_flash_attn, flash_attn = False, self.attention_times.flash_is_faster

        kwargs["verbose"] = bool(kwargs.get("verbose", False)) and _llama_cpp.has_stderr()
        _llama_cpp.keep_standard_streams()
        n_batch = min(n_batch, n_ctx)  # as llama.cpp has it; Llama makes its buffers of what it was given
        try:
            with _llama_cpp.interrupts_kept():
                super().__init__(
                    str(model_path),
                    n_ctx=n_ctx,
                    n_batch=n_batch,
                    n_ubatch=n_ubatch,
                    flash_attn=bool(flash_attn),
                    **kwargs,
                )
        except ValueError as err:
            if "Failed to load model" in str(err):
                raise ModelError(f"{model_path}: llama.cpp cannot load this model", SHOW_REASON) from err
            if "Failed to create llama_context" in str(err):
                raise OutOfMemoryError(
                    f"no context of {n_ctx} tokens for {model_path}, for which there is too little memory, or options exclude each other",
                    SHOW_REASON,
                ) from err
            raise
        except TemplateError as err:  # llama_cpp compiles the template when it loads a model
            raise ModelError(f"{model_path}: the model's chat template is damaged: {err}") from None

        self._model.__class__ = WholeTokens
        _core.let_watch(self._address)
        if self._servers is not None:
            self._servers.watch()
        self._init_args = (
            dict(mesa=self.mesa, progress=progress, rpc_servers=rpc_servers, flash_attn=flash_attn) | threads
        )
        self._guessed_chat_format = kwargs.get("chat_format") is None  # or it is the model's own
        self._init_args["chat_format"] = kwargs.get("chat_format")
        self._logits_all = (
            logits_all  # `Llama` keeps every token's for a draft model, which needs those of the last batch
        )
        self.scores = np.zeros(self.scores.shape, np.single)  # takes memory where it is written to
        if self._embeds:
            self._init_args["pooling_type"] = pooling_type
            llama_cpp.llama_set_embeddings(self._ctx.ctx, False)  # until embed() wants them
        # LongRoPE has two sets of factors, and n_ctx decides
        self._has_long_factors = any(name.startswith("rope_factors_long") for name, _, _ in header.tensors)
        self.lora_path = lora_path
        if lora_path is not None:
            self._apply_adapter()
        if not self.mesa.enabled or vocab_only:
            return

        reason = _core.unsupported(_address(self.model))
        if reason is not None:
            raise ModelError(
                f"{model_path}: Mesa-Extrapolation does not support this model (architecture {header.architecture}): {reason}"
            )
        self._params = self.mesa.params(self._model.n_ctx_train())
        try:
            _core.enable(self._address, self._params)
        except RuntimeError as err:
            raise ModelError(f"{model_path}: {err}") from None
        self._set_read_layers()
        if self.mesa.plan is not None:
            _validate(self.mesa.plan, self._params, 0)

    def reconfigure(self, mesa: MesaConfig) -> None:
        """Read by other numbers from now on. What was read is forgotten. Of a config nothing but what is written in it holds.
        `attention` stays on, where it is.

        Raises:
            ConfigError: the numbers cannot work together, or Mesa would be switched on or off, which takes a context of its own.
            OutOfMemoryError: there is too little memory for `attention`, which is then off.
        """
        _check_config(mesa)
        if not (mesa.enabled and self.mesa.enabled) or self._params is None:
            raise ConfigError("Mesa is switched on or off when a model is loaded: load it again")
        params = mesa.params(self._model.n_ctx_train())
        if mesa.plan is not None:
            _validate(mesa.plan, params, 0)
        self.reset()
        self._ctx.kv_cache_clear()
        try:
            _core.enable(self._address, params)
        except RuntimeError as err:
            raise ConfigError(str(err)) from None
        self.mesa, self._params, self.tuning = mesa, params, None
        self._init_args["mesa"] = mesa
        self._set_read_layers()
        heads, self._heads = self._heads, None
        if heads is not None:
            self.enable_attention(self._attended, heads)

    def _set_read_layers(self) -> None:
        if self.mesa.read_layers is None:
            return
        try:
            _core.set_read_layers(self._address, self.mesa.read_layers)
        except ValueError as err:
            raise _no_layers(f"read_layers: {err}") from None

    def _apply_adapter(self) -> None:
        """As `llama_cpp.Llama` does it, which crashes where llama.cpp refuses the adapter."""
        adapter = llama_cpp.llama_adapter_lora_init(self.model, str(self.lora_path).encode())
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (ctypes.c_float * 1)(self.lora_scale)
        if not adapter or llama_cpp.llama_set_adapters_lora(self._ctx.ctx, adapters, 1, scales) != 0:
            raise ModelError(f"{self.lora_path}: llama.cpp cannot use this LoRA adapter with {self.model_path}")

    @property
    def model_params(self) -> Any:
        """What the model is loaded with, a llama_model_params; `Llama` sets it."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        if self._servers is not None:
            params.devices = ctypes.cast(self._servers.devices, ctypes.c_void_p)
        self._model_params = params

    @property
    def context_params(self) -> Any:
        """What the context is made with, a llama_context_params; `Llama` sets it, knows flash attention on and off only, and makes
        contexts for embeddings of many sequences."""
        if self._auto_flash_attn:
            self._context_params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        if self._embeds:
            self._context_params.n_seq_max = 1
            self._context_params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        self._context_params = params

    def _check_devices(self) -> None:
        if self._servers is not None:
            self._servers.check()

    def close(self) -> None:
        """Free the model. What was on a server that has gone away is left alone: ggml aborts the process on freeing it."""
        made = self.__dict__  # not everything, if a constructor has failed
        servers, self._servers = made.get("_servers"), None
        if servers is not None and servers.lost is not None:
            for stack in (made.get("_stack"), *(made[part]._exit_stack for part in ("_ctx", "_model") if part in made)):
                if stack is not None:
                    stack.pop_all()
            servers.abandon()
        if "_stack" in made:
            super().close()
        if "_ctx" in made:  # llama.cpp crashes on what was freed
            self._model = self._ctx = cast(Any, Closed(self.model_path))

    @property
    def _address(self) -> int:
        return _address(self._ctx.ctx)

    @property
    def train_length(self) -> int:
        """T in tokens: the config's, or the GGUF's."""
        return self.mesa.train_length if self.mesa.train_length is not None else self._model.n_ctx_train()

    @property
    def reading_length(self) -> int:
        """R in tokens: longer texts are read in chunks. With stock llama.cpp T."""
        trained = self.train_length
        return self._params.reading_length if self._params is not None else trained

    #
    # plans
    #

    def plan(self, n_tokens: int | None = None) -> MesaPlan:
        """The plan of a text of n_tokens tokens that is read from its beginning; None: the plan in force now.

        Chunk borders here lie on the grid; a real text moves them back to the ends of its sentences
        (`plan_of` shows those).

        Raises:
            ConfigError: no plan fits, or Mesa is off and nothing can be planned.
        """
        if n_tokens is None:
            return MesaPlan._of(_core.plan(self._address)) if self._params is not None else MesaPlan([0], 0, 1)
        if not self.mesa.enabled:
            return MesaPlan([0], 0, 1)
        return self.mesa.make_plan(n_tokens, self.train_length)

    def plan_of(self, tokens: Sequence[int]) -> MesaPlan:
        """The plan of this text, read from its beginning, borders at the ends of sentences."""
        if not self.mesa.enabled:
            return MesaPlan([0], 0, 1)
        return self.mesa.make_plan(len(tokens), self.train_length, self._breaks(tokens))

    #
    # vocabulary. note: llama.cpp aborts where a model without one is asked for it
    #

    @functools.cached_property
    def _has_vocabulary(self) -> bool:
        return bool(llama_cpp.llama_vocab_type(self._model.vocab) != llama_cpp.LLAMA_VOCAB_TYPE_NONE)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """See `llama_cpp.Llama.tokenize`.

        Raises:
            ModelError: the model has no vocabulary.
            PromptError: text is not bytes.
        """
        if not isinstance(text, bytes):
            raise PromptError(
                f"the text to tokenize is {type(text).__name__}: it must be bytes, as text.encode() makes them"
            )
        if not self._has_vocabulary and isinstance(self.tokenizer_, LlamaTokenizer):
            raise ModelError(f"{self.model_path}: this model has no vocabulary: give it token ids, not text")
        first, *others = text.split(APART.encode())
        tokens: list[int] = super().tokenize(first, add_bos, special)
        for part in others:
            tokens += tokenize_piece(self, part.decode(), special=special)
        return tokens

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """See `llama_cpp.Llama.detokenize`; nothing without a vocabulary.

        Raises:
            PromptError: a token is not in the model's vocabulary.
        """
        if not self._has_vocabulary and isinstance(self.tokenizer_, LlamaTokenizer):
            return b""
        return super().detokenize(tokens, prev_tokens, special)

    @functools.cached_property
    def _token_breaks(self) -> npt.NDArray[np.uint8] | None:
        """2 for every token that ends a line, 1 for one that ends a sentence, [n_vocab]; None without a vocabulary."""
        if not self._has_vocabulary:
            return None
        breaks = np.zeros(self._n_vocab, np.uint8)
        for token in range(self._n_vocab):
            text = self.token_bytes(token)
            if text.endswith(b"\n"):
                breaks[token] = 2
            elif text.rstrip(b" ").endswith((b".", b"!", b"?", "。".encode(), "！".encode(), "？".encode())):
                breaks[token] = 1
        return breaks

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token, nothing for control tokens."""
        if not self._has_vocabulary:
            return b""
        if not 0 <= token < self._n_vocab:
            self._check_vocabulary([token])
        piece: bytes = cast(WholeTokens, self._model).token_bytes(token)
        return piece

    def _breaks(self, tokens: Sequence[int] | npt.NDArray[np.intc]) -> npt.NDArray[np.uint8] | None:
        """Where a chunk may well end, [n_tokens], as `_token_breaks`."""
        if not self.mesa.sentence_borders or self._token_breaks is None:
            return None
        return self._token_breaks[np.asarray(tokens, np.intc)]

    #
    # reading
    #

    def eval(self, tokens: Sequence[int]) -> None:
        """Read tokens after the ones in the context; see `llama_cpp.Llama.eval`.

        Raises:
            PromptError: the text does not fit into n_ctx, or holds a token that the model does not know.
            ConfigError: no plan fits (a fixed stair_width that is too small).
            DeviceError: an RPC server has gone away.
            RuntimeError: llama.cpp failed.
        """
        self._check_devices()
        tokens = completion.token_ids(tokens, "the text")
        if tokens:
            self._eval(self._announce(tokens))

    def log_likelihoods(self, tokens: Sequence[int], last: int | None = None) -> npt.NDArray[np.float64]:
        """Read tokens after the ones in the context, as `eval` does -> the natural logarithm of the probability of each of them but the
        first, given what is in front of it [len(tokens) - 1].

        Args:
            last: how many tokens at the end it is told of [last], so that less is computed; default: all but the first.

        Raises:
            As `eval`.
            PromptError: there are no more than `last` tokens.
        """
        self._check_devices()
        tokens = completion.token_ids(tokens, "the text")
        if last is not None and not 0 <= last < max(1, len(tokens)):
            raise PromptError(
                f"last is {last}: it must be at least 0, and less than the number of tokens, {len(tokens)}"
            )
        n_told = max(0, len(tokens) - 1) if last is None else last
        if n_told == 0:
            self.eval(tokens)
            return np.empty(0)
        seen: list[npt.NDArray[np.float64]] = []
        to_read = self._announce(tokens)
        following = np.asarray([*to_read[1:], -1])

        def look(start: int, logits: npt.NDArray[np.single]) -> None:
            top = logits.max(axis=1)
            total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64))
            expected = following[start : start + len(logits)]
            seen.append(logits[np.arange(len(logits)), expected] - total)

        self._eval(to_read, look=look, look_from=len(to_read) - n_told - 1)
        return np.concatenate(seen)[:-1]

    def _announce(self, tokens: list[int]) -> list[int]:
        """Plan the reading of tokens after the ones in the context -> those to read: some of the context may be among them."""
        self._check(tokens)
        if self._ctx.memory is None:
            raise ModelError(
                f"{self.model_path}: no text can be read: the model has no KV cache, or was opened with vocab_only"
            )
        if not self.mesa.enabled:
            return tokens
        n_past = self.n_tokens
        self._ctx.kv_cache_seq_rm(-1, n_past, -1)
        loaded = self.loaded_chunks()
        if loaded and n_past < loaded[-1][1]:
            raise self._inside_loaded(n_past, loaded[-1])
        n_keep = self._make_plan(tokens)
        if n_keep < n_past:  # what is not kept is read anew
            tokens = self.input_ids[n_keep:n_past].tolist() + tokens
            self.n_tokens = n_keep
        return tokens

    def _decode(self, n_tokens: int) -> None:
        """The batch that was set, by as many threads as are of use on a machine that does other things too."""
        one, many = self._crews
        crew = one if n_tokens == 1 else many
        if crew is None:
            self._compute()
            return
        crew.begin(time.perf_counter(), self._free_cpus.look(), many)
        threads = one.n if one is not None else self._threads[0], many.n if many is not None else self._threads[1]
        if threads != self._threads_set:
            llama_cpp.llama_set_n_threads(self._ctx.ctx, *threads)
            self._threads_set = threads
        faults, wall, cpu = machine.disk_faults(), time.perf_counter(), time.process_time()
        self._compute()
        now, cpu, after = time.perf_counter(), time.process_time() - cpu, machine.disk_faults()
        from_disk = None if faults is None or after is None else after > faults
        crew.worked(n_tokens, now - wall, cpu, now, from_disk, self._free_cpus.look())

    def _check_interrupt(self) -> None:
        if self.interrupt is not None:
            self.interrupt()

    def _compute(self) -> None:
        """llama.cpp computes the batch that was set."""
        self._check_interrupt()
        with self._watch():
            self._ctx.decode(self._batch)

    def _watch(self) -> _core.Watch:
        """Within this a signal, or what `interrupt` raises, ends what llama.cpp computes, and reaches the caller."""
        return _core.Watch(self.interrupt, LOOK_SECONDS)

    def _make_plan(self, tokens: Sequence[int]) -> int:
        """Tell the core what comes, so that it can plan. Returns how many tokens of the context stay."""
        by_hand = self.mesa.plan
        try:
            if by_hand is not None and self.n_tokens == 0:
                # the text may come in several calls
                warning = _core.set_plan(self._address, by_hand._plan, max(len(tokens), by_hand.last_start))
                if warning is not None:
                    warnings.warn(warning, stacklevel=3)
                return 0
            breaks = None
            if _core.needs_breaks(self._address, len(tokens)):
                breaks = self._breaks(np.concatenate((self.input_ids[: self.n_tokens], np.asarray(tokens, np.intc))))
            return _core.prompt(self._address, len(tokens), breaks)
        except ValueError as err:
            raise ConfigError(str(err)) from None

    def _check(self, tokens: list[int]) -> None:
        n_total = self.n_tokens + len(tokens)
        if n_total > self._n_ctx:
            raise self._too_long("the text", n_total)
        self._check_vocabulary(tokens)

    def _too_long(self, what: str, n_tokens: int) -> PromptError:
        return PromptError(
            f"{what} has {n_tokens} tokens, more than n_ctx ({self._n_ctx})",
            Remedy("n_ctx", n_tokens, "or more"),
            needed=n_tokens,
            available=self._n_ctx,
        )

    def _check_vocabulary(self, tokens: list[int]) -> None:
        bad = next((t for t in tokens if not 0 <= t < self._n_vocab), None)
        if bad is not None:
            raise PromptError(f"token {bad} is not in the model's vocabulary of {self._n_vocab} tokens")

    def _eval(
        self,
        tokens: Sequence[int],
        to_borders: bool = True,
        look: Callable[[int, npt.NDArray[np.single]], None] | None = None,
        look_from: int = 0,
    ) -> None:
        """Read tokens in batches that end at chunk borders where they can.

        Args:
            look: called after each batch with a place in tokens and the logits of the batch's tokens from there on, [n, n_vocab], which the
                next batch changes.
            look_from: the first token whose logits it gets.
        """
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        n_done, n_all = 0, len(tokens)
        while n_done < n_all:
            n_past = self.n_tokens
            n = min(self.n_batch, n_all - n_done)
            if to_borders:
                n = _core.n_batch(self._address, n_all - n_done, self.n_batch)
            if self._heads is not None and n_all - n_done > 1:
                n = min(n, n_all - n_done - 1)  # the last token alone
            if look is not None:
                n = min(n, max(0, look_from - n_done) + MOST_DRAFTS)  # or the logits of a batch take much memory
            batch = tokens[n_done : n_done + n]

            self._check_devices()
            n_tokens = len(batch)
            drafts = self.draft_model is not None and n_all <= MOST_DRAFTS
            every = self._logits_all or drafts
            self._batch.set_batch(batch=batch, n_past=n_past, logits_all=every)
            begin = (
                n_tokens if look is None else min(max(0, look_from - n_done), n_tokens)
            )  # of those that are looked at
            for i in range(begin, n_tokens):
                self._batch.batch.logits[i] = True
            self._with_logits = range(0)  # what llama.cpp holds after a batch that was ended is of no use
            try:
                self._decode(n_tokens)
            except BaseException:
                self._keep_whole(batch)
                raise

            first = 0 if every else min(begin, n_tokens - 1)
            self._with_logits = range(n_past + first, n_past + n_tokens)
            if look is not None and begin < n_tokens:
                rows = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(n_tokens - first, self._n_vocab))
                look(n_done + begin, rows[begin - first :])
            self._note_read(batch)
            self._requires_eval = False
            n_done += n_tokens
            if self.progress is not None and n_all > self.n_batch:
                self.progress(n_done, n_all)

    def _keep_whole(self, batch: Sequence[int]) -> None:
        """After a batch that failed or was ended: llama.cpp has removed the ubatch that it was at, and holds those before it."""
        self._requires_eval = True
        llama_cpp.llama_synchronize(self._ctx.ctx)  # other devices may compute on
        if self._is_recurrent or self._is_hybrid:  # a state that was half computed cannot go back
            self.reset()
            return
        n_whole = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self._ctx.ctx), 0) + 1 - self.n_tokens
        self._note_read(batch[: max(0, n_whole)])

    def _note_read(self, tokens: Sequence[int]) -> None:
        """The context holds these now: the batch that was computed, or its beginning."""
        n_past, end = self.n_tokens, self.n_tokens + len(tokens)
        self.input_ids[n_past:end] = tokens
        if self._logits_all and tokens:
            logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(tokens) * self._n_vocab,))
            self.scores[n_past:end, :].reshape(-1)[:] = logits
            self._first_scored = min(self._first_scored, n_past)
            self._end_of_scores = max(self._end_of_scores, end)
        self.n_tokens = end

    #
    # sampling
    #

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """See `llama_cpp.Llama.generate`.

        What `stopping_criteria`, `logits_processor` and the draft model raise reaches the caller.

        Raises:
            PromptError: the text is empty, does not fit into n_ctx, or holds a token that the model does not know; or what it has
                in common with the context ends within a chunk that was loaded.
            ConfigError: an option or the grammar cannot work, or the draft model returns what are no tokens.
        """
        arguments = _arguments(llama_cpp.Llama.generate, self, tokens, *args, **kwargs)
        tokens = completion.token_ids(arguments.pop("tokens"))
        reset = arguments.pop("reset", True)
        criteria = sampling.stopping(arguments.pop("stopping_criteria", None))
        if not tokens:
            raise PromptError("the prompt is empty: give at least one token")
        self._check_vocabulary(tokens)
        if reset and len(tokens) > self._n_ctx:
            raise self._too_long("the prompt", len(tokens))
        sampler = self._sampler_of(sampling.SamplingOptions(**arguments), self._seed)
        return self._generate(tokens, sampler, reset, criteria)

    def _sampler_of(self, options: sampling.SamplingOptions, seed: int) -> sampling.Sampler:
        if self._ctx.memory is None:
            raise ModelError(
                f"{self.model_path}: no text can be generated: the model has no KV cache, or was opened with vocab_only"
            )
        return sampling.Sampler(self._model, options, seed, self.last_n_tokens_size)

    def _generate(
        self,
        tokens: list[int],
        sampler: sampling.Sampler,
        reset: bool,
        stopping_criteria: Callable[[npt.NDArray[np.intc], npt.NDArray[np.float32]], bool] | None,
    ) -> Generator[int, Sequence[int] | None, None]:
        """As `llama_cpp.Llama.generate`, whose sampler stays in the object when the caller stops."""
        with sampler:
            tokens = self._reuse(tokens) if reset else list(tokens)
            n_sampled = self.n_tokens + len(tokens)  # the next token is the one after so many
            begins = True
            while True:
                if not begins and self.n_tokens != n_sampled - 1:
                    raise MesaError("the context was changed while a text was generated: begin that text again")
                begins = False
                self.eval(tokens)
                while n_sampled <= self.n_tokens:
                    token = self._sample(sampler, n_sampled - 1)
                    if stopping_criteria is not None and stopping_criteria(
                        self.input_ids[:n_sampled], self._get_logits(n_sampled - 1)
                    ):
                        return
                    more = yield token
                    tokens = [token, *(more or ())]
                    n_sampled += 1
                    # another one than was drafted
                    if n_sampled <= self.n_tokens and token != self.input_ids[n_sampled - 1]:
                        self.n_tokens = n_sampled - 1
                        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
                        self._requires_eval = True
                        break
                if self.draft_model is not None:
                    tokens.extend(self._drafts(self.draft_model, tokens))

    def _reuse(self, tokens: list[int]) -> list[int]:
        """Forget what the context holds beyond its common beginning with tokens -> those that are still to be read."""
        n_past = self.n_tokens
        n_common = min(n_past, len(tokens))
        different = np.flatnonzero(self.input_ids[:n_common] != np.asarray(tokens[:n_common], np.intc))
        n_common = int(different[0]) if len(different) else n_common
        if n_common == len(tokens):
            if n_past == len(tokens) and not self._requires_eval:
                return []
            n_common -= 1  # read again, for its logits
        for chunk in self.loaded_chunks():
            if chunk[0] < n_common < chunk[1]:
                raise self._inside_loaded(n_common, chunk)
        if n_common > 0 and self._ctx.kv_cache_seq_rm(-1, n_common, -1):
            self.n_tokens = n_common
            self._requires_eval = True
            return tokens[n_common:]
        self.reset()
        return tokens

    def _drafts(self, draft_model: LlamaDraftModel, tokens: list[int]) -> list[int]:
        """What the draft model expects after the tokens that come next, as far as n_ctx reaches."""
        n_total = self.n_tokens + len(tokens)
        if n_total >= self._n_ctx:
            return []
        self.input_ids[self.n_tokens : n_total] = tokens
        drafts = np.asarray(draft_model(self.input_ids[:n_total]))
        with np.errstate(invalid="ignore"):
            numbers = drafts.ndim == 1 and drafts.dtype.kind in "iuf" and np.array_equal(drafts, drafts.astype(int))
        if drafts.size and not numbers:
            what = " ".join(repr(drafts).split())
            raise ConfigError(f"draft_model returned {what:.80}: it must return an array of tokens, in one dimension")
        drafted = [int(token) for token in drafts.reshape(-1)[: self._n_ctx - n_total]]
        bad = next((token for token in drafted if not 0 <= token < self._n_vocab), None)
        if bad is not None:
            raise ConfigError(
                f"draft_model returned token {bad}, which is not in the model's vocabulary of {self._n_vocab} tokens"
            )
        return drafted

    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        """A token to follow those in the context; see `llama_cpp.Llama.sample`. A token whose logits llama.cpp no longer has is read
        again.

        The sampler is this call's own: a grammar begins at its root, and a seed gives the same random number each time. `generate`
        goes on with one.

        Args:
            idx: sample what follows this token, not the last one. What comes after it is forgotten if it has to be read again.

        Raises:
            PromptError: idx is no token that was read.
            ConfigError: an option or the grammar cannot work.
            MesaError: no token is left.
        """
        options = sampling.SamplingOptions(**_arguments(llama_cpp.Llama.sample, self, *args, **kwargs))
        last = self.n_tokens - 1 if idx is None else sampling.whole("idx", idx)
        if not 0 <= last < self.n_tokens:
            raise PromptError(f"there is no token {last} to sample after: {self.n_tokens} were read")
        with self._sampler_of(options, self._seed) as sampler:
            return self._sample(sampler, last)

    def _sample(self, sampler: sampling.Sampler, last: int) -> int:
        return sampler.sample(self._get_logits(last), self.input_ids[: last + 1])

    def _get_logits(self, token: int) -> npt.NDArray[np.single]:
        """The logits of a token that was read, [n_vocab], a view that the next batch changes; those after it are forgotten if llama.cpp
        no longer has them."""
        if self.n_tokens != self._with_logits.stop or token not in self._with_logits:
            # a state was loaded or tokens were forgotten since, or drafts came in several batches; llama.cpp aborts, or takes another
            # token's row
            if any(start <= token < end for start, end in self.loaded_chunks()):
                raise PromptError(
                    f"there are no logits of token {token}, which lies in a chunk that was loaded: read at least one token after it"
                )
            self.n_tokens = token
            self.eval([int(self.input_ids[token])])
        row = self._ctx.get_logits_ith(token - self.n_tokens)
        if not row:
            raise MesaError(f"{self.model_path}: llama.cpp holds no logits of token {token}")
        return np.ctypeslib.as_array(row, shape=(self._n_vocab,))

    @property
    def eval_logits(self) -> deque[list[float]]:
        """Logits of the tokens read; without logits_all, of the last one."""
        if self._logits_all:
            return deque(self.scores[: self.n_tokens].tolist(), maxlen=self._n_ctx)
        return deque([self._get_logits(self.n_tokens - 1).tolist()] if self.n_tokens > 0 else [], maxlen=1)

    def set_seed(self, seed: int) -> None:
        """See `llama_cpp.Llama.set_seed`."""
        super().set_seed(sampling.whole("seed", seed))

    def set_cache(self, cache: Any) -> None:
        """See `llama_cpp.Llama.set_cache`.

        Raises:
            ConfigError: it is no cache.
        """
        names = ("__getitem__", "__setitem__", "__contains__")
        if cache is not None and (isinstance(cache, dict) or not all(hasattr(cache, name) for name in names)):
            raise ConfigError(f"cache is {cache!r}: it must be a LlamaRAMCache, a LlamaDiskCache or the like")
        super().set_cache(cache)

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        # under create_completion and create_chat_completion
        return completion.create(self, **_arguments(llama_cpp.Llama._create_completion, self, *args, **kwargs))

    def create_chat_completion(self, messages: list[Any], *args: Any, **kwargs: Any) -> Any:
        """See `llama_cpp.Llama.create_chat_completion`.

        A message's content may be a list of text parts; they are joined by line breaks. response_format may be OpenAI's "json_schema".
        A text that spells a control token, such as ``<|im_end|>``, stays text.

        Raises:
            PromptError: the messages are none, or the model's chat template refuses them.
            ConfigError: an option cannot work.
        """
        arguments = _arguments(llama_cpp.Llama.create_chat_completion, self, messages, *args, **kwargs)
        return super().create_chat_completion(**chat.check(self, arguments))

    #
    # attention
    #

    def enable_attention(self, layers: int | Sequence[int] = 8, heads: Heads = "mean") -> list[int]:
        """From now on `attention` tells what the last token attended to. Texts are then read with their last token alone.

        Args:
            layers: at most this many, evenly of those between 40 and 80 % of the model's depth, and where there are fewer the nearest
                beside them; or their numbers. Only layers that see everything, not those with a sliding window.
            heads: the mean of a layer's heads, or the maximum over them, for each key; or "all" of them.

        Returns:
            the numbers of the layers.

        Raises:
            ConfigError: Mesa is off, or there is no such layer.
            OutOfMemoryError: there is too little memory for it.
        """
        if not self.mesa.enabled:
            raise ConfigError("Mesa is off, and stock llama.cpp does not tell attention", Remedy("enabled", True))
        if not isinstance(heads, str) or heads not in _KINDS:
            raise ConfigError(f'heads is {heads!r}: it must be "mean", "max" or "all"')
        numbers = completion.whole_numbers(layers)
        n_most = layers if isinstance(layers, int) and not isinstance(layers, bool) else len(numbers or ())
        if not 1 <= n_most < 2**31 or not all(abs(number) < 2**31 for number in numbers or ()):
            raise ConfigError(f"layers is {layers!r}: it must be a number of layers, 1 or more, or a list of them")
        self._check_devices()
        address = self._address
        try:
            chosen = _core.attention_enable(address, numbers, n_most, _KINDS[heads])
        except ValueError as err:
            raise _no_layers(str(err)) from None
        self._heads, self._attended = heads, chosen
        return chosen

    def disable_attention(self) -> None:
        """`attention` is off again, as it is in the beginning, and costs nothing."""
        if self._heads is not None:
            self._check_devices()
            _core.attention_enable(self._address, None, 0, _core.ATTENTION_MEAN)
            self._heads = None

    def attention(self) -> npt.NDArray[np.float32]:
        """What the last token that was read attended to: the weights after the softmax, [layer, token], the token itself included;
        with heads="all" [layer, head, token].

        In each row they add up to 1, but for the mass of attention sinks that are no tokens, and with heads="max".

        Raises:
            MesaError: it is off, or nothing was read since it is on, or since the context was rolled back.
            DeviceError: an RPC server has gone away.
        """
        if self._heads is None:
            raise MesaError("attention is off: call enable_attention() before the token is read")
        self._check_devices()
        try:
            weights = _core.attention(self._address)
        except RuntimeError as err:
            raise MesaError(str(err)) from None
        if weights.shape[-1] != self.n_tokens:  # which llama.cpp does not know before the next batch
            raise MesaError(
                f"the context was rolled back to {self.n_tokens} tokens: what the last of them attended to is not known"
            )
        return weights if self._heads == "all" else weights[:, 0]

    #
    # reading less
    #

    def read_ranges(self) -> list[tuple[int, int]] | None:
        """What the last token that was read could attend to, as ranges of tokens (first, one after the last); None: everything before it.

        Less is read with `MesaConfig.read_budget`, or by `set_read_ranges`.
        """
        if not self.mesa.enabled:
            return None
        self._check_devices()
        return _core.read_ranges(self._address) or None

    def set_read_ranges(self, ranges: Sequence[tuple[int, int]] | None) -> None:
        """Choose which of the tokens in the context those that are generated attend to; later ones are read anyhow.

        Holds until it is called again, or some of those tokens are removed from the context.

        Args:
            ranges: tokens (first, one after the last), in order; None: as `MesaConfig.read_budget` has it.

        Raises:
            ConfigError: Mesa is off, the method is another one, or the ranges are out of order.
        """
        if not self.mesa.enabled:
            raise ConfigError("Mesa is off, and stock llama.cpp reads everything", Remedy("enabled", True))
        self._check_devices()
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        try:
            _core.set_read_ranges(self._address, None if ranges is None else [(int(a), int(b)) for a, b in ranges])
        except ValueError as err:
            raise ConfigError(str(err)) from None

    #
    # chunks that are kept
    #

    def _check_keeps_chunks(self) -> None:
        if not self.mesa.enabled:
            raise ConfigError("Mesa is off, and stock llama.cpp keeps no chunks", Remedy("enabled", True))
        if self.mesa.method not in ("mesa", "mesa-exact"):
            raise ConfigError(f"the method {self.mesa.method} keeps no chunks", Remedy("method", "mesa"))
        if self.mesa.plan is not None:
            raise ConfigError(
                "chunks are kept where plans follow from the text, and a plan was made by hand", Remedy("plan")
            )
        if llama_cpp.llama_model_n_swa(self.model) > 0 and not self.context_params.swa_full:
            raise ConfigError(
                "a cache that forgets what left the sliding window keeps no chunks", Remedy("swa_full", True)
            )

    def save_chunk(self, start: int, stop: int) -> bytes:
        """The keys and values of tokens start ... stop - 1, to be loaded again behind the same first chunk, in any text.

        They must have been read plainly: the first chunk alone, then this chunk behind it, within the trained length; what is
        in front of start is their first chunk. From 0 on it is the first chunk itself that is kept. A chunk that was loaded can
        be saved as long as nothing was read behind it.

        Raises:
            ConfigError: Mesa is off, or has a method or options that keep no chunks.
            PromptError: these tokens are not in the context, or not as they were read: their keys have moved since.
            DeviceError: an RPC server has gone away.
        """
        self._check_devices()
        self._check_keeps_chunks()
        if not 0 <= start < stop <= self.n_tokens:
            raise PromptError(f"no chunk can be kept from token {start} to {stop}: {self.n_tokens} are in the context")
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        try:
            return _core.chunk_save(self._address, start, stop, bytes.fromhex(self._origin))
        except ValueError as err:
            raise PromptError(str(err)) from None

    def load_chunk(self, tokens: Sequence[int], data: bytes | bytearray | memoryview) -> None:
        """Put a chunk behind the ones in the context, as if Mesa had read it: chunks in any order, behind the first chunk that
        they were read behind. `generate` and `eval` go on from there, and at least one token must be read before anything is
        sampled. The trained length bounds the first chunk and one chunk together, not the text.

        In layers with a sliding window the windows of its tokens end at the chunk's start, and do not reach the chunk in front of it.

        Args:
            tokens: of the chunk.
            data: what `save_chunk` returned for them.

        Raises:
            MesaError: the data are damaged, or of another model, adapter, RoPE options, KV type, first chunk or other tokens.
            PromptError: no chunk can follow here, or the text does not fit into n_ctx.
            ConfigError: Mesa is off, or has a method or options that keep no chunks; or no plan fits (a fixed stair_width).
            DeviceError: an RPC server has gone away.
            In each case the context is as before.
        """
        self._check_devices()
        self._check_interrupt()
        self._check_keeps_chunks()
        tokens = list(tokens)
        if not tokens:
            raise PromptError("a chunk of no tokens cannot be loaded")
        self._check(tokens)
        view, origin = memoryview(data).cast("B"), bytes.fromhex(self._origin)
        if view[: len(origin)] != origin:
            raise MesaError(
                "the chunk cannot be loaded: it was saved with another model file, adapter or RoPE options, or is damaged"
            )
        n_past, end = self.n_tokens, self.n_tokens + len(tokens)
        self._ctx.kv_cache_seq_rm(-1, n_past, -1)
        try:
            _core.chunk_load(self._address, np.asarray(tokens, np.int32), view[len(origin) :])
        except ValueError as err:
            raise PromptError(str(err)) from None
        except RuntimeError as err:
            raise MesaError(str(err)) from None
        self.input_ids[n_past:end] = tokens
        if self._logits_all:
            self.scores[n_past:end] = 0.0
        self.n_tokens = end
        self._with_logits = range(0)
        self._requires_eval = True

    def chunk_values_at(self, n_tokens: int, n_layers: int) -> list[tuple[int, int]]:
        """Where the values of its tokens lie in the bytes of a chunk: offset and size in bytes, for each of the last n_layers layers that keep some,
        the last layer first.

        Args:
            n_tokens: of the chunk.

        Raises:
            ConfigError: Mesa is off, or has a method or options that keep no chunks.
        """
        self._check_keeps_chunks()
        n_origin = len(bytes.fromhex(self._origin))
        return [(n_origin + offset, size) for offset, size in _core.chunk_values_at(self._address, n_tokens, n_layers)]

    def chunk_values(
        self, data: bytes | bytearray | memoryview, n_tokens: int, n_layers: int
    ) -> npt.NDArray[np.float32]:
        """The values that a chunk's bytes hold of its tokens, of the layers that `chunk_values_at` tells [n_tokens, width]. The context stays as it is.

        Nothing but the size of the bytes is checked, so that a part of a large file can be read.

        Args:
            data: those bytes, one layer's behind the other's.

        Raises:
            PromptError: they have another size.
            ConfigError: Mesa is off, or has a method or options that keep no chunks.
        """
        self._check_keeps_chunks()
        try:
            return _core.chunk_values(self._address, data, n_tokens, n_layers)
        except ValueError as err:
            raise PromptError(str(err)) from None

    @functools.cached_property
    def chunk_origin(self) -> str:
        """What kept chunks depend on besides their tokens and their first chunk's: model file, adapter, RoPE options, KV types."""
        types = (self.context_params.type_k, self.context_params.type_v)
        return hashlib.sha256(repr((self._origin, types)).encode()).hexdigest()

    def chunk_size(self, n_tokens: int) -> int:
        """Bytes that `save_chunk` returns for a chunk of n_tokens tokens."""
        self._check_keeps_chunks()
        if n_tokens < 1:
            raise PromptError(f"a chunk of {n_tokens} tokens cannot be kept")
        return len(bytes.fromhex(self._origin)) + _core.chunk_size(self._address, n_tokens)

    def loaded_chunks(self) -> list[tuple[int, int]]:
        """The chunks in the context that were loaded behind the first chunk: of each its first token and the one after its last."""
        return _core.loaded_chunks(self._address) if self._params is not None else []

    def _inside_loaded(self, n_tokens: int, chunk: tuple[int, int]) -> PromptError:
        return PromptError(
            f"token {n_tokens} lies in a chunk that was loaded ({chunk[0]} to {chunk[1]}), which cannot go on from its middle: "
            f"set n_tokens to {chunk[0]} or to the start of a chunk before it, call reset(), or read at least one token after it"
        )

    #
    # state
    #

    @functools.cached_property
    def _origin(self) -> str:
        """What keys and values depend on besides the tokens and the plan."""
        p = self.context_params
        rope = (p.rope_scaling_type, p.rope_freq_base, p.rope_freq_scale, p.yarn_ext_factor, p.yarn_attn_factor)
        yarn = (p.yarn_beta_fast, p.yarn_beta_slow, p.yarn_orig_ctx, self._n_ctx if self._has_long_factors else 0)
        lora = (fingerprint(Path(self.lora_path)), self.lora_scale) if self.lora_path is not None else None
        model = fingerprint(Path(self.model_path))
        return hashlib.sha256(repr((model, lora, rope, yarn, self.kv_overrides)).encode()).hexdigest()

    def save_state(self) -> MesaState:
        """A copy of the context's state, to go on from later; see `llama_cpp.Llama.save_state`.

        It holds the tokens read, their keys and values, the plan, and with logits_all their logits; nothing of what n_ctx has room for
        besides.

        Raises:
            DeviceError: an RPC server has gone away.
        """
        self._check_devices()
        n_tokens = self.n_tokens
        size = llama_cpp.llama_state_get_size(self._ctx.ctx)
        data = np.empty(size, np.uint8)
        n_bytes = llama_cpp.llama_state_get_data(self._ctx.ctx, _bytes_at(data), size)
        if n_bytes < 1:
            raise RuntimeError("llama.cpp failed to save the state; verbose=True shows its reason")
        first = self._first_scored if self._logits_all else n_tokens
        state = LlamaState(
            input_ids=self.input_ids[:n_tokens].copy(),
            scores=self.scores[first:n_tokens].copy(),
            n_tokens=n_tokens,
            llama_state=data[:n_bytes].tobytes(),
            llama_state_size=n_bytes,
            seed=self._seed,
        )
        return MesaState(state, self._origin)

    def load_state(self, state: LlamaState) -> None:
        """Continue from a state that `save_state` returned; see `llama_cpp.Llama.load_state`.

        Logits of its last token are not part of a state: that token is read again where they are asked for. With logits_all, scores has
        those of the tokens whose logits the state holds, and 0 for others.

        Raises:
            MesaError: the state is damaged, or of another model or configuration, or does not fit into n_ctx. The context
                is as before, or empty if llama.cpp has seen the state by then.
            DeviceError: an RPC server has gone away.
        """
        self._check_devices()
        if isinstance(state, MesaState):
            state.check(self._origin)
        n_tokens = state.n_tokens
        if not 0 <= n_tokens <= self._n_ctx:
            raise MesaError(f"the state cannot be loaded: it holds {n_tokens} tokens, n_ctx is {self._n_ctx}")
        if len(state.input_ids) < n_tokens:
            raise MesaError(f"the state cannot be loaded: it holds {n_tokens} tokens and names {len(state.input_ids)}")
        n_bytes = len(state.llama_state)
        if n_bytes < 1 or (not isinstance(state, MesaState) and n_bytes != state.llama_state_size):
            raise MesaError("the state cannot be loaded: it is cut short or empty")
        rows = min(len(state.scores), n_tokens) if self._logits_all else 0
        if rows < n_tokens and not isinstance(state, MesaState):
            rows = 0  # `Llama` has rows for all tokens, or rows of nothing
        if rows > 0 and state.scores.shape[1] != self._n_vocab:
            raise MesaError(
                f"the state cannot be loaded: it is of a model with {state.scores.shape[1]} tokens of vocabulary"
            )

        _core.clear_error()
        self._with_logits = range(0)
        data = np.frombuffer(state.llama_state, np.uint8)
        if llama_cpp.llama_state_set_data(self._ctx.ctx, _bytes_at(data), n_bytes) != n_bytes:
            # llama.cpp may have emptied the cache on its way
            self._ctx.kv_cache_clear()
            self.reset()
            reason = _core.last_error() or "it is damaged, or of another model, KV type or configuration"
            raise MesaError(f"the state cannot be loaded: {reason}")
        n_cells = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self._ctx.ctx), 0) + 1
        if n_cells < n_tokens:  # more is what a roll-back leaves
            self._ctx.kv_cache_clear()
            self.reset()
            raise MesaError(
                f"the state cannot be loaded: it is damaged, its KV data end after {n_cells} of {n_tokens} tokens"
            )

        first = n_tokens - rows
        if self._logits_all:
            # note: rows that were never written are zeros that take no memory; writing zeros there would
            self.scores[: min(first, self._end_of_scores)] = 0.0
            self.scores[n_tokens : self._end_of_scores] = 0.0
            self.scores[first:n_tokens] = state.scores[:rows]
            self._first_scored, self._end_of_scores = first, n_tokens
        self.input_ids[:n_tokens] = state.input_ids[:n_tokens]
        self.n_tokens = n_tokens
        self._requires_eval = True
        self._seed = state.seed

    #
    # embeddings
    #

    def pooling_type(self) -> int:  # type: ignore[override]  # llama_cpp says str, and gives an int
        """How embed() makes one vector of those of a text's tokens: a LLAMA_POOLING_TYPE."""
        return self._pooling_type if self._embeds else int(super().pooling_type())

    def embed(
        self, input: str | list[str], normalize: bool = False, truncate: bool = True, return_count: bool = False
    ) -> Any:
        """See `llama_cpp.Llama.embed`; `create_embedding` is by it.

        The texts are read one after the other, each as eval() reads it, in chunks where it is longer than the trained length; what was
        in the context before is forgotten. The longest text has n_ctx tokens (of `Llama`: n_batch); truncate cuts there.

        Raises:
            ConfigError: the model was loaded without embedding=True.
            PromptError: a text is empty, or too long and not to be truncated.
            DeviceError: an RPC server has gone away.
        """
        if not self.context_params.embeddings:
            raise ConfigError("this model was loaded for completion, not to embed", Remedy("embedding", True))
        limit = ("n_ctx", self._n_ctx) if self._embeds else ("n_batch", self.n_batch)
        texts = [
            self.tokenize(embedding.encode(text)) for text in (input if isinstance(input, (list, tuple)) else [input])
        ]
        texts = [embedding.fit(tokens, *limit, truncate) for tokens in texts]
        vectors = []
        try:
            if not self.mesa.enabled and texts:  # without, `Llama` decodes an empty batch
                with self._watch():
                    return super().embed(input, normalize, truncate, return_count)
            with embedding.collect(self._ctx, llama_cpp.llama_model_n_embd_out(self.model)) as batches:
                for tokens in texts:
                    self._forget()
                    self.eval(tokens)
                    vectors.append(embedding.pool(np.concatenate(batches), self._pooling_type, normalize))
                    batches.clear()
        finally:
            self._forget()
        output = vectors[0] if isinstance(input, str) else vectors
        return (output, sum(map(len, texts))) if return_count else output

    def _forget(self) -> None:
        """Empty the context."""
        # note: without the data, which may be on a server that has gone away
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._ctx.ctx), False)
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **self._init_args}  # type: ignore[no-untyped-call]


def _threads(options: dict[str, Any]) -> dict[str, int | None]:
    """The numbers of threads that the caller has chosen; None: by the machine, as is 0 in `Llama`."""
    threads = {name: options.get(name) or None for name in ("n_threads", "n_threads_batch")}
    for name, value in threads.items():
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= machine.MAX_THREADS:
            raise ConfigError(
                f"{name} is {value!r}: it must be a number of threads, 1 to {machine.MAX_THREADS}, or None"
            )
    return threads


def _check_config(mesa: object) -> None:
    if not isinstance(mesa, MesaConfig):
        raise ConfigError(f"mesa is of the type {type(mesa).__name__}: it must be a MesaConfig")


def _address(pointer: Any) -> int:
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


def _bytes_at(data: npt.NDArray[np.uint8]) -> Any:
    """The pointer that llama.cpp takes."""
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _arguments(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a method of `llama_cpp.Llama` by their names, without self."""
    arguments = _signature(function).bind(*args, **kwargs).arguments
    del arguments["self"]
    return arguments


def _no_layers(why: str) -> MesaError:
    """Layers are refused, or there is no memory for what they tell."""
    return (OutOfMemoryError if "memory" in why else ConfigError)(why)


def _validate(plan: MesaPlan, params: _core.Params, n_tokens: int) -> None:
    try:
        plan._plan.validate(params, n_tokens)
    except ValueError as err:
        raise ConfigError(str(err)) from None
