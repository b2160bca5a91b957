"""Products of quantized weights and many columns (csrc/mesa-mul-mat.cpp), compared with NumPy and with ggml's own kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

import mul_mat
from flash_attention import INT, function
from mesa_gguf import ConfigError, MesaLlama, rpc
from mesa_gguf.model.bundled import bundled_model
from mul_mat import CASES, K_QUANTS, ONE_COLUMN, TYPES, Case, expected, multiply

ROUNDING = 1e-6  # of float sums


def error(got: ArrayLike, case: Case) -> float:
    """Against the largest that a product could be."""
    weights, columns = case.data()
    matrix = gguf.dequantize(weights, case.quantization)
    largest = np.linalg.norm(matrix, axis=-1).max() * np.linalg.norm(columns, axis=-1).max()
    return float(np.abs(got - expected(case)).max() / largest)


def label(case: Case) -> str:
    return f"{case.type}{'-repacked' * case.repacked}{'-experts' * bool(case.used)}-{case.rows}x{case.width}x{case.columns}"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, NDArray[np.float32]]:
    """The products of CASES by ggml's own kernels."""
    path = tmp_path_factory.mktemp("stock") / "products.npz"
    environment = {**os.environ, "MESA_KERNELS": "stock"}
    subprocess.run([sys.executable, Path(mul_mat.__file__), path], env=environment, check=True, timeout=60)
    with np.load(path) as products:
        return dict(zip(CASES, products.values(), strict=True))


def has_kernel(case: Case) -> bool:
    """Some types have one only where the processor has VNNI."""
    features = {
        name: bool(function(f"ggml_cpu_has_{name}", INT, of="ggml-cpu")())
        for name in ("avx2", "avx512_vnni", "avx_vnni")
    }
    if case.repacked or case.type in ("Q8_0", *K_QUANTS):
        return features["avx512_vnni"] or features["avx_vnni"]
    return features["avx2"]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_products(case: Case, stock: dict[Case, NDArray[np.float32]]) -> None:
    """To rounding what NumPy gives with the same rounded columns, and as near to it as ggml's own kernels."""
    assert error(stock[case], case) < ROUNDING
    ours = multiply(case)
    assert error(ours, case) < ROUNDING
    used = case.type in ONE_COLUMN if case.columns == 1 else case.used
    if (
        used and has_kernel(case) and not (case.repacked and case.type == "Q4_0")
    ):  # which ggml adds up in the same order
        assert not np.array_equal(ours, stock[case])  # the kernel was used


@given(
    case=st.builds(
        Case,
        type=st.sampled_from(TYPES),
        rows=st.integers(1, 70),
        width=st.integers(1, 45),  # blocks, at first
        columns=st.integers(1, 33),
        groups=st.integers(1, 2),
        share=st.integers(1, 3),
        permuted=st.booleans(),
        threads=st.integers(1, 3),
        seed=st.integers(0, 9),
    ),
    experts=st.one_of(st.none(), st.tuples(st.integers(1, 6), st.integers(1, 4), st.booleans())),
)
def test_any_shape(case: Case, experts: tuple[int, int, bool] | None) -> None:
    if experts is not None:
        n, used, own = max(experts[:2]), min(experts[:2]), experts[2]
        case = replace(case, groups=n, used=used, share=used if own else 1)
    case = replace(case, width=256 * (case.width // 8 + 1) if case.type in K_QUANTS else 32 * case.width)
    assert error(multiply(case), case) < ROUNDING


@pytest.mark.parametrize("name", TYPES)
def test_a_column_does_not_depend_on_the_others(name: str) -> None:
    """Bit for bit, from the number of columns on at which the kernel is used; and not on the number of threads."""
    case = Case(name, 100, 768, 50)
    weights, columns = case.data()
    whole = multiply(case)
    for n, threads in [(49, 1), (12, 2), (8, 3)]:
        part = replace(case, columns=n, threads=threads)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Case, "data", lambda self: (weights, columns[:, : self.columns]))
            np.testing.assert_array_equal(multiply(part), whole[:, :n])


@pytest.mark.parametrize("name", ONE_COLUMN)
def test_one_column_does_not_depend_on_the_threads(name: str) -> None:
    alone = multiply(Case(name, 100, 768, 1))
    for threads in (2, 3):
        np.testing.assert_array_equal(multiply(Case(name, 100, 768, 1, threads=threads)), alone)


def test_more_columns_than_are_worked_off_at_once() -> None:
    case = Case("Q4_1", 40, 1536, 1000, threads=2)
    assert error(multiply(case), case) < ROUNDING


def test_logits_of_a_quantized_model() -> None:
    """The bundled model (Q8_0) reads a text: to rounding as with ggml's kernels, and with the same likeliest tokens. A sum that differs in its
    last bit may round a column's value to the next of 255; seen: 0.5 % of the logits' deviation (rms)."""
    ours, stock = (bundled_logits(kernels) for kernels in ("mesa", "stock"))
    assert not np.array_equal(ours, stock)  # the kernel was used
    assert np.sqrt(np.mean((ours - stock) ** 2)) < 0.01 * stock.std()
    assert (ours.argmax(-1) == stock.argmax(-1)).mean() > 0.99


def bundled_logits(kernels: str) -> NDArray[np.float32]:
    program = (
        "import sys, numpy as np; from mesa_gguf import MesaConfig, MesaLlama;"
        "from mesa_gguf.model.bundled import bundled_model;"
        "llm = MesaLlama(str(bundled_model()), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,"
        " mesa=MesaConfig(enabled=False));"
        "llm.eval(np.random.default_rng(0).integers(0, llm.n_vocab(), 300).tolist());"
        "sys.stdout.buffer.write(llm.scores[:300].astype(np.float32).tobytes())"
    )
    environment = {**os.environ, "MESA_KERNELS": kernels}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True, timeout=60)
    return np.frombuffer(done.stdout, np.float32).reshape(300, -1)


def test_kernels_that_there_are_none_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip of the pen would be taken for the default."""
    monkeypatch.setenv("MESA_KERNELS", "Stock")
    with pytest.raises(ConfigError, match=r"MESA_KERNELS is 'Stock'.*set it to stock"):
        MesaLlama(str(bundled_model()))
    with pytest.raises(ConfigError, match="MESA_KERNELS"):
        rpc.serve()


def test_programs_without_python_are_warned() -> None:
    program = (
        "import numpy as np, flash_attention; one = np.ones((1, 1, 1, 64), np.float32);"
        "[flash_attention.attend(flash_attention.Case(one, one, one)) for _ in range(2)]"
    )
    environment = {**os.environ, "MESA_KERNELS": "Stock", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr.count("MESA_KERNELS is 'Stock' in the environment") == 1
