"""Damages model files and states, and tries each: what test_damaged.py runs in processes that may abort.

Every variant follows from a seed and its number, which is printed before it is tried.

    python damage.py gguf SOURCE FOLDER SEED BEGIN END
    python damage.py state|file MODEL FOLDER SEED BEGIN END
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import pickle
import struct
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mesa_gguf  # noqa: F401 before llama_cpp
from mesa_gguf import MesaConfig, MesaError, MesaLlama, ModelError, _core
from mesa_gguf.state import MesaState

import llama_cpp  # isort: skip
from llama_cpp import LlamaState  # isort: skip

SECONDS = 90  # a variant that takes longer hangs. note: the rehearsal stops llama.cpp itself after 60


# Where things lie in a file.


@dataclass(frozen=True)
class Field:
    """A number or a run of bytes."""

    name: str
    section: str
    start: int
    size: int
    form: str = ""  # struct format of a number


class Fields:
    """Reads a file field by field and notes where each lies."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.section = data, 0, "header"
        self.fields: list[Field] = []

    def number(self, form: str, name: str) -> Any:
        size = struct.calcsize(form)
        self.fields.append(Field(name, self.section, self.at, size, form))
        self.at += size
        return struct.unpack_from(form, self.data, self.at - size)[0]

    def run(self, size: int, name: str) -> bytes:
        self.fields.append(Field(name, self.section, self.at, size))
        self.at += size
        return self.data[self.at - size : self.at]

    def string(self, form: str, name: str) -> str:
        return self.run(self.number(form, f"length of {name}"), name).decode("latin-1")


GGUF_FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9


def gguf_fields(data: bytes) -> list[Field]:
    """All fields of a GGUF file; the weights are one. Of an array, the first elements and the rest."""
    f = Fields(data)

    def value(kind: int, key: str) -> None:
        if kind == STRING:
            f.string("<Q", f"value of {key}")
        elif kind == ARRAY:
            inner = f.number("<i", f"array type of {key}")
            n = f.number("<Q", f"array length of {key}")
            f.section = "vocabulary" if n > 100 else f.section
            for i in range(n):
                if inner != STRING and i == 4:
                    f.run((n - i) * struct.calcsize(GGUF_FORMS[inner]), f"rest of {key}")
                    break
                value(inner, f"{key}[{i}]")
            f.section = "metadata"
        else:
            f.number(GGUF_FORMS[kind], f"value of {key}")

    f.run(4, "magic")
    f.number("<I", "version")
    n_tensors, n_keys = f.number("<q", "number of tensors"), f.number("<q", "number of keys")
    f.section = "metadata"
    for _ in range(n_keys):
        key = f.string("<Q", "a key")
        value(f.number("<i", f"type of {key}"), key)
    f.section = "tensors"
    for _ in range(n_tensors):
        name = f.string("<Q", "a tensor's name")
        for i in range(f.number("<I", f"dimensions of {name}")):
            f.number("<q", f"dimension {i} of {name}")
        f.number("<i", f"type of {name}")
        f.number("<Q", f"offset of {name}")
    f.section = "data"
    f.run(len(data) - f.at, "weights")
    return f.fields


