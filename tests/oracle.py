"""Mesa-Extrapolation by definition: the tests' oracle, in NumPy.

Every query gets its visible keys and its positions written out, and attention is computed from that, in float64.
Nothing is cached that the definition does not name, nothing is rotated twice, nothing is shared with the product.

Source: "Mesa-Extrapolation: A Weave Position Encoding Method for Enhanced Extrapolation in LLMs" (arXiv 2410.15859),
and its authors' program, of which `data/authors-*.npz` holds two runs. RoPE follows ggml_rope_ext of llama.cpp.

Names of sizes in the shape comments:
    n         tokens read               n_head     query heads         d_k, d_v  size of a key, of a value
    m         queries of one group      n_head_kv  key and value heads  F        tokens in the first chunk
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


# Positions and visibility: the method itself.


def stair(distance: int, extrapolated_position: int, extrapolated_width: int) -> int:
    """Stair PE, the paper's equation 3: the woven distance W(t), with N and E by the paper's names."""
    t, n, e = distance, extrapolated_position, extrapolated_width
    return t if t <= n else n + -(-(t - n) // e)


def key_positions(tokens: Ints, anchor: int, stair_width: int) -> Ints:
    """Position of each key for queries of the last chunk: steps of stair_width before the anchor, unit steps after."""
    base = -(-anchor // stair_width)  # so that token 0 is at position 0
    steps = (tokens - anchor) // stair_width  # rounds toward minus infinity
    return base + np.where(tokens < anchor, steps, tokens - anchor)


def query_positions(tokens: Ints, anchor: int, stair_width: int) -> Ints:
    """Position of each query of the last chunk. A query before the anchor would see keys at a negative distance."""
    if tokens.size and tokens.min() < anchor:
        raise ValueError(f"token {tokens.min()} asks from before the anchor at {anchor}")
    return -(-anchor // stair_width) + (tokens - anchor)


def log_scaling(tokens: Ints, train_length: int | None) -> Floats:
    """Factor on the query at each token index (0-based, in the document): max(1, ln(i + 1) / ln T); 1 without T.

    For queries of the last chunk only: the authors' program leaves those of middle chunks as they are, which the golden
    runs show (with it, logits are off by more than 1; without it, by 0.002).
    """
    if train_length is None:
        return np.ones(tokens.shape)
    return np.maximum(1.0, np.log(tokens + 1) / np.log(train_length))


@dataclass(frozen=True)
class Plan:
    """How one text is cut and woven, in token indices.

    chunk_starts: 0, then the first middle chunk's start (that is F), ..., and the last chunk's start.
    anchor:       where the stair ends and unit steps begin. At or before the last chunk's start.
    stair_width:  E, tokens per step of the stair.
    stair_bias:   the scores of keys before the anchor are lowered by stair_bias * ln(E); 0 in the paper. Those of keys after
                  it by a share of that, which grows from 0 at half of `near` tokens behind the query to 1 at `near` tokens.
    near:         as above; not used without a bias.
    """

    chunk_starts: Sequence[int]
    anchor: int
    stair_width: int
    stair_bias: float = 0.0
    near: int = 1

    @property
    def first_chunk(self) -> int:
        """F, tokens."""
        return int(self.chunk_starts[1])

    @property
    def last_start(self) -> int:
        return int(self.chunk_starts[-1])


@dataclass(frozen=True)
class Queries:
    """A group of queries that see keys at the same positions."""

    tokens: Ints  # [m] whose queries these are
    positions: Ints  # [m]
    keys: Ints  # [k] tokens that any of them sees
    key_positions: Ints  # [k]
    visible: Bools  # [m, k]
    log_scaled: bool = True  # no effect inside T
    bias: Floats | None = None  # [m, k] added to the scores
    kept: bool = (
        False  # a chunk that was read alone, behind the first chunk: no window reaches what is in front of it elsewhere
    )


def stock_queries(n: int) -> list[Queries]:
    """Plain causal attention."""
    tokens = np.arange(n)
    return [Queries(tokens, tokens, tokens, tokens, tokens[:, None] >= tokens)]


def first_chunk_queries(first_chunk: int) -> Queries:
    """First chunk: itself, causally, at 0 ... F-1."""
    return stock_queries(first_chunk)[0]


def chunk_queries(first_chunk: int, start: int, end: int) -> Queries:
    """A middle chunk: the first chunk at 0 ... F-1 and itself, causally, at F, F+1, ..."""
    tokens = np.arange(start, end)
    keys = np.concatenate([np.arange(first_chunk), tokens])
    positions = np.arange(keys.size)
    visible = tokens[:, None] >= keys
    return Queries(tokens, positions[first_chunk:], keys, positions, visible, log_scaled=False)


def last_chunk_queries(
    start: int, end: int, anchor: int, stair_width: int, stair_bias: float = 0.0, near: int = 1
) -> Queries:
    """The last chunk and everything generated: all that came before, by the stair."""
    tokens, keys = np.arange(start, end), np.arange(end)
    distance = tokens[:, None] - keys
    share = np.where(keys < anchor, 1.0, np.clip((distance - near / 2) / (near / 2), 0.0, 1.0)) * (anchor > 0)
    return Queries(
        tokens,
        query_positions(tokens, anchor, stair_width),
        keys,
        key_positions(keys, anchor, stair_width),
        distance >= 0,
        bias=-stair_bias * np.log(stair_width) * share,
    )


def hide(group: Queries, ranges: Sequence[tuple[int, int]]) -> Queries:
    """The same queries, where keys outside of the ranges are not read."""
    read = np.any([(group.keys >= start) & (group.keys < end) for start, end in ranges], axis=0)
    return replace(group, visible=group.visible & read)


def window_queries(tokens: Ints, window: int) -> Queries:
    """A sliding-window layer: the last `window` tokens of the text, the own one among them, whatever chunks they are in."""
    keys = np.arange(tokens[-1] + 1)
    distance = tokens[:, None] - keys
    return Queries(tokens, tokens, keys, keys, (distance >= 0) & (distance < window), log_scaled=False)


def kept_chunk_queries(first_chunk: int, start: int, end: int) -> Queries:
    """A middle chunk that was read behind the first chunk alone, wherever it stands now."""
    return replace(chunk_queries(first_chunk, start, end), kept=True)


def kept_window_queries(chunk: Queries, window: int) -> Queries:
    """The same in a sliding-window layer: the window counts the first chunk and the chunk, and nothing between them."""
    distance = chunk.positions[:, None] - chunk.key_positions
    return replace(chunk, visible=(distance >= 0) & (distance < window))


def plan_queries(plan: Plan, n: int) -> list[Queries]:
    """The whole text of n tokens, cut by the plan."""
    f, last = plan.first_chunk, plan.last_start
    borders = list(plan.chunk_starts[1:])
    groups = [first_chunk_queries(f)]
    groups += [chunk_queries(f, start, end) for start, end in pairwise(borders)]
    return [*groups, last_chunk_queries(last, n, plan.anchor, plan.stair_width, plan.stair_bias, plan.near)]


# The model.


@dataclass(frozen=True)
class Rope:
    """Rotary position encoding as ggml_rope_ext computes it (ggml-cpu/ops.cpp, llama-context.cpp).

    frequencies: [n_rot / 2] radians per position, with linear or YaRN scaling and frequency factors in them.
    magnitude:   YaRN's mscale and the attention factor: what every rotated vector is multiplied by.
    neox:        pairs (x[i], x[i + n_rot/2]) instead of (x[2i], x[2i + 1]).
    """

    frequencies: Floats
    magnitude: float
    neox: bool

    @classmethod
    def make(
        cls,
        n_rot: int,
        freq_base: float,
        neox: bool,
        *,
        scaling: str = "linear",
        factor: float = 1.0,
        original_length: int = 0,
        attn_factor: float = 1.0,
        freq_factors: Floats | None = None,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
    ) -> Rope:
        """From a model's metadata; original_length (tokens) is what a YaRN model was trained at before scaling."""
        pair = np.arange(n_rot // 2)
        extrapolated = freq_base ** (-2.0 * pair / n_rot)
        if freq_factors is not None:
            extrapolated = extrapolated / freq_factors[: n_rot // 2]
        if scaling == "none":
            return cls(extrapolated, attn_factor, neox)
        interpolated = extrapolated / factor
        if scaling == "linear":
            return cls(interpolated, attn_factor, neox)
        if scaling != "yarn":
            raise ValueError(f"rope scaling {scaling!r} is not known to the oracle")

        def corrected_dim(rotations: float) -> float:  # the pair that turns this often over the original length
            return n_rot * np.log(original_length / (rotations * 2 * np.pi)) / (2 * np.log(freq_base))

        low = max(0.0, np.floor(corrected_dim(beta_fast)))
        high = min(n_rot - 1.0, np.ceil(corrected_dim(beta_slow)))
        ramp = 1 - np.clip((pair - low) / max(0.001, high - low), 0, 1)
        frequencies = interpolated * (1 - ramp) + extrapolated * ramp
        # llama_context divides by 1 + 0.1 ln(factor) what ggml's rope_yarn multiplies by it, after setting mscale to
        # the same for factors over 1: that leaves one of the two.
        mscale = 1 + 0.1 * np.log(factor) if factor > 1 else 1.0
        return cls(frequencies, float(mscale * attn_factor), neox)

    def __call__(self, x: Floats, positions: Ints) -> Floats:
        """x [n, heads, d] rotated to positions [n]. Dimensions past n_rot stay as they are."""
        half = self.frequencies.size
        angle = positions[:, None, None] * self.frequencies  # [n, 1, n_rot / 2]
        cos, sin = np.cos(angle) * self.magnitude, np.sin(angle) * self.magnitude
        if self.neox:
            first, second = slice(0, half), slice(half, 2 * half)
        else:
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        out = x.copy()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out


def alibi_slopes(n_head: int, max_bias: float) -> Floats:
    """[n_head] bias per unit of distance, as in ggml's soft_max_ext."""
    power = 2 ** int(np.floor(np.log2(n_head)))
    m0, m1 = 2 ** (-max_bias / power), 2 ** (-max_bias / 2 / power)
    return np.array([m0 ** (h + 1) if h < power else m1 ** (2 * (h - power) + 1) for h in range(n_head)])


def silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x))


