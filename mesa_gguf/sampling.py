"""How the next token is chosen: options that are checked, and llama.cpp's samplers behind the caller's own functions."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import LogitsProcessorList, StoppingCriteriaList
from llama_cpp._internals import LlamaModel, LlamaSampler

from . import _core, grammar
from .errors import ConfigError, MesaError, ModelError

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.intc]
Processor = Callable[[Tokens, Logits], Logits]

LARGEST = float(np.finfo(np.float32).max)
CERTAIN = 1e30  # a logit that leaves no probability to others, and with another one added is still a number
COLDEST = (
    1e-6  # below, logits divided by the temperature may not be finite: the most likely token has all the probability
)
MIROSTAT_M = 100  # tokens that Mirostat estimates from, as in llama_cpp.Llama
# the rule for characters that llama-cpp-python makes of any schema with texts: line breaks are among them, which JSON does not have.
# note: call0- and so on are put before it where a grammar is made of those of several functions
_ANY_CHAR = re.compile(r'^((?:call[0-9]+-)?)char ::= \[\^"\\\\\] \| ', re.MULTILINE)
_JSON_CHAR = r'char ::= [^"\\\x7F\x00-\x1F] | '


@dataclass(frozen=True)
class SamplingOptions:
    """The arguments of `llama_cpp.Llama.sample`, in its order; tfs_z and penalize_nl do nothing, as there.

    Raises:
        ConfigError: one of them cannot work; names it.
    """

    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    temp: float = 0.80
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    tfs_z: float = 1.0
    mirostat_mode: int = 0
    mirostat_eta: float = 0.1
    mirostat_tau: float = 5.0
    penalize_nl: bool = True
    logits_processor: Any = None
    grammar: Any = None
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        whole("top_k", self.top_k, "40; 0 takes all tokens")
        if self.mirostat_mode not in (0, 1, 2):
            raise ConfigError(f"mirostat_mode is {self.mirostat_mode!r}: it must be 0 (off), 1 or 2")
        for name in ("top_p", "min_p", "typical_p", "temp", "mirostat_tau"):
            if _finite(name, getattr(self, name)) < 0:
                raise ConfigError(f"{name}{_also(name)} is {getattr(self, name)!r}: it must be 0 or more")
        for name in ("frequency_penalty", "presence_penalty", "mirostat_eta"):
            _finite(name, getattr(self, name))
        if np.float32(_finite("repeat_penalty", self.repeat_penalty)) <= 0:
            raise ConfigError(f"repeat_penalty is {self.repeat_penalty!r}: it must be more than 0; 1 is no penalty")
        if self.grammar is not None:
            grammar.check(self.grammar)


OPTIONS = tuple(field.name for field in fields(SamplingOptions))


class Sampler:
    """Chooses tokens one after another; a grammar goes forward with each.

    Before llama.cpp's samplers come the caller's `logits_processor` and `logit_bias`, in Python: what they raise reaches the caller,
    which it would not out of a callback of llama.cpp.

    Args:
        model: whose vocabulary a grammar is for.
        options: see there.
        seed: of the random numbers.
        n_penalized: how many of the last tokens repetition penalties look at.

    Raises:
        ConfigError: logit_bias, logits_processor or the grammar cannot be used with this model.
    """

    def __init__(self, model: LlamaModel, options: SamplingOptions, seed: Any, n_penalized: Any) -> None:
        self.n_vocab: int = model.n_vocab()
        self._processors = _processors(options.logits_processor)
        self._biased, self._biases = _biases(options.logit_bias, self.n_vocab)
        self._reach = 100.0 if options.typical_p < 1 else math.inf
        seed = whole("seed", seed) & 0xFFFFFFFF
        n_penalized = min(max(whole("last_n_tokens_size", n_penalized, "64"), 0), 2**20)

        self._constraints = LlamaSampler()
        self._constraints.add_penalties(
            self.n_vocab, n_penalized, options.repeat_penalty, options.frequency_penalty, options.presence_penalty
        )
        if options.grammar is not None:
            _add_grammar(self._constraints, model, options.grammar)

        self._selection = LlamaSampler()
        if options.temp < COLDEST:
            self._selection.add_greedy()
        elif options.mirostat_mode == 1:
            self._selection.add_mirostat(self.n_vocab, seed, options.mirostat_tau, options.mirostat_eta, MIROSTAT_M)
        elif options.mirostat_mode == 2:
            self._selection.add_mirostat_v2(seed, options.mirostat_tau, options.mirostat_eta)
        else:
            self._selection.add_top_k(min(max(options.top_k, 0), self.n_vocab))
            self._selection.add_typical(options.typical_p)
            self._selection.add_top_p(options.top_p)
            self._selection.add_min_p(options.min_p)
            self._selection.add_temp(options.temp)
            self._selection.add_dist(seed)

    def sample(self, logits: Logits, tokens: Tokens) -> int:
        """The next token, given the logits [n_vocab] that follow the tokens.

        Raises:
            MesaError: no token is left, or the logits are not numbers.
        """
        if self._processors or len(self._biased):
            logits = self._process(logits, tokens)
        try:
            return _core.sample(_address(self._constraints), _address(self._selection), logits, self._reach)
        except (RuntimeError, ValueError) as err:
            raise MesaError(
                f"no token can be sampled: {err}; the grammar, logit_bias and logits_processor may exclude one another, or the vocabulary "
                "may lack what the grammar wants"
            ) from None

    def _process(self, logits: Logits, tokens: Tokens) -> Logits:
        logits = logits.copy()
        for processor in self._processors:
            result = processor(tokens, logits)
            name = getattr(processor, "__name__", type(processor).__name__)
            try:
                logits = np.asarray(result, np.float32)
            except (TypeError, ValueError):
                raise ConfigError(
                    f"logits_processor {name} returned {type(result).__name__}: it must return the {self.n_vocab} logits"
                ) from None
            if result is None or logits.shape != (self.n_vocab,):
                what = None if result is None else f"an array of shape {logits.shape}"
                raise ConfigError(f"logits_processor {name} returned {what}: it must return the {self.n_vocab} logits")
            if np.isnan(logits).any():
                raise ConfigError(f"logits_processor {name} returned logits that are not numbers (NaN)")
        if len(self._biased):
            logits = logits.copy()  # it may be the caller's array
            logits[self._biased] += self._biases
        return logits

    def close(self) -> None:
        self._constraints.close()
        self._selection.close()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def whole(name: str, value: Any, example: str = "") -> int:
    """value, if it is a whole number.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ConfigError(f"{name} is {value!r}: it must be a whole number" + (f" ({example})" if example else ""))
    return int(value)