def state_fields(data: bytes) -> list[Field]:
    """All fields of the state of a Mesa context with flash attention (llama_context::state_write_data)."""
    f = Fields(data)
    f.section = "architecture"
    f.string("<I", "architecture")
    f.section = "plan"
    begin = f.number("<I", "length of the plan")
    end = f.at + begin
    for name in ("magic", "version"):
        f.number("<I", name)
    f.number("<Q", "checksum")
    for _ in range(14):
        f.number("<i", "of the numbers that the plan follows from")
    for _ in range(f.number("<i", "number of chunks")):
        f.number("<i", "start of a chunk")
    for name in ("anchor", "stair width"):
        f.number("<i", name)
    n_tokens = f.number("<i", "number of keys")
    for _ in range(n_tokens):
        f.number("<i", "position of a key")
    f.run(n_tokens, "which keys have moved")  # a byte each
    while f.at < end:
        f.number("<i", "of the plan")
    f.section = "cells"
    f.number("<I", "streams")
    n_cells = f.number("<I", "number of cells")
    for i in range(n_cells):
        f.number("<i", f"position of cell {i}")
        for _ in range(f.number("<I", f"sequences of cell {i}")):
            f.number("<i", f"sequence of cell {i}")
    f.section = "layout"
    f.number("<I", "transposed")
    n_layers = f.number("<I", "layers")
    for name in ("keys", "values"):
        for layer in range(n_layers):
            f.section = "layout"
            f.number("<i", f"type of {name} {layer}")
            size = f.number("<Q", f"row size of {name} {layer}")
            f.section = "data"
            f.run(size * n_cells, f"{name} {layer}")
    assert f.at == len(data)
    return f.fields


# What is done to it.

Damage = tuple[str, bytes]


