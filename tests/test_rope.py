"""Which rotation a layer has (csrc/rope.cpp), on graphs built by hand: those that no model of today has, too."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT
from mesa_gguf._llama_cpp import LIBRARY_DIR

PROGRAM = """
#include "rope.h"
#include "ggml.h"

static ggml_context * ctx;

static ggml_tensor * rope(ggml_tensor * k, ggml_tensor * factors) {
    ggml_tensor * pos = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 7);
    ggml_set_input(pos);
    return ggml_rope_ext(ctx, k, pos, factors, 16, GGML_ROPE_TYPE_NEOX, 128, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f);
}

// "": it rotates and can be rotated on; "none": no rotation; else the problem
extern "C" const char * find(int number) {
    ctx = ggml_init({ 1 << 20, nullptr, true });
    ggml_tensor * k       = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 16, 2, 7);
    ggml_tensor * factors = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 8);
    ggml_tensor * many    = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 8, 4);
    ggml_tensor * weight  = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 16);
    ggml_tensor * input   = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 8);
    ggml_set_input(input);

    ggml_tensor * t = nullptr;
    switch (number) {
        case 0: t = k; break;
        case 1: t = rope(k, nullptr); break;
        case 2: t = rope(k, factors); break;
        case 3: t = ggml_mul(ctx, ggml_rms_norm(ctx, rope(k, factors), 1e-6f), weight); break;
        case 4: t = rope(k, ggml_mul(ctx, factors, factors)); break;
        case 5: t = rope(k, ggml_view_1d(ctx, many, 8, many->nb[1])); break;
        case 6: t = rope(k, input); break;
        case 7: t = ggml_add(ctx, rope(k, factors), k); break;
        case 8: t = ggml_mul(ctx, rope(k, factors), ggml_mul(ctx, weight, weight)); break;
        case 9: t = ggml_mul(ctx, ggml_mul(ctx, rope(k, factors), weight), weight); break;
    }
    const auto res = mesa::find_rope(t);
    const char * what = !res.rotates ? "none" : res.problem ? res.problem : "";
    ggml_free(ctx);
    return what;
}
"""

FACTORS, CHANGE = "frequency factors that are computed anew", "change after their rotation"
CASES = {
    0: "none",
    1: "",
    2: "",
    3: "",  # a norm after the rotation
    4: FACTORS,  # what was found in one graph is used in others: a node of it is gone by then
    5: FACTORS,
    6: FACTORS,  # an input has no value yet
    7: CHANGE,
    8: CHANGE,
    9: CHANGE,
}


def llama_cpp_source() -> Path:
    """The llama.cpp that the library was built from, in its build tree."""
    for build in (LIBRARY_DIR.resolve().parent, ROOT / "build"):
        found = sorted(build.glob("**/llama.cpp/src/llama-graph.h"))
        if found:
            return found[0].parents[1]
    pytest.skip("no llama.cpp source in a build tree")


@pytest.fixture(scope="module")
def find(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source, compiler = llama_cpp_source(), shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++)")
    folder = tmp_path_factory.mktemp("rope")
    (folder / "find.cpp").write_text(PROGRAM)
    include = [ROOT / "csrc", source / "include", source / "src", source / "ggml" / "include"]
    done = subprocess.run(
        [
            *(
                compiler,
                "-std=c++17",
                "-shared",
                "-fPIC",
                "find.cpp",
                "-o",
                "find.so",
                *(f"-I{path}" for path in include),
            ),
            *(f"-L{LIBRARY_DIR}", "-lllama", "-lggml-base", f"-Wl,-rpath,{LIBRARY_DIR}"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "find.so"))
    library.find.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("number", CASES)
def test_find_rope(find: ctypes.CDLL, number: int) -> None:
    found = find.find(number).decode()
    assert CASES[number] in found and bool(CASES[number]) == bool(found)
