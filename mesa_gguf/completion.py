"""Text from tokens: what `create_completion` and, through it, `create_chat_completion` return.

In place of `llama_cpp.Llama._create_completion`, which counts tokens too late where a character takes several of them, loses
characters at the end of a stream, and the whole text where a stopping criterion does not hold when it is asked again.
"""

from __future__ import annotations

import codecs
import contextlib
import random
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import llama_cpp
import numpy as np
from llama_cpp.llama_tokenizer import LlamaTokenizer

from .errors import ConfigError, PromptError, Remedy
from .sampling import Sampler, SamplingOptions, stopping, whole
from .text import check_text

MesaLlama: TypeAlias = Any  # that of llama.py, which is a floor above

REPLACED = "\N{REPLACEMENT CHARACTER}".encode()

Finish = Literal["stop", "length"]


@dataclass
class Request:
    """The arguments of `llama_cpp.Llama.create_completion`, checked, and the prompt's tokens."""

    llm: MesaLlama
    tokens: list[int]
    prompt: str  # its text, where that is needed
    begins: bool  # the answer is the beginning of a text
    max_tokens: int
    stop: list[bytes]
    logprobs: int | None
    echo: bool
    stream: bool
    seed: int | None
    model: str
    options: SamplingOptions
    stopping_criteria: Any
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4()}")
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, text: str, logprobs: dict[str, Any] | None, finish: Finish | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [{"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish}],
        }


def create(
    llm: MesaLlama,
    prompt: Any,
    suffix: Any = None,
    max_tokens: Any = 16,
    temperature: Any = 0.8,
    logprobs: Any = None,
    echo: bool = False,
    stop: Any = None,
    stream: bool = False,
    seed: Any = None,
    model: str | None = None,
    stopping_criteria: Any = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Check everything, then return the completion's only item, or with stream its chunks.

    Raises:
        PromptError: the prompt is no text and no tokens, empty, or leaves no room for an answer in n_ctx.
        ConfigError: an option cannot work.
    """
    sampling = SamplingOptions(temp=temperature, **options)
    limit = whole("max_tokens", -1 if max_tokens is None else max_tokens, "16; -1 goes on to the end of n_ctx")
    if logprobs is not None:
        if whole("logprobs", logprobs, "5") < 0:
            raise ConfigError(f"logprobs is {logprobs}: it must be 0 or more")
        if not llm._logits_all and echo:
            raise ConfigError(
                "this model was loaded without the logits of all tokens, which logprobs of a prompt (echo) need",
                Remedy("logits_all", True),
            )
    if seed is not None:
        whole("seed", seed)
    stops = _stops(stop)

    tokens = _prompt_tokens(llm, prompt, suffix)
    if not tokens:
        raise PromptError("the prompt is empty: give at least one token")
    llm._check_vocabulary(tokens)
    room = llm._n_ctx - len(tokens)
    if room <= 0:
        needed = len(tokens) + max(limit, 1)
        raise PromptError(
            f"the prompt has {len(tokens)} tokens, which leaves no room for an answer in n_ctx ({llm._n_ctx})",
            Remedy("n_ctx", needed, "or more"),
            needed=needed,
            available=llm._n_ctx,
        )
    request = Request(
        llm=llm,
        tokens=tokens,
        prompt=_text_of(llm, prompt) if echo or logprobs is not None else "",
        begins=isinstance(prompt, str) and not prompt,
        max_tokens=min(limit, room) if limit > 0 else room,
        stop=stops,
        logprobs=logprobs,
        echo=bool(echo),
        stream=bool(stream),
        seed=seed,
        model=model if model is not None else llm.model_path,
        options=sampling,
        stopping_criteria=stopping(stopping_criteria),
    )
    # before anything is read: it tells of a grammar that llama.cpp refuses
    sampler = llm._sampler_of(sampling, _next_seed(llm) if seed is None else seed)
    return _run(request, sampler)


def _run(request: Request, sampler: Sampler) -> Iterator[dict[str, Any]]:
    llm = request.llm
    _load_cached(llm, request.tokens)
    if llm._first_scored > 0 and request.echo and request.logprobs is not None:
        llm.reset()  # a state was loaded that does not hold the logits of all of its tokens
    if llm.verbose:
        llm._ctx.reset_timings()

    text = Text(llm, request.tokens, request.stop, strip_space=request.begins)
    logprobs = _Logprobs(request, text) if request.logprobs is not None else None
    if logprobs is not None and request.echo:
        logprobs.add_prompt()
    pieces = [request.prompt] if request.echo else []
    if request.stream and request.echo:
        yield request.answer(request.prompt, None, None)
    finish: Finish = "stop"  # also where a stopping criterion holds
    with contextlib.closing(llm._generate(request.tokens, sampler, True, request.stopping_criteria)) as generated:
        for token in generated:
            if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
                break
            row = len(request.tokens) + len(text.tokens) - 1
            piece = text.add(token)
            if logprobs is not None:
                logprobs.add(token, row)
            if piece:
                pieces.append(piece)
                if request.stream:
                    yield request.answer(piece, logprobs.take() if logprobs else None, None)
            if text.stopped:
                break
            if len(text.tokens) == request.max_tokens:
                finish = "length"
                break

    if rest := text.end():
        pieces.append(rest)
    last = logprobs.take(everything=True) if logprobs is not None else None
    if llm.verbose:
        llm._ctx.print_timings()
    if request.stream:
        if rest or (last is not None and last["tokens"]):
            yield request.answer(rest, last, None)
        yield request.answer("", None, finish)
        _save_cached(llm, request.tokens + text.tokens)
        return
    _save_cached(llm, request.tokens + text.tokens)
    yield {
        **request.answer("".join(pieces), last, finish),
        "usage": {
            "prompt_tokens": len(request.tokens),
            "completion_tokens": len(text.tokens),
            "total_tokens": len(request.tokens) + len(text.tokens),
        },
    }


class Text:
    """The text of tokens that are generated one after another, as far as it is certain: whole characters, and nothing that a stop
    string may begin with.

    Attributes:
        tokens: all of them.
        ends: for each token, bytes of text with it.
        certain: bytes of text that were returned.
        stopped: a stop string was found; the text ends before it.
    """

    def __init__(
        self, llm: MesaLlama, prompt: Sequence[int], stop: Sequence[bytes] = (), strip_space: bool = False
    ) -> None:
        self.tokens: list[int] = []
        self.ends: list[int] = []
        self.certain = 0
        self.stopped = False
        self._stop = stop
        self._strip_space = strip_space
        self._piece = _pieces(llm, prompt)
        self._pending = b""
        self._decode = codecs.getincrementaldecoder("utf-8")("ignore").decode

    def add(self, token: int) -> str:
        """Text that is certain with this token."""
        self.tokens.append(token)
        piece = self._piece(self.tokens)
        if piece and self._strip_space:
            # a text that begins with the first token that is generated: SentencePiece puts a space before it
            piece, self._strip_space = piece.removeprefix(b" "), False
        self._pending += piece
        self.ends.append(self.certain + len(self._pending))
        at = min((i for i in map(self._pending.find, self._stop) if i >= 0), default=-1)
        if at >= 0:
            self.stopped = True
            return self._take(at, final=True)
        return self._take(len(self._pending) - self._held())

    def end(self) -> str:
        """What is left when no more tokens come. A character of which bytes are missing is left out."""
        return "" if self.stopped else self._take(len(self._pending), final=True)

    def _held(self) -> int:
        """Bytes at the end that may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for n in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-n:]) for stop in self._stop):
                return n
        return 0

    def _take(self, n: int, final: bool = False) -> str:
        taken, self._pending = self._pending[:n], self._pending[n:]
        self.certain += n
        return self._decode(taken, final)


