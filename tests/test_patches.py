"""The patches of llama.cpp stay hooks: few lines, few files, and they apply to the pinned source as they stand."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import pytest

from conftest import ROOT

PATCHES = sorted((ROOT / "patches").glob("*.patch"))

FILES = {
    "0001-cparams.patch": {"src/llama-cparams.h"},
    "0002-graph.patch": {"src/llama-graph.h", "src/llama-graph.cpp"},
    "0003-kv-cache.patch": {"src/llama-kv-cache.h", "src/llama-kv-cache.cpp", "src/llama-kv-cache-iswa.cpp"},
    "0004-context.patch": {"src/llama-context.h", "src/llama-context.cpp"},
    "0005-state-files.patch": {"src/llama-io.cpp", "src/llama-mmap.cpp"},
    "0006-tokenizer.patch": {"src/llama-vocab.cpp", "src/unicode.cpp"},
    "0007-cpu-attention.patch": {f"ggml/src/ggml-cpu/{name}" for name in ("ggml-cpu.c", "ggml-cpu.cpp", "ops.cpp")},
    "0008-cpu-mul-mat.patch": {f"ggml/src/ggml-cpu/{name}" for name in ("ggml-cpu.c", "repack.cpp")},
    "0009-huge-pages.patch": {"ggml/src/ggml.c"},
    "0010-concat.patch": {"ggml/src/ggml-cpu/ops.cpp"},
    "0011-cpu-abort.patch": {f"ggml/src/ggml-cpu/{name}" for name in ("ggml-cpu.c", "repack.cpp")},
}

MAX_ADDED, MAX_REMOVED = 190, 44  # lines of the whole series; now: 186 and 41


def body(patch: Path) -> list[str]:
    """The lines of all hunks."""
    text = patch.read_text()
    return [line for line in text[text.index("\n@@ ") :].splitlines() if line[:1] in ("+", "-", " ")]


def changed(sign: str) -> list[str]:
    return [
        line
        for patch in PATCHES
        for line in body(patch)
        if line.startswith(sign) and not line.startswith((sign * 3, "--- "))
    ]


def is_context(line: str) -> bool:
    return line.startswith(" ")


@pytest.fixture(scope="module")
def fetch() -> ModuleType:
    """The build's own patcher: what applies here applies in a build."""
    spec = importlib.util.spec_from_file_location("fetch_llama_cpp", ROOT / "cmake" / "fetch_llama_cpp.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(fetch: ModuleType) -> dict[str, bytes]:
    """The pinned llama.cpp, unpatched: from the download that a build keeps, or beside the stock library."""
    version, _ = fetch.read_pin(ROOT / "cmake" / "llama-cpp-python.txt")
    sdist = ROOT / "build" / "download" / f"llama_cpp_python-{version}.tar.gz"
    if sdist.exists():
        return fetch.read_sdist(sdist)
    stock = Path(os.environ.get("MESA_STOCK_LIB") or ROOT / "build" / "stock" / "lib").parent / "llama.cpp"
    if stock.is_dir():
        return fetch.read_checkout(stock)
    pytest.skip(f"the pinned llama.cpp is neither at {sdist} nor at {stock}")


def test_the_series_is_numbered() -> None:
    assert [patch.name for patch in PATCHES] == list(FILES)
    assert [int(patch.name[:4]) for patch in PATCHES] == list(range(1, len(PATCHES) + 1))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_a_patch_says_why(patch: Path) -> None:
    why = patch.read_text().split("\ndiff --git", 1)[0].strip()
    assert len(why) > 40 and why.endswith(".")


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_a_patch_touches_only_its_files(patch: Path) -> None:
    named = re.findall(r"^(?:---|\+\+\+) [ab]/(.*)$", patch.read_text(), re.MULTILINE)
    assert set(named) == FILES[patch.name]


def test_no_public_header_is_touched() -> None:
    """llama-cpp-python mirrors the public structs in ctypes."""
    assert not [name for names in FILES.values() for name in names if name.startswith(("include/", "ggml/include/"))]


def test_only_headers_with_our_prefix_are_included() -> None:
    """llama.cpp's quoted includes look in its own folder first: another name could be one of its own some day."""
    included = [name for line in changed("+") for name in re.findall(r'#include "(.*)"', line)]
    assert included and all(name.startswith(("llama-mesa-", "mesa-")) for name in included)


def test_no_patch_knows_the_method() -> None:
    """Chunks, positions and biases are csrc/'s business: the patches call llama_mesa_* and pass pointers on."""
    assert not [line for line in changed("+") if re.search(r"mesa::(?!regex_)|anchor|stair|chunk_start", line)]


def test_the_series_is_small() -> None:
    added, removed = len(changed("+")), len(changed("-"))
    print(f"\n{added} lines added, {removed} removed")
    assert added <= MAX_ADDED
    assert removed <= MAX_REMOVED


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_hunks_hold_few_context_lines(patch: Path) -> None:
    """One on each side: llama.cpp's text is not copied here. (git needs no more, and the build checks the line numbers.)"""
    for hunk in re.split(r"^@@ .*@@.*$", patch.read_text(), flags=re.MULTILINE)[1:]:
        lines = [line for line in hunk.split("\ndiff --git", 1)[0].splitlines() if line[:1] in ("+", "-", " ")]
        marks = "".join("c" if is_context(line) else "x" for line in lines)
        before, after = len(marks) - len(marks.lstrip("c")), len(marks) - len(marks.rstrip("c"))
        assert before <= 1 and after <= 1, hunk
        assert marks.count("c") <= 6, hunk


def test_the_series_applies(fetch: ModuleType, source: dict[str, bytes]) -> None:
    """Strictly: each hunk at its line. And every file changes as the patch's header says."""
    tree = dict(source)
    for patch in PATCHES:
        fetch.apply_patch(tree, patch.read_bytes(), exact=True)
    differ = {name for name in tree if tree[name] != source.get(name)}
    assert differ == set.union(*FILES.values())


@pytest.mark.parametrize("name", ["src/llama-graph.cpp", "src/llama-context.cpp"])
def test_a_changed_source_is_refused(fetch: ModuleType, source: dict[str, bytes], name: str) -> None:
    """A llama.cpp of another version stops the build instead of being patched at the wrong place."""
    tree = dict(source)
    tree[name] = b"// another version\n" + tree[name]
    (patch,) = (patch for patch in PATCHES if name in FILES[patch.name])
    with pytest.raises(fetch.Mismatch):
        fetch.apply_patch(tree, patch.read_bytes(), exact=True)
