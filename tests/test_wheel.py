"""The package as it is installed: from a wheel and from source, in an empty environment and away from the source tree."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import mesa_gguf
from conftest import ROOT, run_python

PROGRAM = Path(__file__).parent / "ask_a_question.py"

LOADED = """
from mesa_gguf import MesaConfig, MesaLlama
import llama_cpp
llm = MesaLlama({model!r}, n_ctx=512, mesa=MesaConfig(enabled=False), verbose=False)
llm.eval([1, 2, 3])
assert llama_cpp.llama_supports_rpc()
for line in open("/proc/self/maps"):
    if "libggml" in line or "libllama" in line:
        print(line.split(None, 5)[5].strip())
"""


def test_one_version_number() -> None:
    assert importlib.metadata.version("mesa-gguf") == mesa_gguf.__version__
    written = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if re.match(r"version\s*=", line)]
    assert not written


def test_llama_cpp_alone_says_what_it_lacks_and_can_be_imported_after_all() -> None:
    """Built with -DLLAMA_BUILD=OFF it has no library of its own."""
    (installed,) = importlib.util.find_spec("llama_cpp").submodule_search_locations
    if (Path(installed) / "lib").exists():
        pytest.skip("this llama_cpp was built with a llama.cpp of its own")
    done = run_python(
        "try:\n    import llama_cpp\nexcept FileNotFoundError as err:\n    print(err)\n"
        "import mesa_gguf, llama_cpp\nprint(hasattr(llama_cpp.llama_cpp._lib, 'llama_mesa_version'))"
    )
    assert done.stdout == "Shared library with base name 'llama' not found\nTrue\n", done.stderr


def test_llama_cpp_with_another_library_is_refused(stock_lib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(stock_lib))
    done = run_python("import llama_cpp\nimport mesa_gguf")
    assert done.returncode == 1
    assert "import mesa_gguf first" in done.stderr.splitlines()[-1]


# An empty environment.


def environment(**more: str) -> dict[str, str]:
    """Without what says to Python, pip and make where this project is."""
    ours = ("PYTHON", "MAKE", "MFLAGS", "VIRTUAL_ENV", "LLAMA_CPP", "CMAKE_ARGS", "CCACHE_BASEDIR", "MESA")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | more


def run(command: Sequence[object], cwd: Path, env: dict[str, str]) -> str:
    """-> what it printed."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-5000:]}"
    return done.stdout


def install(target: Path, folder: Path, **more: str) -> tuple[Path, str]:
    """A new environment with what README's Install says, of another target -> (its Python, what pip printed)."""
    run([sys.executable, "-m", "venv", folder / "venv"], folder, environment())
    python = folder / "venv" / "bin" / "python"
    (line,) = re.findall(r"^    (.* pip install .*) \.$", (ROOT / "README.md").read_text(), re.MULTILINE)
    words = shlex.split(line)
    command = words.index("pip")
    env = environment(**dict(word.split("=", 1) for word in words[:command]), **more)
    return python, run([python, "-m", *words[command:], "-v", target], folder, env)


def libraries(python: Path, name: str) -> list[str]:
    """Files of this name in an environment, relative to its site-packages."""
    site = next((python.parent.parent / "lib").glob("python*/site-packages"))
    return sorted(str(file.relative_to(site)) for file in site.rglob(name))


@pytest.mark.slow
@pytest.mark.timeout(5400)  # the CPU backend is compiled for each kind of CPU
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux: looks at what is mapped, and at ELF files")
def test_wheel(tmp_path: Path) -> None:
    run(["make", "wheel", f"DIST={tmp_path}"], ROOT, environment(CCACHE_BASEDIR=str(ROOT)))
    (wheel,) = tmp_path.glob("mesa_gguf-*.whl")
    folder = tmp_path / "away"
    folder.mkdir()
    python, _ = install(wheel, folder)
    assert libraries(python, "libllama*") == ["mesa_gguf/lib/libllama.so"]
    variants = libraries(python, "libggml-cpu*")
    assert len(variants) > 1, variants
    without_amx(python)

    run([python, PROGRAM], folder, environment())

    # of the files, the one for this CPU; and nothing that lies in the working directory, where ggml looks by itself
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    for file in (site / "mesa_gguf" / "lib").glob("libggml-*.so"):
        shutil.copy(file, folder)
    model = site / "mesa_gguf" / "data" / "mesa-reader-q8_0.gguf"
    mapped = set(run([python, "-c", LOADED.format(model=str(model))], folder, environment()).split())
    assert {str(Path(file).parent) for file in mapped} == {str(site / "mesa_gguf" / "lib")}
    used = {Path(file).name for file in mapped}
    assert {"libllama.so", "libggml.so", "libggml-base.so", "libggml-rpc.so"} <= used
    (cpu,) = (name for name in used if name.startswith("libggml-cpu-"))
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if flags and "avx2" in flags[1].split():
        assert cpu not in ("libggml-cpu-x64.so", "libggml-cpu-sse42.so", "libggml-cpu-sandybridge.so"), cpu


def without_amx(python: Path) -> None:
    """GCC before 11.5, 12.4 and 13.3 breaks ggml's tiles (CMakeLists.txt): there the library for such CPUs does without."""
    version = subprocess.run(
        [os.environ.get("CC", "cc"), "-dumpfullversion"], capture_output=True, text=True, check=False
    )
    number = tuple(int(part) for part in version.stdout.strip().split(".") if part.isdigit())
    fixed = {11: 5, 12: 4, 13: 3}
    if len(number) < 2 or number[1] >= fixed.get(number[0], 0) or not shutil.which("objdump"):
        return
    for name in libraries(python, "libggml-cpu-sapphirerapids.so"):
        site = next((python.parent.parent / "lib").glob("python*/site-packages"))
        code = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", site / name], capture_output=True, text=True, check=True
        )
        assert "vpdpbusd" in code.stdout  # its other instructions are there
        assert not re.search(r"\b(ldtilecfg|tdpb[a-z]+|tileloadd)\b", code.stdout)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # llama.cpp is compiled
def test_install_from_source_compiles_llama_cpp_once(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "away"
    folder.mkdir()
    ignored = shutil.ignore_patterns(".*", "build", "dist", "models", "run*", "benchmarks", "training", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    python, log = install(source, folder, CCACHE_BASEDIR=str(source))
    suffix = "dylib" if sys.platform == "darwin" else "so"
    assert libraries(python, "libllama*") == [f"mesa_gguf/lib/libllama.{suffix}"]
    assert "not used by the project" not in log
    run([python, PROGRAM], folder, environment())