def _pieces(llm: MesaLlama, prompt: Sequence[int]) -> Callable[[list[int]], bytes]:
    """A function that returns the bytes of the last of the tokens that were generated."""
    if isinstance(llm.tokenizer_, LlamaTokenizer):
        token_bytes: Callable[[int], bytes] = llm.token_bytes
        return lambda tokens: token_bytes(tokens[-1])

    # a tokenizer whose text of a token depends on those before it, and which replaces parts of characters
    done = 0

    def piece(tokens: list[int]) -> bytes:
        nonlocal done
        text: bytes = llm.detokenize(tokens, prev_tokens=list(prompt))
        while text.endswith(REPLACED):
            text = text[: -len(REPLACED)]
        new, done = text[done:], max(done, len(text))
        return new

    return piece


class _Logprobs:
    """Log-probabilities of tokens, in OpenAI's format for completions."""

    def __init__(self, request: Request, text: Text) -> None:
        self._request = request
        self._text = text
        self._taken = 0
        self._n_prompt = 0
        self._tokens: list[dict[str, Any]] = []
        self._n_characters = 0 if request.echo else len(request.prompt)
        self._decode = codecs.getincrementaldecoder("utf-8")("ignore").decode

    def add_prompt(self) -> None:
        llm, tokens = self._request.llm, self._request.tokens
        first = 1 if tokens[0] == llm.token_bos() else 0
        self._n_prompt = len(tokens) - first
        # the prompt's logits are there when the first token is sampled
        self._tokens = [{"token": token, "row": i - 1 if i > first else None} for i, token in enumerate(tokens)][first:]

    def add(self, token: int, row: int) -> None:
        llm = self._request.llm
        # the last tokens' logits are at hand where not all are kept
        likely = None if llm._logits_all else self._likely(token, llm._get_logits(row))
        self._tokens.append({"token": token, "row": row, "likely": likely})

    def take(self, everything: bool = False) -> dict[str, Any]:
        """Of the tokens whose text became certain since."""
        n = self._n_prompt
        ends = self._text.ends
        if everything and not self._text.stopped:
            n = len(self._tokens)
        else:
            begins = [0, *ends]
            n += sum(begin < self._text.certain for begin, _ in zip(begins, ends))
        taken = self._tokens[self._taken : max(n, self._taken)]
        self._taken = max(n, self._taken)
        result: dict[str, Any] = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
        for entry in taken:
            self._describe(entry["token"], entry["row"], entry.get("likely"), result)
        return result

    def _describe(
        self, token: int, row: int | None, likely: tuple[float, dict[str, float]] | None, result: dict[str, Any]
    ) -> None:
        llm = self._request.llm
        piece = llm.detokenize([token])
        result["tokens"].append(piece.decode(errors="ignore"))
        result["text_offset"].append(self._n_characters)
        self._n_characters += len(self._decode(piece))
        if likely is None and row is not None:
            likely = self._likely(token, llm.scores[row])
        logprob, top = likely if likely is not None else (None, None)
        result["token_logprobs"].append(logprob)
        result["top_logprobs"].append(top)

    def _likely(self, token: int, logits: Any) -> tuple[float, dict[str, float]]:
        """The log-probability of a token, and those of the most likely ones and itself by their texts."""
        llm = self._request.llm
        logprob, likeliest = logprobs_of(llm, token, logits, self._request.logprobs or 0)
        top: dict[str, float] = {}
        for other, its in [*likeliest, (token, logprob)]:
            text = llm.detokenize([other]).decode(errors="ignore")
            if other == token or text not in top:
                top[text] = its
        return logprob, top


