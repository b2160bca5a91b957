"""ggml's multiplication of matrices on the CPU, alone; and what it should give, with NumPy.

    python tests/mul_mat.py FILE                    the products of CASES into an .npz file
    python tests/mul_mat.py --speed ROWSxWIDTHxCOLUMNS[xEXPERTSxUSED] [TYPE...]     how many products a second of processor time

With MESA_KERNELS=stock both are ggml's own.
"""

from __future__ import annotations

import ctypes
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from mesa_gguf.rpc import bindings  # llama_cpp, with the library of this package

Floats = NDArray[np.float32]

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_F32, _I32 = 0, 26
_CPU = 0  # enum ggml_backend_dev_type


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (_POINTER, [_InitParams]),
    "ggml_free": (None, [_POINTER]),
    "ggml_new_tensor": (_POINTER, [_POINTER, ctypes.c_int, ctypes.c_int, ctypes.POINTER(_INT)]),
    "ggml_permute": (_POINTER, [_POINTER, _POINTER, *[ctypes.c_int] * 4]),
    "ggml_mul_mat": (_POINTER, [_POINTER] * 3),
    "ggml_mul_mat_id": (_POINTER, [_POINTER] * 4),
    "ggml_nbytes": (ctypes.c_size_t, [_POINTER]),
    "ggml_new_graph": (_POINTER, [_POINTER]),
    "ggml_build_forward_expand": (None, [_POINTER] * 2),
    "ggml_quantize_chunk": (ctypes.c_size_t, [ctypes.c_int, _POINTER, _POINTER, _INT, _INT, _INT, _POINTER]),
    "ggml_backend_init_by_type": (_POINTER, [ctypes.c_int, _POINTER]),
    "ggml_backend_free": (None, [_POINTER]),
    "ggml_backend_get_device": (_POINTER, [_POINTER]),
    "ggml_backend_dev_backend_reg": (_POINTER, [_POINTER]),
    "ggml_backend_reg_get_proc_address": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "ggml_backend_alloc_ctx_tensors": (_POINTER, [_POINTER] * 2),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, [_POINTER] * 2),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_POINTER]),
    "ggml_backend_buffer_free": (None, [_POINTER]),
    "ggml_backend_tensor_set": (None, [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_graph_compute": (ctypes.c_int, [_POINTER] * 2),
}


@cache
def _ggml(name: str) -> Any:
    bindings.llama_supports_rpc()  # loads the backends
    function = getattr(bindings._lib, name)
    function.restype, function.argtypes = _PROTOTYPES[name]
    return function


@dataclass(frozen=True)
class Case:
    """`groups` matrices of `rows` rows of `width` weights, each multiplied with `share` matrices of `columns` columns.

    Where `used` is given the matrices are experts: each of `columns` tokens is multiplied with `used` of them, one column for all of them
    (`share` = 1), or one for each.
    """

    type: str
    rows: int
    width: int
    columns: int
    groups: int = 1
    share: int = 1
    permuted: bool = False  # the columns of the matrices take turns in memory
    repacked: bool = False  # in the layout that ggml brings the weights into when it loads a model
    threads: int = 1
    seed: int = 0
    used: int = 0

    @property
    def quantization(self) -> gguf.GGMLQuantizationType:
        return gguf.GGMLQuantizationType[self.type]

    def data(self) -> tuple[NDArray[np.uint8], Floats]:
        """Weights as ggml quantizes them [groups, rows, bytes], and columns [groups*share, columns, width]."""
        random = np.random.default_rng(self.seed)
        weights = random.normal(0.1, 1, (self.groups, self.rows, self.width)).astype(np.float32)
        batches = (self.share if self.used else self.groups * self.share, self.columns)
        columns = random.normal(0.1, 1, (*batches, self.width)).astype(np.float32)
        columns[..., : self.width // 3] *= np.float32(10)
        columns[:, 0, : self.width // 2] = 0  # blocks of zeros
        return quantize(weights, self.quantization), columns

    def experts(self) -> NDArray[np.int32]:
        """Which ones each token uses [columns, used]; the first ones more often."""
        random = np.random.default_rng(self.seed + 1)
        likely = random.random((self.columns, self.groups)) / (1 + np.arange(self.groups))
        return np.argsort(-likely, axis=-1)[:, : self.used].astype(np.int32)


def quantize(weights: Floats, kind: gguf.GGMLQuantizationType) -> NDArray[np.uint8]:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    *outer, width = weights.shape
    out = np.empty((*outer, width // block * size), np.uint8)
    rows = weights.size // width
    done = _ggml("ggml_quantize_chunk")(kind, weights.ctypes.data, out.ctypes.data, 0, rows, width, None)
    assert done == out.size
    return out


class _Op:
    """Tensors and the CPU backend that computes one of them."""

    def __init__(self, threads: int) -> None:
        self._backend = _ggml("ggml_backend_init_by_type")(_CPU, None)
        self._device = _ggml("ggml_backend_get_device")(self._backend)
        self._function(b"ggml_backend_set_n_threads", None, _POINTER, ctypes.c_int)(self._backend, threads)
        self.context, self._weights = (_ggml("ggml_init")(_InitParams(1 << 20, None, True)) for _ in range(2))
        self._inputs: list[tuple[int, NDArray[Any]]] = []

    def _function(self, name: bytes, restype: Any, *argtypes: Any) -> Any:
        registry = _ggml("ggml_backend_dev_backend_reg")(self._device)
        return ctypes.CFUNCTYPE(restype, *argtypes)(_ggml("ggml_backend_reg_get_proc_address")(registry, name))

    def tensor(self, kind: int, shape: tuple[int, ...], values: NDArray[Any], weights: bool = False) -> int:
        dims = (_INT * len(shape))(*shape)
        context = self._weights if weights else self.context
        tensor: int = _ggml("ggml_new_tensor")(context, kind, len(shape), dims)
        self._inputs.append((tensor, np.ascontiguousarray(values)))
        return tensor

    def _repacking(self) -> int | None:
        """The type of buffer that repacks, where this build has it."""
        get = self._function(b"ggml_backend_dev_get_extra_bufts", ctypes.POINTER(_POINTER), _POINTER)
        for kind in get(self._device) or ():
            if kind is None:
                break
            if _ggml("ggml_backend_buft_name")(kind) == b"CPU_REPACK":
                return int(kind)
        return None

    def compute(
        self, tensor: int, shape: tuple[int, ...], times: list[float] | None = None, repacked: bool = False
    ) -> Floats:
        """The tensor's values; computed eleven times over where `times` asks for the seconds of the processor that it takes."""
        graph = _ggml("ggml_new_graph")(self.context)
        _ggml("ggml_build_forward_expand")(graph, tensor)
        kind = self._repacking() if repacked else None
        buffers = [
            _ggml("ggml_backend_alloc_ctx_tensors_from_buft")(self._weights, kind)
            if kind
            else _ggml("ggml_backend_alloc_ctx_tensors")(self._weights, self._backend),
            _ggml("ggml_backend_alloc_ctx_tensors")(self.context, self._backend),
        ]
        for given, values in self._inputs:
            assert values.nbytes == _ggml("ggml_nbytes")(given)
            _ggml("ggml_backend_tensor_set")(given, values.ctypes.data, 0, values.nbytes)
        for _ in range(1 if times is None else 11):
            start = time.process_time()
            status = _ggml("ggml_backend_graph_compute")(self._backend, graph)
            assert status == 0
            if times is not None:
                times.append(time.process_time() - start)
        out = np.empty(shape, np.float32)
        _ggml("ggml_backend_tensor_get")(tensor, out.ctypes.data, 0, out.nbytes)
        for buffer in buffers:
            _ggml("ggml_backend_buffer_free")(buffer)
        for context in (self.context, self._weights):
            _ggml("ggml_free")(context)
        _ggml("ggml_backend_free")(self._backend)
        return out


def multiply(case: Case, times: list[float] | None = None) -> Floats:
    """What ggml computes: [groups*share, columns, rows], of experts [used, columns, rows]."""
    weights, columns = case.data()
    op = _Op(case.threads)
    shape = (case.width, case.rows, case.groups)[: 2 if case.repacked and not case.used else 3]
    matrix = op.tensor(case.quantization, shape, weights, weights=True)
    if case.used:
        x = op.tensor(_F32, (case.width, case.share, case.columns), columns.swapaxes(0, 1))
        ids = op.tensor(_I32, (case.used, case.columns), case.experts())
        product = _ggml("ggml_mul_mat_id")(op.context, matrix, x, ids)
        return op.compute(product, (case.columns, case.used, case.rows), times, case.repacked).swapaxes(0, 1)
    batches = case.groups * case.share
    if case.permuted:
        x = op.tensor(_F32, (case.width, batches, case.columns), columns.swapaxes(0, 1))
        x = _ggml("ggml_permute")(op.context, x, 0, 2, 1, 3)
    else:
        x = op.tensor(_F32, (case.width, case.columns, batches), columns)
    product = _ggml("ggml_mul_mat")(op.context, matrix, x)
    return op.compute(product, (batches, case.columns, case.rows), times, case.repacked)


# What it should be.


def rounded(columns: Floats) -> tuple[Floats, Floats]:
    """Columns as q8_0 holds them, and the sum of each block as q8_1 holds it."""
    blocks = columns.reshape(*columns.shape[:-1], -1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    scale = largest / np.float32(127)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    codes = np.rint(blocks * inverse)
    sums = (scale * codes.sum(-1, keepdims=True)).astype(np.float16)
    return (codes * scale.astype(np.float16)).reshape(columns.shape), sums[..., 0].astype(np.float32)


def rounded_k(columns: Floats) -> NDArray[np.float64]:
    """Columns as q8_K holds them: a scale for 256 values, so that the largest becomes -127."""
    blocks = columns.reshape(*columns.shape[:-1], -1, 256)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    inverse = np.divide(np.float32(-127), largest, out=np.zeros_like(largest), where=largest != 0)
    codes = np.minimum(np.rint(blocks * inverse), 127)
    scale = np.divide(np.float32(1), inverse, out=np.zeros_like(largest), where=largest != 0)
    return (codes.astype(np.float64) * scale).reshape(columns.shape)


def expected(case: Case) -> NDArray[np.float64]:
    weights, columns = case.data()
    if case.used:
        each = replace(case, used=0, share=case.share)
        with_all = products(each, weights, np.tile(columns, (case.groups, 1, 1)))
        with_all = with_all.reshape(case.groups, case.share, case.columns, case.rows)
        slots = np.arange(case.used) % case.share
        return with_all[case.experts().T, slots[:, None], np.arange(case.columns)]
    return products(case, weights, columns)


def products(case: Case, weights: NDArray[np.uint8], columns: Floats) -> NDArray[np.float64]:
    matrix = gguf.dequantize(weights, case.quantization).astype(np.float64)
    if case.type.endswith("K"):
        return rounded_k(columns) @ np.repeat(matrix, case.share, 0).swapaxes(1, 2)
    columns, sums = rounded(columns)
    lowest = np.zeros((case.groups, case.rows, case.width // 32))
    if case.type in ("Q4_1", "Q5_1"):  # the mins are multiplied with the sums
        blocks = weights.reshape(case.groups, case.rows, case.width // 32, -1)
        lowest = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0].astype(np.float64)
        matrix -= np.repeat(lowest, 32, -1)
    matrix, lowest = (np.repeat(part, case.share, 0).swapaxes(1, 2) for part in (matrix, lowest))
    return columns.astype(np.float64) @ matrix + sums.astype(np.float64) @ lowest


SMALL_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")
ONE_COLUMN = ("Q4_1", "Q5_0", "Q5_1")  # have a kernel for it, too
TYPES = SMALL_BLOCKS + K_QUANTS
CASES = [
    *(
        case
        for i, name in enumerate(SMALL_BLOCKS)
        for case in (
            Case(name, 576, 576, 33, seed=i),
            Case(name, 37, 1536, 8, threads=2, seed=i),
            Case(name, 9, 32, 4, seed=i),
            Case(name, 64, 96, 13, groups=2, share=3, permuted=True, threads=2, seed=i),
            Case(name, 150, 576, 1, threads=2, seed=i),
            Case(name, 50, 160, 3, seed=i),
            Case(name, 50, 160, 1, groups=4, used=3, share=3, threads=2, seed=i),
        )
    ),
    *(
        case
        for i, name in enumerate(K_QUANTS)
        for case in (
            Case(name, 200, 1280, 33, seed=i),
            Case(name, 64, 256, 13, groups=2, share=3, permuted=True, threads=2, seed=i),
        )
    ),
    *(
        case
        for i, name in enumerate(TYPES)
        for case in (
            Case(name, 40, 512, 40, groups=3, used=2, share=1, seed=i, threads=2),
            Case(name, 40, 256, 20, groups=3, used=3, share=3, seed=i),
        )
    ),
    Case("Q4_0", 72, 1440, 21, repacked=True),
    Case("Q4_0", 40, 96, 9, share=2, repacked=True),
    Case("Q4_K", 72, 1280, 21, repacked=True),
    Case("Q4_K", 40, 256, 9, share=2, repacked=True),
    Case("Q4_0", 72, 1440, 30, groups=3, used=2, repacked=True, threads=2),
    Case("Q4_K", 40, 1280, 30, groups=3, used=2, share=2, repacked=True, threads=2),
]


def main(arguments: list[str]) -> None:
    if arguments[0] != "--speed":
        np.savez(arguments[0], *[multiply(case) for case in CASES])
        return
    rows, width, columns, experts, used = [*map(int, arguments[1].split("x")), 1, 0][:5]
    for name in arguments[2:] or TYPES:
        times: list[float] = []
        case = Case(name, rows, width, columns, experts, repacked=name in ("Q4_0", "Q4_K"), used=used)
        multiply(case, times)
        n = rows * width * columns * max(1, used)
        print(f"{name:5} {n / 1e9 / sorted(times)[len(times) // 2]:7.1f} billion products a second")


if __name__ == "__main__":
    main(sys.argv[1:])
