"""Mesa-Extrapolation played with the public API of an unpatched llama.cpp: what the patched one must compute.

    LLAMA_CPP_LIB_PATH=<folder of the unpatched library> python stock_oracle.py out.npz < requests.jsonl

What a request asks for lies in out.npz when its line "done" is written.

Each middle chunk is decoded in a sequence of its own that shares the first chunk's cells, at positions F, F + 1, ... Then
the keys are brought to their places on the stair, all cells join one sequence, and the last chunk and the answer are decoded
there at the positions that queries have in the plan. Keys are placed in one of two ways:

* by llama.cpp itself: llama_memory_seq_add, whose deltas it applies as one rotation of the cached keys;
* by hand, in a saved state of the sequence, where llama.cpp's shift is missing or not exact: ALiBi and M-RoPE (refused
  there), layers without RoPE (it rotates them all the same), models that normalize keys after RoPE, and others for which it
  takes another RoPE than their graph.

The stair is the one of floor(j / E): with an anchor that is a multiple of E, both ways are whole-number arithmetic on it.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Positions = NDArray[np.int32]

F32 = 0  # enum ggml_type
NORM, MROPE, IMROPE = 0, 8, 40  # enum llama_rope_type


def key_positions(n: int, anchor: int, stair_width: int) -> Positions:
    """Where the last chunk looks for keys 0 ... n-1."""
    if anchor % stair_width:
        raise ValueError(f"anchor {anchor} is not a multiple of the stair width {stair_width}")
    keys = np.arange(n, dtype=np.int32)
    return np.where(keys < anchor, keys // stair_width, anchor // stair_width + keys - anchor).astype(np.int32)


@dataclass(frozen=True)
class ByHand:
    """How keys are rotated where llama.cpp's own shift cannot be used.

    rotated: layers whose keys have a position, None for all.
    norm_after: keys are multiplied by a norm's weight after RoPE.
    n_rot: rotated dimensions of a head, 0 for what the file says.
    rope_type: enum llama_rope_type, -1 for what llama.cpp says.
    """

    rotated: tuple[int, ...] | None = None
    norm_after: bool = False
    n_rot: int = 0
    rope_type: int = -1


class File:
    """What the oracle has to know of a model to rotate its keys."""

    def __init__(self, path: str) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {key: field.contents() for key, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        self.architecture = self.fields["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.architecture}.{key}", default)

    @property
    def head_size(self) -> int:
        return self.get("attention.key_length") or self.get("embedding_length") // self.get("attention.head_count")

    def rotate(
        self, keys: NDArray[np.float32], delta: Positions, layer: int, rope_type: int, by_hand: ByHand
    ) -> NDArray[np.float32]:
        """[n, n_head_kv * d] moved on by delta [n] positions."""
        n_rot, base = by_hand.n_rot or self.get("rope.dimension_count"), self.get("rope.freq_base")
        pair = np.arange(n_rot // 2)
        frequencies = base ** (-2.0 * pair / n_rot)
        if rope_type == IMROPE:
            # time, height, width in turn, each for so many pairs; those left over turn with the fourth position, which is 0
            frequencies[pair >= 3 * np.array(self.get("rope.dimension_sections"))[pair % 3]] = 0
        if "rope_freqs.weight" in self.tensors:
            frequencies = frequencies / self.tensors["rope_freqs.weight"][: n_rot // 2]
        angle = delta[:, None, None] * frequencies
        cos, sin = np.cos(angle), np.sin(angle)

        weight = self.tensors[f"blk.{layer}.attn_k_norm.weight"] if by_hand.norm_after else 1.0
        x = keys.reshape(len(keys), -1, self.head_size).astype(np.float64) / weight
        half = n_rot // 2
        first, second = (
            (slice(half), slice(half, n_rot)) if rope_type != NORM else (slice(0, n_rot, 2), slice(1, n_rot, 2))
        )
        y = x.copy()
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., first] * sin + x[..., second] * cos
        return (y * weight).reshape(keys.shape).astype(np.float32)


class SavedCache:
    """One cache in a saved state: positions and keys in place, to be changed. Layout: llama_kv_cache::state_write."""

    def __init__(self, data: bytearray, offset: int, mrope: bool) -> None:
        def numbers(kind: type, count: int) -> NDArray[Any]:
            nonlocal offset
            array = np.frombuffer(data, kind, count, offset)
            offset += array.nbytes
            return array

        _, n = (int(number) for number in numbers(np.uint32, 2))  # streams, cells
        cell = numbers(np.int32, n * (6 if mrope else 3)).reshape(n, -1)
        self.positions = cell[:, 0]
        self.positions_2d = cell[:, 2:4] if mrope else cell[:, :0]
        self.transposed, layers = numbers(np.uint32, 1), numbers(np.uint32, 1)
        self.keys, self.values = [], []
        for _ in range(int(layers[0])):
            assert numbers(np.int32, 1)[0] == F32
            (row,) = numbers(np.uint64, 1)  # bytes
            self.keys.append(numbers(np.float32, n * int(row) // 4).reshape(n, -1))
        for _ in range(int(layers[0])):
            assert numbers(np.int32, 1)[0] == F32
            row = numbers(np.uint64, 1)  # bytes; transposed, two numbers: bytes of a value, values of a row
            self.values.append((row, numbers(np.float32, n * self._n_bytes(row) // 4)))
        self.end = offset

    def _n_bytes(self, row: NDArray[np.uint64]) -> int:
        return int(row.view(np.uint32).prod() if self.transposed[0] else row[0])

    def turn_values(self) -> None:
        """Values cell by cell, as flash attention has them."""
        for row, values in self.values:
            row[0] = self._n_bytes(row)
            values[:] = values.reshape(-1, len(self.positions)).T.ravel()
        self.transposed[0] = 0


class SavedSequence:
    """The saved state of a sequence. A model with sliding windows has two caches: that of the other layers comes first."""

    def __init__(self, data: bytearray, mrope: bool) -> None:
        self.data = data
        self.caches = [SavedCache(data, 8, mrope)]  # after a magic number and the sequence
        if self.caches[0].end < len(data):
            self.caches.append(SavedCache(data, self.caches[0].end, mrope))
        assert self.caches[-1].end == len(data)


class Context:
    def __init__(self, model: Any, flash: bool, n_ctx: int, n_seq: int = 1) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = n_ctx
        params.n_ubatch = min(n_ctx, 512)
        params.n_seq_max, params.kv_unified = n_seq, True
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = F32
        params.flash_attn_type = int(flash)
        self.ctx = llama_cpp.llama_init_from_model(model, params)
        if not self.ctx:
            raise RuntimeError("no context")
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def close(self) -> None:
        llama_cpp.llama_free(self.ctx)

    def decode(self, tokens: Sequence[int], start: int = 0, seq: int = 0) -> Logits:
        """Tokens at positions start, start + 1, ... -> logits of each [n, n_vocab]."""
        n = len(tokens)
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
            batch.seq_id[i][0] = seq
        status = llama_cpp.llama_decode(self.ctx, batch)
        llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: {status}")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.ctx), (n, self.n_vocab)).copy()

    def plain(self, tokens: Sequence[int]) -> Logits:
        """A text of its own, as stock llama.cpp reads it."""
        llama_cpp.llama_memory_clear(self.memory, True)
        return self.decode(tokens)

    def singly(self, tokens: Sequence[int], seq: int, start: int, window: int, chunked: bool, lost: int) -> Logits:
        """Tokens from start on, one by one, each after what lies outside its sliding window was removed, and `lost` tokens more.
        The text before them is in the sequence already."""
        logits = []
        for i, token in enumerate(tokens):
            position = start + i
            oldest = position // window * window if chunked else max(0, position - window + 1)
            llama_cpp.llama_memory_seq_rm(self.memory, seq, 0, min(oldest + lost, position))
            logits.append(self.decode([token], position, seq))
        return np.concatenate(logits)

    def save(self, mrope: bool) -> SavedSequence:
        data = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(self.ctx, 0))()
        assert llama_cpp.llama_state_seq_get_data(self.ctx, data, len(data), 0) == len(data)
        return SavedSequence(bytearray(data), mrope)

    def load(self, saved: SavedSequence) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)
        data = (ctypes.c_uint8 * len(saved.data)).from_buffer(saved.data)
        assert llama_cpp.llama_state_seq_set_data(self.ctx, data, len(data), 0) == len(data)


class Mesa:
    """One text read by the method, step by step."""

    def __init__(self, context: Context, starts: list[int], by_hand: ByHand | None, file: File, rope_type: int) -> None:
        self.context, self.starts, self.by_hand, self.file = context, starts, by_hand, file
        self.rope_type = by_hand.rope_type if by_hand and by_hand.rope_type >= 0 else rope_type
        self.anchor, self.stair_width = 0, 1
        self.n = 0
        llama_cpp.llama_memory_clear(context.memory, True)

    def read_chunks(self, tokens: list[int]) -> Logits:
        """The first chunk and the middle ones, each in its own sequence -> their logits."""
        first = self.starts[1]
        logits = [self.context.decode(tokens[:first])]
        for seq, (start, end) in enumerate(pairwise(self.starts[1:]), start=1):
            llama_cpp.llama_memory_seq_cp(self.context.memory, 0, seq, 0, first)
            logits.append(self.context.decode(tokens[start:end], first, seq))
            llama_cpp.llama_memory_seq_rm(self.context.memory, seq, 0, first)
        self.n = self.starts[-1]
        return np.concatenate(logits)

    def place_chunks(self, anchor: int, stair_width: int) -> None:
        """All keys to where this plan has them, and into sequence 0."""
        memory, first = self.context.memory, self.starts[1]
        borders = list(enumerate(pairwise([0, *self.starts[1:]])))
        if self.by_hand is None:
            for seq, (start, end) in borders:
                if seq > 0:
                    llama_cpp.llama_memory_seq_add(memory, seq, first, first + end - start, start - first)
                if start < anchor:
                    self._climb(seq, start, min(anchor, end), stair_width)
                if end > anchor:
                    llama_cpp.llama_memory_seq_add(memory, seq, max(anchor, start), end, anchor // stair_width - anchor)
        for seq, _ in borders[1:]:
            llama_cpp.llama_memory_seq_cp(memory, seq, 0, -1, -1)
            llama_cpp.llama_memory_seq_rm(memory, seq, -1, -1)
        if self.by_hand is not None:
            before = np.concatenate(
                [np.arange(first), *(first + np.arange(b - a) for a, b in pairwise(self.starts[1:]))]
            )
            self._place_by_hand(before, key_positions(self.n, anchor, stair_width))
        self.anchor, self.stair_width = anchor, stair_width

    def to_flash(self, context: Context) -> None:
        """On with a context that has flash attention, from the keys and values as they are without it."""
        position = self._next_position()
        self.context.decode([0], position)  # llama.cpp moves keys when it decodes
        llama_cpp.llama_memory_seq_rm(self.context.memory, 0, position, -1)
        saved = self._save()
        for cache in saved.caches:
            cache.turn_values()
        context.load(saved)
        self.context = context

    def move_anchor(self, anchor: int) -> None:
        """Forward, on the same stair: keys between the old and the new anchor climb on to it."""
        memory, before, after = self.context.memory, self.anchor, anchor
        base = before // self.stair_width
        if self.by_hand is not None:
            self._place_by_hand(
                key_positions(self.n, before, self.stair_width), key_positions(self.n, after, self.stair_width)
            )
        else:
            llama_cpp.llama_memory_seq_add(memory, 0, base, -1, before - base)  # from here on, logical positions
            self._climb(0, before, after, self.stair_width)
            llama_cpp.llama_memory_seq_add(memory, 0, after, -1, after // self.stair_width - after)
        self.anchor = anchor

    def _climb(self, seq: int, start: int, end: int, stair_width: int) -> None:
        """Keys at start ... end-1 to floor(position / stair_width). Not by llama_memory_seq_div, which in this llama.cpp
        changes positions and turns keys the other way (llama_kv_cells::pos_div adds the delta with the wrong sign)."""
        for position in range(start, end):  # ascending, so that none is met twice
            llama_cpp.llama_memory_seq_add(
                self.context.memory, seq, position, position + 1, position // stair_width - position
            )

    def _place_by_hand(self, before: NDArray[np.integer], after: Positions) -> None:
        assert self.by_hand is not None
        saved = self._save()
        cache, *windows = saved.caches
        assert np.array_equal(cache.positions, before)
        cache.positions[:] = after
        cache.positions_2d[:] = after[:, None]
        for other in windows:  # it holds the newest tokens; tests have these layers add nothing
            other.positions[:] = after[len(after) - len(other.positions) :]
        for layer, keys in enumerate(cache.keys):
            if self.by_hand.rotated is None or layer in self.by_hand.rotated:
                keys[:] = self.file.rotate(keys, after - before, layer, self.rope_type, self.by_hand)
        self.context.load(saved)

    def read(self, tokens: list[int]) -> Logits:
        """Of the last chunk and of the answer, which see everything."""
        logits = self.context.decode(tokens, self._next_position())
        self.n += len(tokens)
        return logits

    def _save(self) -> SavedSequence:
        return self.context.save(mrope=self.rope_type in (MROPE, IMROPE))

    def _next_position(self) -> int:
        return self.anchor // self.stair_width + self.n - self.anchor


def run(request: dict[str, Any]) -> dict[str, Logits]:
    """request: path, flash, by_hand (fields of ByHand, or null), short, prompt, rest: tokens; starts: chunk starts;
    plans: [anchor, stair width] before the last chunk and before each token of rest; wrong: another such plan.
    flash: flash attention from the last chunk on. Of the chunks it would round keys and values to f16, which Mesa does not.
    edge, or nothing: {start, window, chunked}; short is read again, and once more, from start on by `Context.singly`."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(request["path"].encode(), params)
    if not model:
        raise RuntimeError("the model cannot be loaded")
    out: dict[str, Logits] = {}
    prompt, rest, starts, flash = request["prompt"], request["rest"], request["starts"], request["flash"]
    edge = request.get("edge")
    tail = request["short"][edge["start"] :] if edge else []
    n_ctx = -(-max(len(request["short"]) + len(tail), len(prompt) + len(rest)) // 256) * 256

    alone = Context(model, flash, n_ctx, n_seq=2 if edge else 1)
    out["short"] = alone.plain(request["short"])
    if edge:
        llama_cpp.llama_memory_seq_rm(alone.memory, 0, edge["start"], -1)
        llama_cpp.llama_memory_seq_cp(alone.memory, 0, 1, -1, -1)
        for seq, name in enumerate(["seen", "narrow"]):
            out[name] = alone.singly(tail, seq, **edge, lost=seq)
    if starts:
        out["plain"] = alone.plain(prompt)[starts[-1] :]
    alone.close()

    if starts:
        first = starts[1]
        exact = Context(model, flash=False, n_ctx=n_ctx, n_seq=len(starts))
        chunks = [exact.plain(prompt[:first])]
        chunks += [exact.plain(prompt[:first] + prompt[start:end])[first:] for start, end in pairwise(starts[1:])]
        out["chunks"] = np.concatenate(chunks)

        by_hand = None if request["by_hand"] is None else ByHand(**request["by_hand"])
        later = Context(model, flash=True, n_ctx=n_ctx) if flash else exact
        rope_type = llama_cpp.llama_model_rope_type(model)
        for name, plans in [("whole", request["plans"]), ("wrong", [request["wrong"]])]:
            mesa = Mesa(exact, starts, by_hand, File(request["path"]), rope_type)
            chunks = mesa.read_chunks(prompt[: starts[-1]])
            (anchor, stair_width), *moves = plans
            mesa.place_chunks(anchor, stair_width)
            if flash:
                mesa.to_flash(later)
            logits = [mesa.read(prompt[starts[-1] :])]
            for token, (anchor, stair_width) in zip(rest, moves):
                assert stair_width == mesa.stair_width
                if anchor != mesa.anchor:
                    mesa.move_anchor(anchor)
                logits.append(mesa.read([token]))
            out[name] = np.concatenate([chunks, *logits])
        for context in {exact, later}:
            context.close()
    llama_cpp.llama_model_free(model)
    return out


def main() -> None:
    assert not hasattr(llama_cpp.llama_cpp._lib, "llama_mesa_version"), "this library is not the stock one"
    quiet = llama_cpp.llama_log_callback(lambda level, text, _: sys.stderr.write(text.decode()) if level == 4 else None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    for line in sys.stdin:
        np.savez(sys.argv[1], **run(json.loads(line)))
        print("done", flush=True)


if __name__ == "__main__":
    main()