def gelu(x: Floats) -> Floats:
    """The tanh form, argument and value in f16: ggml's CPU backend has a table of it, for what lies between -10 and 10."""
    r = np.clip(x, -10, 10).astype(np.float16).astype(np.float64)
    looked_up = (0.5 * r * (1 + np.tanh(np.sqrt(2 / np.pi) * r * (1 + 0.044715 * r * r)))).astype(np.float16)
    return np.where(x <= -10, 0.0, np.where(x >= 10, x, looked_up.astype(np.float64)))


NEOX_ARCHITECTURES = {"qwen2", "stablelm", "gptneox", "gemma2", "gemma3", "olmo2"}
POSITION_FREE_ARCHITECTURES = {"mpt"}  # ALiBi, or none at all (NoPE)
ARCHITECTURES = {"llama", "smollm3", "cohere2"} | NEOX_ARCHITECTURES | POSITION_FREE_ARCHITECTURES
LAYER_NORM_ARCHITECTURES = {"stablelm", "gptneox", "mpt", "cohere2"}
WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, "cohere2": 4, "olmo2": 4}  # all layers but each n-th have a sliding window
GEMMA_ARCHITECTURES = {"gemma2", "gemma3"}  # GELU with a gate, scaled embedding


@dataclass(frozen=True)
class Model:
    """A decoder read from a GGUF file, every tensor in float64, a matrix as [out, in]."""

    architecture: str
    tensors: dict[str, Floats]
    train_length: int  # T, tokens
    n_layer: int
    n_head: int
    n_head_kv: int
    d_k: int
    d_v: int
    epsilon: float
    ropes: list[Rope | None]  # of each layer
    windows: list[int]  # tokens that each layer sees, 0 for all
    slopes: Floats | None  # [n_head], ALiBi
    parallel_residual: bool
    soft_cap: float  # of attention scores, 0 for none
    logit_soft_cap: float
    logit_scale: float
    kv_half: bool

    @classmethod
    def from_gguf(cls, path: str | Path, kv_half: bool = False) -> Model:
        """kv_half: keys, rotated, and values are rounded to f16 before attention.

        That is what llama.cpp's flash attention does even with an f32 cache (llm_graph_context::build_attn_mha):
        stock logits of a small f32 model then differ from f64 by 0.01, and by 0.001 from an oracle that rounds too.
        """
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        architecture = metadata["general.architecture"]
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {architecture!r} is not known to the oracle")

        def get(key: str, default=None):
            value = metadata.get(f"{architecture}.{key}", default)
            if value is None:
                raise ValueError(f"{path} has no {architecture}.{key}")
            return value

        tensors = {
            tensor.name: np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float64)
            for tensor in reader.tensors
        }
        n_head, train_length = get("attention.head_count"), get("context_length")
        d_k = get("attention.key_length", get("embedding_length") // n_head)
        n_layer, window = get("block_count"), get("attention.sliding_window", 0)
        pattern = get("attention.sliding_window_pattern", WINDOW_PERIODS.get(architecture, 1) if window else 1)
        if isinstance(pattern, int):
            pattern = [layer % pattern < pattern - 1 for layer in range(n_layer)]

        def rope(layer: int) -> Rope | None:
            if architecture in POSITION_FREE_ARCHITECTURES or (architecture == "cohere2" and not pattern[layer]):
                return None
            if architecture == "smollm3" and layer % 4 == 3:
                return None
            base = get("rope.freq_base", 10000.0)
            if pattern[layer] and architecture == "gemma3":
                base = get("rope.freq_base_swa", 10000.0)
            return Rope.make(
                get("rope.dimension_count", d_k),
                base,
                architecture in NEOX_ARCHITECTURES,
                scaling=get("rope.scaling.type", "linear"),
                factor=get("rope.scaling.factor", get("rope.scale_linear", 1.0)),
                original_length=get("rope.scaling.original_context_length", train_length),
                attn_factor=get("rope.scaling.attn_factor", 1.0),
                freq_factors=tensors.get("rope_freqs.weight"),
            )

        max_bias = get("attention.max_alibi_bias", 0.0)
        return cls(
            architecture=architecture,
            tensors=tensors,
            train_length=train_length,
            n_layer=n_layer,
            n_head=n_head,
            n_head_kv=get("attention.head_count_kv", n_head),
            d_k=d_k,
            d_v=get("attention.value_length", get("embedding_length") // n_head),
            epsilon=metadata.get(f"{architecture}.attention.layer_norm_rms_epsilon")
            or get("attention.layer_norm_epsilon"),
            ropes=[rope(layer) for layer in range(n_layer)],
            windows=[window if windowed else 0 for windowed in pattern],
            slopes=alibi_slopes(n_head, max_bias) if max_bias > 0 else None,
            parallel_residual=get("use_parallel_residual", architecture == "cohere2"),
            soft_cap=get("attn_logit_softcapping", 50.0) if architecture == "gemma2" else 0.0,
            logit_soft_cap=get("final_logit_softcapping", 30.0 if architecture == "gemma2" else 0.0),
            logit_scale=get("logit_scale", 1.0),
            kv_half=kv_half,
        )

    def embed(self, tokens: Sequence[int] | NDArray[np.integer]) -> Floats:
        """[n] token ids -> [n, n_embd]"""
        x = self.tensors["token_embd.weight"][np.asarray(tokens, dtype=np.int64)]
        return x * np.sqrt(x.shape[1]) if self.architecture in GEMMA_ARCHITECTURES else x

    def linear(self, name: str, x: Floats) -> Floats:
        y = x @ self.tensors[f"{name}.weight"].T
        return y + self.tensors.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: Floats) -> Floats:
        """LayerNorm where the architecture has it, RMSNorm elsewhere; nothing where the model has no such norm."""
        if f"{name}.weight" not in self.tensors:
            return x
        if self.architecture in LAYER_NORM_ARCHITECTURES:
            x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * self.tensors[f"{name}.weight"]
        return y + self.tensors.get(f"{name}.bias", 0.0)

    def queries_keys_values(self, layer: int, x: Floats) -> tuple[Floats, Floats, Floats]:
        """Layer input [n, n_embd] -> unrotated q [n, n_head, d_k], k [n, n_head_kv, d_k], v [n, n_head_kv, d_v]"""
        h = self.norm(f"blk.{layer}.attn_norm", x)
        n_q, n_k = self.n_head * self.d_k, self.n_head_kv * self.d_k
        if f"blk.{layer}.attn_qkv.weight" in self.tensors:
            q, k, v = np.split(self.linear(f"blk.{layer}.attn_qkv", h), [n_q, n_q + n_k], axis=-1)
        else:
            q, k, v = (self.linear(f"blk.{layer}.attn_{part}", h) for part in "qkv")
        n = len(x)
        v = v.reshape(n, self.n_head_kv, self.d_v)
        q_norm, k_norm = f"blk.{layer}.attn_q_norm", f"blk.{layer}.attn_k_norm"
        if self.tensors.get(f"{q_norm}.weight", np.empty(0)).size == n_q != self.d_k:  # of all heads together
            q, k = self.norm(q_norm, q), self.norm(k_norm, k)
            return q.reshape(n, self.n_head, self.d_k), k.reshape(n, self.n_head_kv, self.d_k), v
        q, k = q.reshape(n, self.n_head, self.d_k), k.reshape(n, self.n_head_kv, self.d_k)
        return self.norm(q_norm, q), self.norm(k_norm, k), v

    def seen(self, layer: int, group: Queries) -> Queries:
        """The same in one layer. A sliding-window layer reads the text as if it were not cut: only what all layers but those see is
        woven."""
        if self.windows[layer] and group.kept:
            return kept_window_queries(group, self.windows[layer])
        return window_queries(group.tokens, self.windows[layer]) if self.windows[layer] else group

    def attend(self, layer: int, group: Queries, q: Floats, k: Floats, v: Floats, log_scaling_T: int | None) -> Floats:
        """Attention of one group -> [m, n_head * d_v], from unrotated q of its own tokens, k and v of all tokens."""
        return self.weighted(layer, group, self.weights(layer, group, q, k, log_scaling_T), v)

    def weighted(self, layer: int, group: Queries, weights: Floats, v: Floats) -> Floats:
        """The values of all tokens, weighted as each query attends to those that its group sees -> [m, n_head * d_v]"""
        v = v[self.seen(layer, group).keys]
        if self.kv_half:
            v = v.astype(np.float16).astype(np.float64)
        attended = weights @ self.by_head(v)  # [n_head, m, d_v]
        return attended.transpose(1, 0, 2).reshape(weights.shape[1], -1)

    def by_head(self, x: Floats) -> Floats:
        """Keys or values [k, n_head_kv, d] as each head reads them [n_head, k, d]"""
        return np.repeat(x.transpose(1, 0, 2), self.n_head // self.n_head_kv, axis=0)

    def weights(self, layer: int, group: Queries, q: Floats, k: Floats, log_scaling_T: int | None) -> Floats:
        """How much each query attends to each key that its group sees in this layer [n_head, m, k]."""
        group = self.seen(layer, group)
        k = k[group.keys]
        rope = self.ropes[layer]
        if rope is not None:
            q, k = rope(q, group.positions), rope(k, group.key_positions)
        if self.kv_half:
            k = k.astype(np.float16).astype(np.float64)
        scale = log_scaling(group.tokens, log_scaling_T if group.log_scaled else None)
        q = q * scale[:, None, None] / np.sqrt(self.d_k)
        score = q.transpose(1, 0, 2) @ self.by_head(k).transpose(0, 2, 1)  # [n_head, m, k]
        if self.slopes is not None:
            distance = np.abs(group.positions[:, None] - group.key_positions)  # [m, k]
            score -= self.slopes[:, None, None] * distance
        if self.soft_cap:
            score = self.soft_cap * np.tanh(score / self.soft_cap)
        if group.bias is not None and self.slopes is None:
            score += group.bias
        score = np.where(group.visible, score, -np.inf)
        score -= score.max(-1, keepdims=True)
        weight = np.exp(score)
        weight /= weight.sum(-1, keepdims=True)
        return weight

    def feed_forward(self, layer: int, x: Floats) -> Floats:
        name = f"blk.{layer}.ffn"
        h = self.norm(f"blk.{layer}.attn_norm" if self.architecture == "cohere2" else f"{name}_norm", x)
        up = self.linear(f"{name}_up", h)
        if f"{name}_gate.weight" in self.tensors:
            activation = gelu if self.architecture in GEMMA_ARCHITECTURES else silu
            up = activation(self.linear(f"{name}_gate", h)) * up
        else:
            up = gelu(up)
        return self.norm(f"blk.{layer}.post_ffw_norm", self.linear(f"{name}_down", up))

    def finish_layer(self, layer: int, x: Floats, attention: Floats) -> Floats:
        """Layer input and the attention of its queries -> layer output, both [n, n_embd]"""
        after = x + self.norm(f"blk.{layer}.post_attention_norm", self.linear(f"blk.{layer}.attn_output", attention))
        return after + self.feed_forward(layer, x if self.parallel_residual else after)

    def output(self, x: Floats) -> Floats:
        """[n, n_embd] -> logits [n, n_vocab]"""
        tied = "output.weight" not in self.tensors
        y = self.logit_scale * self.linear("token_embd" if tied else "output", self.norm("output_norm", x))
        return self.logit_soft_cap * np.tanh(y / self.logit_soft_cap) if self.logit_soft_cap else y


# What the tests ask for.


def logits(
    model: Model,
    tokens: Sequence[int] | NDArray[np.integer],
    plan: Plan | None = None,
    log_scaling_T: int | None = None,
    logits_from: int = 0,
) -> Floats:
    """Logits [n - logits_from, n_vocab] of a whole text, all tokens layer by layer. Without a plan: stock attention."""
    groups = stock_queries(len(tokens)) if plan is None else plan_queries(plan, len(tokens))
    x = model.embed(tokens)
    for layer in range(model.n_layer):
        q, k, v = model.queries_keys_values(layer, x)
        attention = [model.attend(layer, g, q[g.tokens], k, v, log_scaling_T) for g in groups]
        x = model.finish_layer(layer, x, np.concatenate(attention))
    return model.output(x[logits_from:])


class State:
    """A conversation: keys (unrotated) and values as they were when their token was read, and the current stair.

    first_chunk:   F, tokens; chunks can be read once that many tokens were.
    log_scaling_T: T of the log scaling (tokens), None for none.
    stair_bias:    as in Plan, and near.
    """

    def __init__(
        self,
        model: Model,
        first_chunk: int = 0,
        stair_width: int = 1,
        log_scaling_T: int | None = None,
        stair_bias: float = 0.0,
        near: int = 1,
    ) -> None:
        self.model = model
        self.stair_bias, self.near = stair_bias, near
        self.first_chunk = first_chunk
        self.anchor, self.stair_width = 0, stair_width
        self.log_scaling_T = log_scaling_T
        self.n = 0
        # what the last token read attended to in each layer [n_head, n]; where it read less, what it would of everything
        self.attention = [np.empty((model.n_head, 0)) for _ in range(model.n_layer)]
        self.keys = [np.empty((0, model.n_head_kv, model.d_k)) for _ in range(model.n_layer)]
        self.values = [np.empty((0, model.n_head_kv, model.d_v)) for _ in range(model.n_layer)]

    def _read(
        self, tokens: Sequence[int] | NDArray[np.integer], group: Queries, everything: Queries | None = None
    ) -> Floats:
        told = everything or group
        x = self.model.embed(tokens)
        for layer in range(self.model.n_layer):
            q, k, v = self.model.queries_keys_values(layer, x)
            self.keys[layer] = np.concatenate([self.keys[layer], k])
            self.values[layer] = np.concatenate([self.values[layer], v])
            weights = self.model.weights(layer, group, q, self.keys[layer], self.log_scaling_T)
            attention = self.model.weighted(layer, group, weights, self.values[layer])
            if told is not group:
                weights = self.model.weights(layer, told, q, self.keys[layer], self.log_scaling_T)
            self.attention[layer] = np.zeros((self.model.n_head, len(self.keys[layer])))
            self.attention[layer][:, self.model.seen(layer, told).keys] = weights[:, -1]
            x = self.model.finish_layer(layer, x, attention)
        self.n += len(tokens)
        return self.model.output(x)

    def chunk(self, tokens: Sequence[int] | NDArray[np.integer]) -> Floats:
        """Read a middle chunk -> its logits [n, n_vocab]."""
        if self.n < self.first_chunk:
            raise ValueError(f"a chunk before the first chunk's {self.first_chunk} tokens were read")
        return self._read(tokens, chunk_queries(self.first_chunk, self.n, self.n + len(tokens)))

    def last(
        self, tokens: Sequence[int] | NDArray[np.integer], ranges: Sequence[tuple[int, int]] | None = None
    ) -> Floats:
        """Read tokens that see everything, or ranges of it, by the current stair -> logits [n, n_vocab]. With anchor 0: stock."""
        end = self.n + len(tokens)
        group = last_chunk_queries(self.n, end, self.anchor, self.stair_width, self.stair_bias, self.near)
        return self._read(tokens, group if ranges is None else hide(group, ranges), group)

    def move_anchor(self, anchor: int, stair_width: int | None = None) -> None:
        self.anchor = anchor
        self.stair_width = stair_width or self.stair_width

    def rollback(self, n: int) -> None:
        """Forget the newest n tokens."""
        if not 0 <= n <= self.n:
            raise ValueError(f"cannot roll back {n} of {self.n} tokens")
        self.n -= n
        self.keys = [k[: self.n] for k in self.keys]
        self.values = [v[: self.n] for v in self.values]


def replay(
    model: Model, events: Iterable[tuple], first_chunk: int = 0, log_scaling_T: int | None = None
) -> list[Floats]:
    """Play a conversation from its beginning; the logits [n, n_vocab] of every "chunk" and "last" event.

    Events: ("last", tokens), ("chunk", tokens), ("anchor", anchor), ("anchor", anchor, stair_width), ("rollback", n).
    The first chunk, and a text inside the trained length, is a "last" while the anchor is 0.
    """
    state = State(model, first_chunk, log_scaling_T=log_scaling_T)
    read = []
    for name, *arguments in events:
        if name in ("last", "chunk"):
            read.append(getattr(state, name)(*arguments))
        elif name == "anchor":
            state.move_anchor(*arguments)
        elif name == "rollback":
            state.rollback(*arguments)
        else:
            raise ValueError(f"no event is called {name!r}")
    return read
