"""Tokenizes with stock llama.cpp or with ours, in a process of its own: the two cannot be loaded into one, and a crash is seen and
not suffered. One JSON request a line on standard input, one JSON answer a line on standard output.

    python tokenizer_process.py VOCABULARY

The library is that of LLAMA_CPP_LIB_PATH, or else ours.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import threading
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

if not os.environ.get("LLAMA_CPP_LIB_PATH"):
    import mesa_gguf  # noqa: F401  before any llama_cpp: it decides which library that loads

import llama_cpp

QUIET = llama_cpp.llama_log_callback(lambda level, text, _: None)
STRING = 3  # enum llama_model_kv_override_type


@cache
def vocabulary(pre: str | None) -> Any:
    """pre: the name of a pre-tokenizer; None: the file's own."""
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    overrides = (llama_cpp.llama_model_kv_override * 2)()
    if pre is not None:
        overrides[0].key = b"tokenizer.ggml.pre"
        overrides[0].tag = STRING
        overrides[0].value.val_str = pre.encode()
        params.kv_overrides = overrides
    model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)
    if not model:
        raise RuntimeError(f"the vocabulary cannot be loaded with the pre-tokenizer {pre}")
    return llama_cpp.llama_model_get_vocab(model)


def tokenize(pre: str | None, text: bytes) -> list[int]:
    n_max = 4 * len(text) + 16
    tokens = (llama_cpp.llama_token * n_max)()
    n = llama_cpp.llama_tokenize(vocabulary(pre), text, len(text), tokens, n_max, False, True)
    assert n >= 0, n
    return tokens[:n]


def digest(tokens: Sequence[int]) -> str:
    return hashlib.sha256(array("i", tokens)).hexdigest()


def counts() -> list[int]:
    """[steps of our matcher, expressions that it left to std::regex], of this thread."""
    count = getattr(llama_cpp.llama_cpp._lib, "llama_mesa_regex_counts", None)
    if count is None:
        return [0, 0]
    out = [ctypes.c_uint64(), ctypes.c_uint64()]
    count(*(ctypes.byref(value) for value in out))
    return [value.value for value in out]


def run(request: dict[str, Any]) -> list[dict[str, Any]]:
    """request: pre: names; texts: lists of [hexadecimal, how often]; digest: the tokens' hash for the tokens; stack: of the thread,
    in bytes. -> tokens, steps and unknown (as of `counts`) of each text with each name."""
    out = []
    for pre in request["pre"]:
        for pieces in request["texts"]:
            text = b"".join(bytes.fromhex(piece) * n for piece, n in pieces)
            before = counts()
            tokens: Any = tokenize(pre, text)
            steps, unknown = (after - start for after, start in zip(counts(), before))
            if request["digest"]:
                tokens = digest(tokens)
            out.append({"tokens": tokens, "steps": steps, "unknown": unknown})
    return out


def main() -> None:
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
    for line in sys.stdin:
        request = json.loads(line)
        for pre in request["pre"]:
            vocabulary(pre)
        threading.stack_size(request["stack"])
        with ThreadPoolExecutor(1) as thread:
            print(json.dumps(thread.submit(run, request).result()), flush=True)


if __name__ == "__main__":
    main()