def logprobs_of(llm: MesaLlama, token: int, logits: Any, n: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of a token, and the n most likely tokens with theirs, given the logits [n_vocab] that it was chosen from."""
    logprobs = llm.logits_to_logprobs(logits)
    return float(logprobs[token]), [(int(i), float(logprobs[i])) for i in np.argsort(-logprobs, kind="stable")[:n]]


def _text_of(llm: MesaLlama, prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else llm.detokenize(token_ids(prompt)).decode(errors="ignore")


def _stops(stop: Any) -> list[bytes]:
    strings = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(strings, (list, tuple)) or not all(isinstance(string, str) for string in strings):
        raise ConfigError(f"stop is {stop!r}: it must be a text or a list of texts")
    for string in strings:
        check_text(string, f"the stop string {string!a}")
    # an empty one, as chat templates have it where there is no end token, ends nothing
    return [string.encode() for string in strings if string]


def _prompt_tokens(llm: MesaLlama, prompt: Any, suffix: Any) -> list[int]:
    model = llm._model
    if isinstance(prompt, str):
        check_text(prompt, "the prompt")
        tokens = llm.tokenize(prompt.encode(), add_bos=False, special=suffix is None) if prompt else []
    else:
        tokens = token_ids(prompt)
        if suffix is None:
            return tokens

    if suffix is not None:
        tokens = _infill(llm, tokens, suffix)
    cls, sep = model.token_cls(), model.token_sep()
    bos = cls if cls != -1 else llm.token_bos()
    if model.add_bos_token() and bos != -1:
        tokens = [bos, *tokens]
    if tokens[:2] == [llm.token_bos()] * 2:
        warnings.warn(
            f'the prompt begins with "{model.token_get_text(bos)}", which is put before it anyway: answers may be worse, leave it out',
            RuntimeWarning,
            stacklevel=5,
        )
    if model.add_eos_token() or sep != -1:
        tokens = [*tokens, sep if sep != -1 else llm.token_eos()]
    return tokens


def token_ids(tokens: Any, what: str = "the prompt") -> list[int]:
    """tokens as whole numbers.

    Raises:
        PromptError: they are none.
    """
    ids = whole_numbers(tokens)
    if ids is None:
        raise PromptError(
            f"{what} is {type(tokens).__name__}, {tokens!r:.60}: it must be a text or a list of tokens, whole numbers"
        )
    return ids


def whole_numbers(given: Any) -> list[int] | None:
    """A sequence's items, if they are whole numbers."""
    if not isinstance(given, (Sequence, np.ndarray)) or isinstance(given, (str, bytes, bytearray, memoryview)):
        return None
    items = list(given)
    if not all(isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in items):
        return None
    return [int(item) for item in items]


def _infill(llm: MesaLlama, prefix: list[int], suffix: Any) -> list[int]:
    if not isinstance(suffix, str):
        raise ConfigError(f"suffix is {suffix!r}: it must be a text")
    check_text(suffix, "suffix")
    model = llm._model
    before, after, middle = model.token_prefix(), model.token_suffix(), model.token_middle()
    if -1 in (before, after, middle):
        raise ConfigError("suffix cannot be used: this model has no tokens for filling in the middle")
    # SentencePiece puts a space before the text: tokenize it after something else, and take that away
    guard = "☺" if model.vocab_type() == llama_cpp.LLAMA_VOCAB_TYPE_SPM and suffix else ""
    n_guard = len(llm.tokenize(guard.encode(), add_bos=False)) if guard else 0
    tokens = llm.tokenize((guard + suffix).encode(), add_bos=False)[n_guard:] if suffix else []
    if llm.spm_infill:
        return [after, *tokens, before, *prefix, middle]
    return [before, *prefix, after, *tokens, middle]


def _next_seed(llm: MesaLlama) -> int:
    """Another one for each completion, and the same ones again after `set_seed`."""
    llm.set_seed(random.Random(llm._seed).randint(0, 2**32))  # the numbers of llama_cpp.Llama
    return int(llm._seed)


def _load_cached(llm: MesaLlama, tokens: list[int]) -> None:
    if llm.cache is None:
        return
    try:
        state = llm.cache[tokens]
    except KeyError:
        return
    held = state.input_ids[: state.n_tokens].tolist()
    if llm.longest_token_prefix(held, tokens) > llm.longest_token_prefix(llm._input_ids.tolist(), tokens):
        seed = llm._seed
        llm.load_state(state)
        llm.set_seed(seed)


def _save_cached(llm: MesaLlama, tokens: list[int]) -> None:
    if llm.cache is not None:
        llm.cache[tokens] = llm.save_state()