def stopping(criteria: Any) -> Callable[[Tokens, Logits], bool] | None:
    """stopping_criteria as one function."""
    if criteria is None:
        return None
    if callable(criteria):
        return cast(Callable[[Tokens, Logits], bool], criteria)
    if isinstance(criteria, Iterable):
        functions = list(criteria)
        if all(callable(function) for function in functions):
            return StoppingCriteriaList(functions)
    raise ConfigError(
        f"stopping_criteria is {criteria!r}: it must be a function of (tokens, logits), or a list of them"
    )


def _processors(processors: Any) -> list[Processor]:
    if processors is None:
        return []
    if callable(processors) and not isinstance(processors, LogitsProcessorList):
        return [processors]
    if isinstance(processors, Iterable):
        functions = list(processors)
        if all(callable(function) for function in functions):
            return functions
    raise ConfigError(
        f"logits_processor is {processors!r}: it must be a function of (tokens, logits), or a list of them"
    )


def _biases(biases: Any, n_vocab: int) -> tuple[npt.NDArray[np.intp], Logits]:
    """logit_bias as tokens and what is added to their logits; keys may be text, as in JSON."""
    if biases is None:
        biases = {}
    if not isinstance(biases, Mapping):
        raise ConfigError(f"logit_bias is {biases!r}: it must map tokens to what is added to their logits")
    tokens, added = [], []
    for key, value in biases.items():
        try:
            token = int(key) if isinstance(key, str) else whole("token", key)
        except (ValueError, ConfigError):
            raise ConfigError(f"logit_bias has the key {key!r}: it must be the number of a token") from None
        if not 0 <= token < n_vocab:
            raise ConfigError(
                f"logit_bias has token {token}, which is not in the model's vocabulary of {n_vocab} tokens"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or math.isnan(value):
            raise ConfigError(f"logit_bias of token {token} is {value!r}: it must be a number")
        tokens.append(token)
        added.append(min(float(value), CERTAIN) if abs(value) <= LARGEST or value > 0 else -math.inf)
    return np.asarray(tokens, np.intp), np.asarray(added, np.float32)


def _add_grammar(chain: LlamaSampler, model: LlamaModel, gbnf: Any) -> None:
    if model.vocab_type() == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        raise ModelError("this model has no vocabulary: a grammar cannot be used with it")
    text = _ANY_CHAR.sub(lambda found: found[1] + _JSON_CHAR, gbnf._grammar)
    sampler = llama_cpp.llama_sampler_init_grammar(model.vocab, text.encode(), gbnf._root.encode())
    if not sampler:
        raise ConfigError(f"the grammar cannot be used: llama.cpp refuses it, see its message ({gbnf._grammar[:80]!r})")
    llama_cpp.llama_sampler_chain_add(chain.sampler, sampler)


def _finite(name: str, value: Any) -> float:
    """value, if llama.cpp's float can hold it."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not abs(value) <= LARGEST:
        raise ConfigError(f"{name}{_also(name)} is {value!r}: it must be a number")
    return float(value)


def _also(name: str) -> str:
    return " (temperature)" if name == "temp" else ""


def _address(sampler: LlamaSampler) -> int:
    return ctypes.cast(sampler.sampler, ctypes.c_void_p).value or 0
