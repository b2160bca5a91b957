"""How a text is read: the options (`MesaConfig`) and what they come to for a given length (`MesaPlan`).

The numbers are computed by the C++ core (csrc/plan.cpp); nothing is computed twice here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from . import _core
from .errors import ConfigError

Positions = npt.NDArray[np.int32]


class MesaPlan:
    """How a text of some length is read.

    Args:
        chunk_starts: first token of each chunk; begins with 0 and the end of the first chunk, ends with the last
            chunk's start. ``[0]`` alone, with anchor 0, is a plain causal reading.
        anchor: token index a; keys before it stand on the stair, keys from it on at unit distance.
        stair_width: E, how many tokens share a step of the stair.

    Raises:
        ConfigError: the chunk starts do not grow from 0, or a number is out of range.

    Source: chunk-based triangular attention and Stair PE (equation 3) of arXiv 2410.15859, in the anchored form.
    """

    def __init__(self, chunk_starts: Sequence[int], anchor: int, stair_width: int) -> None:
        try:
            self._plan = _core.Plan([int(s) for s in chunk_starts], int(anchor), int(stair_width))
        except (ValueError, TypeError) as err:
            raise ConfigError(str(err).splitlines()[0]) from None

    @classmethod
    def _of(cls, plan: _core.Plan) -> MesaPlan:
        self = cls.__new__(cls)
        self._plan = plan
        return self

    @property
    def chunk_starts(self) -> list[int]:
        """First token of each chunk."""
        return [int(s) for s in self._plan.chunk_starts]

    @property
    def anchor(self) -> int:
        """a, a token index."""
        return self._plan.anchor

    @property
    def stair_width(self) -> int:
        """E, in tokens."""
        return self._plan.stair_width

    @property
    def last_start(self) -> int:
        """First token of the last chunk, which attends to everything."""
        return self._plan.last_start

    @property
    def is_plain(self) -> bool:
        """True if nothing is woven: the text is read as stock llama.cpp reads it."""
        return self.last_start == 0 and self.anchor == 0

    def key_positions(self, n_tokens: int) -> Positions:
        """Position of each key as the last chunk and generated tokens see it, [n_tokens]."""
        return self._plan.key_positions(0, n_tokens)

    def query_positions(self, n_tokens: int) -> Positions:
        """Position of each query of the last chunk, tokens last_start .. n_tokens-1."""
        return self._plan.query_positions(min(self.last_start, n_tokens), n_tokens)

    def chunk_positions(self, n_tokens: int) -> Positions:
        """Position of each token while its own chunk is read, tokens 0 .. last_start-1."""
        return self._plan.chunk_positions(0, min(self.last_start, n_tokens))

    def mask(self, n_tokens: int) -> npt.NDArray[np.bool_]:
        """The chunk-triangular mask, [query, key], True where the query attends to the key. n_tokens² bytes."""
        return self._plan.mask(n_tokens)

    def n_positions(self, n_tokens: int) -> int:
        """One more than the largest position that a text of n_tokens reaches; at most the reading length."""
        return self._plan.n_positions(n_tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MesaPlan) and self._plan == other._plan

    def __hash__(self) -> int:
        return hash(self._plan)

    def __reduce__(self) -> tuple[type[MesaPlan], tuple[list[int], int, int]]:
        return MesaPlan, (self.chunk_starts, self.anchor, self.stair_width)

    def __repr__(self) -> str:
        starts = self.chunk_starts
        shown = (
            str(starts)
            if len(starts) <= 8
            else f"[{starts[0]}, {starts[1]}, {starts[2]}, … {len(starts) - 4} more …, {starts[-1]}]"
        )
        return f"MesaPlan(chunk_starts={shown}, anchor={self.anchor}, stair_width={self.stair_width})"


@dataclass(frozen=True)
class MesaConfig:
    """Options of Mesa-Extrapolation. All lengths in tokens; None takes the default, which depends on the model.

    Attributes:
        enabled: False: stock llama.cpp. Bit for bit where the environment says MESA_KERNELS=stock, else with this package's kernels for the CPU.
        train_length: T, the length that the model was trained at. Default: from the GGUF.
        reading_length: R, the length that the model reads well, at most T: a longer text is read in chunks, and distances are kept below
            R. A text of at most R tokens is read as stock llama.cpp reads it. Default: T.
        first_chunk: F, the tokens that every later chunk reads too. Default: 100, less for a short R.
        chunk: C, the longest middle chunk; F + C <= R. Default: R - F, and 1,024 at most where T is 4,096 or more.
        last_chunk: the least length of the last chunk, which reads everything before it. Default: 512, for a short R
            the more of R/8 and 256, at most R/4.
        stair_width: E, how many tokens share a step of the stair. "auto": the smallest that fits, with room to generate.
        log_scaling: scale the last chunk's queries by max(1, ln(i + 1)/ln(log_length)), i the token index. Default: on for
            "mesa" and "mesa-exact", off for the other methods, whose papers do not have it.
        log_length: the length from which on queries are scaled. Default: 4 R for "mesa", R for the other methods; T in the paper.
        room: positions that a plan leaves free for generation. Default: R/2 for "mesa", R/4 for the others. When they are used up, the anchor moves.
        sentence_borders: begin chunks where a sentence or line ends, so that chunks do not cut facts.
        plan: a plan made by hand for the next prompt, instead of one made from the numbers above.
        method: "mesa", or another member of the weave family to compare with: one of `mesa_gguf.METHODS`, defined in
            docs/METHODS.md. Those are right, not fast.
        window: N of the other methods, the distance up to which positions are the true ones. Default: by method.
        stair_bias: logits of keys on the stair are lowered by stair_bias * ln(E), E being the stair width: a step of the stair, which
            E keys share, weighs as one key (1) or as E (0, the paper's). So are those of keys in the last chunk that are `last_chunk`
            tokens or more behind the query; nearer ones less, and not at all up to half of it. Without effect on ALiBi
            models, which lower far keys anyhow. Default: 0.5 for "mesa", 0 for the other methods.
        tuned: use the numbers that ``mesa-gguf tune`` keeps of the model in place of defaults, where there are some. Those given here win.
        n_sinks: first tokens that "lm-infinite" and "streaming-llm" keep in sight. Default: 4.
        read_budget: how many tokens an answer reads of a long text while it is written. Each token of it reads the first chunk, the
            `last_chunk` tokens before it, and at most so many in between: those that drew most attention. What is left out costs nothing on
            the CPU with flash attention; elsewhere it is left out, and nothing is faster. Default: everything is read.
        read_every: one in so many tokens of an answer reads everything all the same. Default: 64.
        read_layers: the layers whose attention chooses what is read. Few layers of a model look for what an answer needs, and which ones differs
            from model to model; each of them reads all keys for it. Default: two between 40 and 80 % of the depth.
    """

    enabled: bool = True
    train_length: int | None = None
    first_chunk: int | None = None
    chunk: int | None = None
    last_chunk: int | None = None
    stair_width: int | Literal["auto"] = "auto"
    log_scaling: bool | None = None
    room: int | None = None
    sentence_borders: bool = True
    plan: MesaPlan | None = None
    method: str = "mesa"
    window: int | None = None
    n_sinks: int | None = None
    stair_bias: float | None = None
    log_length: int | None = None
    reading_length: int | None = None
    tuned: bool = True
    read_budget: int | None = None
    read_every: int | None = None
    read_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in (
            "train_length",
            "reading_length",
            "first_chunk",
            "chunk",
            "last_chunk",
            "room",
            "window",
            "n_sinks",
            "log_length",
            "read_budget",
            "read_every",
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{name} must be a whole number of tokens, not {value!r}")
            least = {"room": 0, "n_sinks": 0, "log_length": 2, "read_budget": 0}.get(name, 1)
            if not least <= value < 2**31:
                raise ConfigError(f"{name} is {value}: it must be {least} or more")
        if self.stair_width != "auto":
            if not isinstance(self.stair_width, int) or isinstance(self.stair_width, bool):
                raise ConfigError(f'stair_width must be a whole number or "auto", not {self.stair_width!r}')
            if not 1 <= self.stair_width < 2**31:
                raise ConfigError(f'stair_width is {self.stair_width}: it must be 1 or more, or "auto"')
        layers = self.read_layers
        if layers is not None:
            if not isinstance(layers, (tuple, list)) or not layers:
                raise ConfigError(f"read_layers is {layers!r}: it must be numbers of layers, one or more")
            if not all(
                isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < 2**31 for layer in layers
            ):
                raise ConfigError(f"read_layers is {layers!r}: a layer's number is a whole number, 0 or more")
            object.__setattr__(self, "read_layers", tuple(layers))
            if not self.read_budget:
                raise ConfigError("read_layers choose what is read where read_budget bounds it: give read_budget, too")
        bias = self.stair_bias
        if bias is not None and (isinstance(bias, bool) or not isinstance(bias, (int, float)) or not 0 <= bias <= 8):
            raise ConfigError(f"stair_bias is {bias!r}: it must be a number between 0 and 8")
        if self.plan is not None and not isinstance(self.plan, MesaPlan):
            raise ConfigError(f"plan must be a MesaPlan, not {type(self.plan).__name__}")
        if self.method not in _core.METHODS:
            raise ConfigError(f"there is no method {self.method!r}: use one of {', '.join(_core.METHODS)}")
        if self.plan is not None and self.method not in ("mesa", "mesa-exact"):
            raise ConfigError(f'a plan made by hand is for "mesa": the method {self.method} does not read by it')

    def params(self, train_length: int) -> _core.Params:
        """The numbers for a model trained at train_length tokens.

        Raises:
            ConfigError: they cannot work together; the message says why and what to do.
        """
        try:
            return _core.Params.fill(
                train_length=self.train_length if self.train_length is not None else train_length,
                method=self.method,
                first_chunk=self.first_chunk,
                chunk=self.chunk,
                last_chunk=self.last_chunk,
                stair_width=None if self.stair_width == "auto" else self.stair_width,
                room=self.room,
                log_scaling=self.log_scaling,
                window=self.window,
                n_sinks=self.n_sinks,
                stair_bias=self.stair_bias,
                log_length=self.log_length,
                reading_length=self.reading_length,
                read_budget=self.read_budget,
                read_every=self.read_every,
            )
        except ValueError as err:
            raise ConfigError(str(err)) from None

    def make_plan(self, n_tokens: int, train_length: int, breaks: npt.ArrayLike | None = None) -> MesaPlan:
        """The plan of a text of n_tokens, without a model.

        Args:
            n_tokens: length of the text.
            train_length: the model's T, if the config does not say.
            breaks: [n_tokens], 1 where a sentence ends, 2 where a line ends, else 0.

        Raises:
            ConfigError: no plan fits.
        """
        params = self.params(train_length)
        try:
            if self.plan is not None:
                self.plan._plan.validate(params, n_tokens)
                return self.plan
            return MesaPlan._of(
                _core.make_plan(params, n_tokens, None if breaks is None else np.asarray(breaks, np.uint8))
            )
        except ValueError as err:
            raise ConfigError(str(err)) from None