def extreme(random: np.random.Generator, form: str, value: Any) -> bytes:
    """Another number of that form."""
    if form in ("<f", "<d"):
        others = [0.0, -1.0, 1.0, float("nan"), float("inf"), -float("inf"), -value, value * 1e6, 1e-30]
        return struct.pack(form, others[random.integers(len(others))])
    bits = 8 * struct.calcsize(form)
    others = [
        0,
        1,
        -1,
        2,
        3,
        value + 1,
        value - 1,
        2 * value,
        value // 2,
        value + 32,
        1000,
        2**15,
        2**16 - 1,
        2**31 - 1,
        2**31,
    ]
    others += [2**32 - 1, 2**32, 2**62, 2**63 - 1, int(random.integers(0, 2**31))]
    return (int(others[random.integers(len(others))]) % 2**bits).to_bytes(bits // 8, "little")


def pick(random: np.random.Generator, fields: list[Field], keep: Callable[[Field], bool]) -> Field:
    """A section first, then a field of it: sections are of very different sizes. LookupError if there is none."""
    kept = [field for field in fields if field.size and keep(field)]
    if not kept:
        raise LookupError
    sections = sorted({field.section for field in kept})
    section = sections[random.integers(len(sections))]
    kept = [field for field in kept if field.section == section]
    return kept[random.integers(len(kept))]


def edit(random: np.random.Generator, data: bytes, fields: list[Field]) -> Damage:
    frame = random.integers(4) == 0  # else the file stays one that can be parsed
    field = pick(
        random,
        fields,
        lambda f: bool(f.form) and (frame or not f.name.startswith(("length of", "number of", "array length"))),
    )
    end = field.start + field.size
    value = struct.unpack_from(field.form, data, field.start)[0]
    new = extreme(random, field.form, value)
    return f"{field.name}: {value} -> {struct.unpack(field.form, new)[0]}", data[: field.start] + new + data[end:]


def flip(random: np.random.Generator, data: bytes, fields: list[Field]) -> Damage:
    changed, places = bytearray(data), []
    for _ in range(1 + random.integers(4) // 3):
        field = pick(random, fields, lambda f: True)
        place, bit = field.start + int(random.integers(field.size)), int(random.integers(8))
        changed[place] ^= 1 << bit
        places.append(f"bit {bit} of byte {place} ({field.name})")
    return ", ".join(places), bytes(changed)


def cut(random: np.random.Generator, data: bytes, fields: list[Field]) -> Damage:
    field = pick(random, fields, lambda f: True)
    end = field.start + int(random.integers(field.size))
    return f"cut at {end} of {len(data)} ({field.name})", data[:end]


def swap(random: np.random.Generator, data: bytes, fields: list[Field]) -> Damage:
    """Two runs of fields change places."""
    a, b = sorted(int(i) for i in random.choice(len(fields), 2, replace=False))
    n = int(random.integers(1, 1 + min(8, b - a, len(fields) - b)))
    first = slice(fields[a].start, fields[a + n - 1].start + fields[a + n - 1].size)
    second = slice(fields[b].start, fields[b + n - 1].start + fields[b + n - 1].size)
    swapped = data[: first.start] + data[second] + data[first.stop : second.start] + data[first] + data[second.stop :]
    return f"{fields[a].name} and {fields[b].name} swapped, {n} fields each", swapped


def overwrite(random: np.random.Generator, data: bytes, fields: list[Field]) -> Damage:
    field = pick(random, fields, lambda f: True)
    start = field.start + int(random.integers(field.size))
    n = int(min(random.integers(1, 600), len(data) - start))
    new = [bytes(n), b"\xff" * n, random.bytes(n)][random.integers(3)]
    return f"{n} bytes from {start} ({field.name}) overwritten", data[:start] + new + data[start + n :]


def remove(random: np.random.Generator, data: bytes, fields: list[Field]) -> Damage:
    field = pick(random, fields, lambda f: True)
    n = field.size if random.integers(2) else int(random.integers(1, 600))
    return f"{n} bytes from {field.start} ({field.name}) removed", data[: field.start] + data[field.start + n :]


def insert(random: np.random.Generator, data: bytes, fields: list[Field]) -> Damage:
    field = pick(random, fields, lambda f: True)
    new = [bytes(8), random.bytes(40), data[field.start : field.start + field.size][:4096]][random.integers(3)]
    return f"{len(new)} bytes inserted at {field.start} ({field.name})", data[: field.start] + new + data[field.start :]


def respell(random: np.random.Generator, data: bytes, fields: list[Field]) -> Damage:
    """Other letters in a name or text."""
    field = pick(random, fields, lambda f: not f.form and f.section != "data")
    changed = bytearray(data)
    for _ in range(random.integers(1, 3)):
        changed[field.start + int(random.integers(field.size))] = int(
            random.choice(list(b"abcdefxyz0159._<>{}% \0\xc3\xff"))
        )
    end = field.start + field.size
    return f"{field.name}: {data[field.start : end][:40]!r} -> {bytes(changed[field.start : end][:40])!r}", bytes(
        changed
    )


def repeat(random: np.random.Generator, data: bytes, fields: list[Field]) -> Damage:
    """A field takes the contents of another one of its size: names and tokens that exist twice, numbers of something else."""
    field = pick(random, fields, lambda f: f.section != "data")
    others = [f for f in fields if f.size == field.size and bool(f.form) == bool(field.form) and f is not field]
    if not others:
        raise LookupError
    other = others[random.integers(len(others))]
    new = data[other.start : other.start + other.size]
    return f"{field.name} as {other.name}: {new[:40]!r}", data[: field.start] + new + data[field.start + field.size :]


def leave_out(random: np.random.Generator, data: bytes, fields: list[Field]) -> Damage:
    """A key of the metadata, or a tensor, is missing, and not counted."""
    first = [i for i, f in enumerate(fields) if f.name in ("length of a key", "length of a tensor's name")]
    if not first:
        raise LookupError
    i = int(random.integers(len(first)))
    start, end = fields[first[i]].start, fields[first[i + 1] if i + 1 < len(first) else -1].start
    is_key = fields[first[i]].name == "length of a key"
    (count,) = (f for f in fields if f.name == ("number of keys" if is_key else "number of tensors"))
    n = struct.unpack_from("<q", data, count.start)[0]
    changed = data[: count.start] + struct.pack("<q", n - 1) + data[count.start + 8 : start] + data[end:]
    changed = changed[: fields[-1].start - (end - start)]  # the weights begin at a multiple of 32 still
    changed += bytes(-len(changed) % 32) + data[-(-fields[-1].start // 32) * 32 :]
    return f"{fields[first[i] + 1].name} {data[start + 8 : start + 40]!r} left out", changed


WAYS = [
    edit,
    edit,
    edit,
    edit,
    flip,
    flip,
    cut,
    swap,
    overwrite,
    remove,
    insert,
    respell,
    respell,
    repeat,
    repeat,
    leave_out,
]


def damage(seed: int, number: int, data: bytes, fields: list[Field]) -> Damage:
    random = np.random.default_rng([seed, number])
    while True:
        way = WAYS[random.integers(len(WAYS))]
        with contextlib.suppress(LookupError):
            what, changed = way(random, data, fields)
            return f"{way.__name__}: {what}", changed


# Trying it.

SMALL = MesaConfig(first_chunk=12, chunk=40, last_chunk=32, room=16)  # T = 128
TEXT = "Anna's door code is 12345.\nÄhnlich: naïve 東京 🙂\t\x01 \u00ad\n" * 40


def tell(*words: object) -> None:
    print(*(str(word).replace("\n", " ") for word in words), flush=True)


def use(path: Path, number: int) -> None:
    """Everything that one does with a model, past its trained length."""
    enabled = number % 4 != 3
    small = path.stat().st_size < 2**20
    mesa = MesaConfig(enabled=False) if not enabled else SMALL if small else MesaConfig()
    llm = MesaLlama(
        path, mesa=mesa, n_ctx=1024, n_batch=256, flash_attn=number % 2 == 0, n_threads=1, n_threads_batch=1
    )
    try:
        if llama_cpp.llama_vocab_type(llm._model.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            tokens = [t % llm.n_vocab() for t in range(300)]
        else:
            tokens = llm.tokenize(TEXT.encode())[:700] or [0]
            llm.detokenize(tokens)
        llm.eval(tokens)
        for _, token in zip(range(4), llm.generate(tokens, temp=0.8)):
            llm.token_bytes(token)
        llm.load_state(llm.save_state())
        if llama_cpp.llama_vocab_type(llm._model.vocab) != llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            llm.create_completion(TEXT[:100], max_tokens=3)
            llm.create_chat_completion([{"role": "user", "content": TEXT[:100]}], max_tokens=3)
    finally:
        llm.close()


def try_gguf(source: Path, folder: Path, seed: int, begin: int, end: int) -> None:
    data = source.read_bytes()
    fields = gguf_fields(data)
    for number in range(begin, end):
        what, changed = damage(seed, number, data, fields)
        tell(number, what)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        path = folder / f"{number}.gguf"
        path.write_bytes(changed)
        try:
            use(path, number)
            error = None
        except MesaError as err:
            error = err
        path.unlink()
        assert not isinstance(error, ModelError) or str(path) in str(error), error
        tell("loaded" if error is None else f"refused {error}")


class Context:
    """A context with a long conversation in it, and what it would go on with."""

    def __init__(self, path: Path) -> None:
        options: dict[str, Any] = dict(n_ctx=512, logits_all=True, n_threads=1, n_threads_batch=1)
        self.llm = MesaLlama(path, mesa=SMALL, **options)
        random = np.random.default_rng(0)
        self.text, self.rest = random.integers(0, 128, 350).tolist(), random.integers(0, 128, 6).tolist()
        self.llm.eval(self.text)
        self.fresh = self.llm.scores[: len(self.text)].copy()
        for token in self.text[:40]:
            self.llm.eval([token])
        self.n = self.llm.n_tokens
        self.state = self.llm.save_state()
        self.plan = self.llm.plan()
        self.expected = self.go_on()

    def go_on(self) -> np.ndarray:
        """Logits of what follows the conversation."""
        self.llm.n_tokens = self.n
        for token in self.rest:
            self.llm.eval([token])
        return self.llm.scores[self.n : self.n + len(self.rest)].copy()

    def use_anything(self) -> None:
        """A context into which something was loaded, or not, works; nothing is said of the logits."""
        kv_end = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self.llm._ctx.ctx), 0) + 1
        self.llm.n_tokens = min(kv_end, 500)
        self.llm.eval(self.rest)

    def works(self) -> None:
        """As if nothing had happened."""
        self.llm.reset()
        self.llm.eval(self.text)
        assert np.array_equal(self.llm.scores[: len(self.text)], self.fresh), "the context is not what it was"


def with_bytes(state: LlamaState, data: bytes) -> LlamaState:
    """A state as other programs save it: without a checksum."""
    changed = LlamaState(**{k: v for k, v in vars(state).items() if k not in ("origin", "checksum")})
    changed.llama_state, changed.llama_state_size = data, len(data)
    return changed


def mesa_checksum(data: bytes) -> int:
    """FNV-1a, as csrc/state.cpp."""
    value = 14695981039346656037
    for byte in data:
        value = (value ^ byte) * 1099511628211 % 2**64
    return value


def forge(random: np.random.Generator, data: bytes, fields: list[Field]) -> Damage:
    """A number of the plan is edited, and the plan's checksum made to fit."""
    plan = [field for field in fields if field.name == "of the plan"]
    changed, what = bytearray(data), []
    for _ in range(random.integers(1, 3)):
        few = plan[: 40 + len(plan) // 20] if random.integers(4) else plan
        field = few[random.integers(len(few))]
        value = struct.unpack_from(field.form, data, field.start)[0]
        changed[field.start : field.start + 4] = extreme(random, field.form, value)
        what.append(
            f"number {plan.index(field)} of the plan: {value} -> {struct.unpack_from('<i', changed, field.start)[0]}"
        )
    (checksum,) = (field for field in fields if field.name == "checksum")
    start, end = plan[0].start, plan[-1].start + 4
    changed[checksum.start : checksum.start + 8] = mesa_checksum(bytes(changed[start:end])).to_bytes(8, "little")
    return ", ".join(what), bytes(changed)


def damaged_state(
    kind: str, random: np.random.Generator, variant: tuple[int, int], state: MesaState, fields: list[Field]
) -> tuple[str, Any]:
    """-> what was done, and what load_state gets: None if there is nothing to load."""
    data = state.llama_state
    if kind == "pickled":  # as in a LlamaDiskCache
        stored = pickle.dumps(state)
        ends = [Field("its beginning", "begin", 0, 1500), Field("its end", "end", len(stored) - 1500, 1500)]
        what, other = damage(*variant, stored, [*ends, Field("middle", "middle", 1500, len(stored) - 3000)])
        try:
            return what, None if other == stored else pickle.loads(other)
        except Exception as err:  # unpickling raises anything
            return f"{what}: {err!r}", None
    if kind == "forged":
        what, other = forge(random, data, fields)
        return what, with_bytes(state, other)
    what, other = damage(*variant, data, fields)
    if kind == "open":
        return what, with_bytes(state, other)
    changed = copy(state)
    changed.llama_state = other
    if variant[1] % 2:
        changed.llama_state_size = len(other)
    return what, None if other == data else changed


def try_state(path: Path, folder: Path, seed: int, begin: int, end: int) -> None:
    """Sealed states (ours, as objects and as a disk cache keeps them), open ones (llama.cpp's bytes alone), forged plans."""
    context = Context(path)
    llm, state = context.llm, context.state
    fields = state_fields(state.llama_state)
    payload = np.zeros(len(state.llama_state), bool)
    for field in fields:
        if field.section == "data":
            payload[field.start : field.start + field.size] = True

    def frame(data: bytes) -> bytes:
        """All but keys and values."""
        return np.frombuffer(data, np.uint8)[~payload].tobytes() if len(data) == len(payload) else data

    for number in range(begin, end):
        kind = ("sealed", "pickled", "open", "open", "forged")[number % 5]
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        tell(number, kind)
        what, changed = damaged_state(kind, np.random.default_rng([seed, number]), (seed, number), state, fields)
        tell(what)
        if not isinstance(changed, LlamaState):
            tell("refused", "nothing to load")
            continue
        try:
            llm.load_state(changed)
        except MesaError as err:
            tell("refused", err)
            context.use_anything()
            continue
        tell("loaded")
        if kind == "pickled":  # pickle does not look at everything; the state does
            assert np.array_equal(context.go_on(), context.expected), "a wrong state was taken"
            continue
        assert kind != "sealed", "a damaged state was taken"
        if kind == "forged":
            context.use_anything()
        elif frame(changed.llama_state) == frame(state.llama_state):
            context.go_on()  # keys and values of llama.cpp's own states may be anything
        else:
            assert np.array_equal(context.go_on(), context.expected), "a wrong state was taken"
    context.works()
    llm.load_state(state)
    assert np.array_equal(context.go_on(), context.expected)


def try_file(path: Path, folder: Path, seed: int, begin: int, end: int) -> None:
    """llama.cpp's own files: llama_state_save_file and llama_state_seq_save_file, and the sequence's bytes in memory."""
    context = Context(path)
    llm, ctx = context.llm, context.llm._ctx.ctx
    llm.load_state(context.state)
    tokens = (llama_cpp.llama_token * context.n)(*llm.input_ids[: context.n].tolist())
    whole, one = folder / "whole.bin", folder / "one.bin"
    assert llama_cpp.llama_state_save_file(ctx, str(whole).encode(), tokens, len(tokens))
    assert llama_cpp.llama_state_seq_save_file(ctx, str(one).encode(), 0, tokens, len(tokens))
    size = llama_cpp.llama_state_seq_get_size(ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(ctx, buffer, size, 0) == size
    sources = [whole.read_bytes(), one.read_bytes(), bytes(buffer)]
    out, n_out = (llama_cpp.llama_token * 512)(), ctypes.c_size_t()
    for number in range(begin, end):
        source = sources[number % 3]
        head = [
            Field("head", "head", 0, min(len(source), 4 * context.n + 200)),
            Field("plan", "plan", 4 * context.n, 8000),
        ]
        numbers = [Field("number", "numbers", i, 4, "<i") for i in range(0, len(source) - 64, 64)][:200]
        what, changed = damage(seed, number // 3, source, [*head, *numbers, Field("all", "data", 0, len(source))])
        tell(number, ("file", "sequence file", "sequence")[number % 3], what)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        target = folder / "damaged.bin"
        target.write_bytes(changed)
        _core.clear_error()
        if number % 3 == 0:
            ok = llama_cpp.llama_state_load_file(ctx, str(target).encode(), out, 512, ctypes.byref(n_out))
        elif number % 3 == 1:
            ok = llama_cpp.llama_state_seq_load_file(ctx, str(target).encode(), 0, out, 512, ctypes.byref(n_out))
        else:
            damaged = (ctypes.c_uint8 * max(1, len(changed))).from_buffer_copy(changed or b"\0")
            ok = llama_cpp.llama_state_seq_set_data(ctx, damaged, len(changed), 0)
        tell("loaded" if ok else "refused")
        if ok:
            assert llm.plan() == context.plan, "a wrong plan was taken"
        else:  # llama.cpp may have stopped half-way
            llm._ctx.kv_cache_clear()
        context.use_anything()
    context.works()


def main() -> None:
    parser = argparse.ArgumentParser(description="Try damaged files.")
    parser.add_argument("what", choices=["gguf", "state", "file"])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    for name in ("seed", "begin", "end"):
        parser.add_argument(name, type=int)
    arguments = parser.parse_args()
    act = {"gguf": try_gguf, "state": try_state, "file": try_file}[arguments.what]
    act(arguments.source, arguments.folder, arguments.seed, arguments.begin, arguments.end)
    faulthandler.cancel_dump_traceback_later()
    tell("done")


if __name__ == "__main__":
    main()
