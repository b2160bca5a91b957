"""Builds the patched llama.cpp and the extension with AddressSanitizer and UndefinedBehaviorSanitizer, and runs tests under them.

    python scripts/sanitize.py [pytest's arguments]

Without arguments: the tests of the engine. The first finding ends the run. sanitizers.supp lists what is let pass, with reasons.

OpenMP is off, because its runtime is not instrumented. Leaks are not looked for: Python has many that are none. Tests that
compare with the unpatched library bit for bit are skipped, because that one is built with other flags.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from building import ROOT, build, package

FOLDER = ROOT / "build" / "asan"
SUPPRESSIONS = Path(__file__).with_name("sanitizers.supp")

TESTS = (
    *("test_plan", "test_engine", "test_state", "test_c_api", "test_oracle", "test_golden", "test_bad_input"),
    *("test_llama_api", "test_threads", "test_rpc"),
)

# note: -O1 keeps stack traces; the kernels are written with intrinsics and stay bearable. Without assert(), as in the wheel:
# ggml has some that fail where a state of NaN is read, which tests do
OPTIONS = {
    "CMAKE_BUILD_TYPE": "RelWithDebInfo",
    "CMAKE_C_FLAGS_RELWITHDEBINFO": "-O1 -g1 -DNDEBUG",
    "CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O1 -g1 -DNDEBUG",
    "MESA_SANITIZE": "address;undefined",
    "GGML_OPENMP": "OFF",
}


def runtime() -> str:
    """What Python has to load before anything else: the sanitizers' runtimes, and the C++ library that they hook into."""
    compiler = os.environ.get("CXX", "c++")
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(done.stdout.strip())
        if not path.is_absolute():
            sys.exit(f"sanitize.py: {compiler} has no {name}: it takes GCC on Linux, with its sanitizers")
        found.append(str(path.resolve()))
    return " ".join(found)


def main() -> int:
    build(FOLDER, OPTIONS)
    site = FOLDER / "site"
    package(FOLDER, site)
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "PYTHONSAFEPATH": "1",
        "PYTHONMALLOC": "malloc",  # Python's own allocator hides overruns inside its arenas
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=1:strict_string_checks=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": f"halt_on_error=1:abort_on_error=1:print_stacktrace=1:suppressions={SUPPRESSIONS}",
        "MESA_STOCK_LIB": str(FOLDER / "no-stock"),
        "MESA_SANITIZED": "1",
    }
    environment.pop("CI", None)  # a missing stock library is no failure here
    arguments = sys.argv[1:] or [str(ROOT / "tests" / f"{name}.py") for name in TESTS]
    # -s: a finding is printed by the dying process itself
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
