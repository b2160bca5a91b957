"""Builds the patched llama.cpp and the extension with sanitizers, and runs tests under them.

    python scripts/sanitize.py [--thread] [pytest's arguments]

AddressSanitizer and UndefinedBehaviorSanitizer with the tests of the engine; with --thread, ThreadSanitizer with the tests
of two contexts in two threads. The first finding ends the run. undefined.supp and thread.supp list what is let pass, with reasons.

OpenMP is off, because its runtime is not instrumented. Leaks are not looked for: Python has many that are none. Tests that
compare with the unpatched library bit for bit are skipped, because that one is built with other flags.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from building import ROOT, build, package

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Mode:
    """Sanitizers that go together.

    Attributes:
        folder: of the build, under build/.
        sanitizers: for the compiler.
        libraries: what Python has to load before anything else: their runtimes, and the C++ library that they hook into.
        environment: their options.
        tests: what is run without arguments.
        launcher: put before the command.
    """

    folder: str
    sanitizers: str
    libraries: tuple[str, ...]
    environment: dict[str, str]
    tests: tuple[str, ...]
    launcher: tuple[str, ...] = ()


ADDRESS = Mode(
    folder="asan",
    sanitizers="address;undefined",
    libraries=("libasan.so", "libubsan.so", "libstdc++.so"),
    environment={
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=1:strict_string_checks=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": f"halt_on_error=1:abort_on_error=1:print_stacktrace=1:suppressions={HERE / 'undefined.supp'}",
    },
    tests=(
        *("test_plan", "test_engine", "test_state", "test_c_api", "test_oracle", "test_golden", "test_bad_input"),
        *("test_llama_api", "test_threads", "test_rpc", "test_properties", "test_conversations", "test_methods"),
        *("test_kv_types", "test_archs"),
    ),
)
THREAD = Mode(
    folder="tsan",
    sanitizers="thread",
    libraries=("libtsan.so", "libstdc++.so"),
    environment={
        "TSAN_OPTIONS": f"halt_on_error=1:abort_on_error=1:second_deadlock_stack=1:suppressions={HERE / 'thread.supp'}"
    },
    tests=("test_threads",),
    launcher=(
        "setarch",
        "--addr-no-randomize",
    ),  # GCC 12's cannot place its shadow memory where kernels now put libraries
)

# note: -O1 keeps stack traces; the kernels are written with intrinsics and stay bearable. Without assert(), as in the wheel:
# ggml has some that fail where a state of NaN is read, which tests do
OPTIONS = {
    "CMAKE_BUILD_TYPE": "RelWithDebInfo",
    "CMAKE_C_FLAGS_RELWITHDEBINFO": "-O1 -g1 -DNDEBUG",
    "CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O1 -g1 -DNDEBUG",
    "GGML_OPENMP": "OFF",
}


def runtime(libraries: tuple[str, ...]) -> str:
    """The paths of libraries of the compiler's, for LD_PRELOAD."""
    compiler = os.environ.get("CXX", "c++")
    found = []
    for name in libraries:
        done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(done.stdout.strip())
        if not path.is_absolute():
            sys.exit(f"sanitize.py: {compiler} has no {name}: it takes GCC on Linux, with its sanitizers")
        found.append(str(path.resolve()))
    return " ".join(found)


def main() -> int:
    arguments = sys.argv[1:]
    mode = THREAD if "--thread" in arguments else ADDRESS
    arguments = [argument for argument in arguments if argument != "--thread"]
    folder = ROOT / "build" / mode.folder
    build(folder, {**OPTIONS, "MESA_SANITIZE": mode.sanitizers})
    site = folder / "site"
    package(folder, site)
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "PYTHONSAFEPATH": "1",
        "PYTHONMALLOC": "malloc",  # Python's own allocator hides overruns inside its arenas
        "LD_PRELOAD": runtime(mode.libraries),
        **mode.environment,
        "MESA_STOCK_LIB": str(folder / "no-stock"),
        "MESA_SANITIZED": "1",
    }
    environment.pop("CI", None)  # a missing stock library is no failure here
    arguments = arguments or [str(ROOT / "tests" / f"{name}.py") for name in mode.tests]
    # -s: a finding is printed by the dying process itself
    command = [
        *mode.launcher,
        sys.executable,
        "-m",
        "pytest",
        "-s",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(ROOT),
        *arguments,
    ]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
