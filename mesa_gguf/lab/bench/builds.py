"""The machine, the patched library, and the unpatched one to compare with."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp

from ... import __version__, _llama_cpp, machine
from ...errors import ConfigError, MesaError

WORKER = Path(__file__).with_name("worker.py")
PROBE_TIMEOUT = 120  # seconds

# what CMake may tell besides llama.cpp's own list
CMAKE_KEYS = ("CMAKE_BUILD_TYPE", "CMAKE_C_COMPILER", "CMAKE_CXX_COMPILER", "CMAKE_C_FLAGS", "CMAKE_CXX_FLAGS")
CMAKE_SWITCHES = (
    "GGML_NATIVE",
    "GGML_OPENMP",
    "GGML_BLAS",
    "GGML_CUDA",
    "GGML_HIP",
    "GGML_METAL",
    "GGML_VULKAN",
    "GGML_LTO",
)


@dataclass(frozen=True)
class Build:
    """A llama.cpp to measure.

    Attributes:
        python: the interpreter that loads it.
        library_dir: for LLAMA_CPP_LIB_PATH; None: llama_cpp finds it by itself.
        system_info: llama.cpp's own list of what it was built with.
        cmake: what CMake's cache says, where the library lies in its build tree.
        gpus: what layers can be computed on besides the CPU.
    """

    python: str
    library_dir: Path | None
    patched: bool
    llama_cpp_python: str
    python_version: str
    system_info: str
    cmake: dict[str, str]
    gpus: list[str]

    @property
    def environment(self) -> dict[str, str]:
        """For its processes."""
        env = dict(os.environ)
        env.pop("LLAMA_CPP_LIB_PATH", None)
        if self.library_dir is not None:
            env["LLAMA_CPP_LIB_PATH"] = str(self.library_dir)
        if not _is_this_python(self.python):  # these belong to ours
            for name in ("PYTHONPATH", "PYTHONHOME"):
                env.pop(name, None)
        return env

    @property
    def json(self) -> dict[str, Any]:
        version = {"mesa_gguf": __version__} if self.patched else {}
        return {
            **version,
            "llama_cpp_python": self.llama_cpp_python,
            "python": self.python_version,
            "system_info": self.system_info,
            "cmake": self.cmake,
            "gpus": self.gpus,
        }


def patched_build() -> Build:
    """The library of this package."""
    return _probe(sys.executable, None, True)


def stock_build(python: str | None, library_dir: Path | None) -> Build:
    """An unpatched llama.cpp in another Python, in a folder, or both.

    Raises:
        ConfigError: there is none; says why.
    """
    if python is not None:
        found = shutil.which(os.path.expanduser(python))
        if found is None:
            raise ConfigError(f"{python}: there is no such program")
        python = found
    if library_dir is not None:
        library_dir = library_dir.expanduser().absolute()
        if not _has_library(library_dir):
            raise ConfigError(
                f"{library_dir}: there is no libllama: give the folder of an unpatched one (make stock builds it)"
            )
    where = " with ".join(str(part) for part in (python, library_dir) if part is not None)
    try:
        build = _probe(python or sys.executable, library_dir, False)
    except MesaError as err:
        raise ConfigError(f"{where}: llama_cpp cannot be used there: {err}") from None
    if build.patched:
        raise ConfigError(f"{where}: this llama.cpp is mesa-gguf's own: give an unpatched one")
    return build


def find_stock() -> tuple[Build | None, str]:
    """The unpatched llama.cpp that is installed: in MESA_STOCK_LIB, or llama-cpp-python's own in this Python.

    Returns:
        The build, or None and why there is none.
    """
    reasons: list[str] = []
    named = os.environ.get("MESA_STOCK_LIB")
    folders = ([Path(named)] if named else []) + [Path(path) / "lib" for path in llama_cpp.__path__]
    for folder in folders:
        if not _has_library(folder):
            if named and not reasons:
                reasons.append(f"there is no libllama in MESA_STOCK_LIB ({folder})")
            continue
        try:
            return stock_build(None, folder), ""
        except ConfigError as err:
            reasons.append(str(err))
    return None, "; ".join(reasons) or "llama-cpp-python has none of its own in this Python"


def _has_library(folder: Path) -> bool:
    return any((folder / f"libllama.{suffix}").exists() for suffix in ("so", "dylib"))


def _is_this_python(python: str) -> bool:
    # note: not resolved, the interpreters of virtual environments are links to one
    return os.path.abspath(python) == os.path.abspath(sys.executable)


def _probe(python: str, library_dir: Path | None, patched: bool) -> Build:
    build = Build(python, library_dir, patched, "", "", "", {}, [])
    answer = run_worker(build, {"patched": patched}, PROBE_TIMEOUT)
    library = Path(answer["library"]) if answer["library"] else None
    return Build(
        python=python,
        library_dir=library_dir,
        patched=answer["patched"],
        llama_cpp_python=answer["llama_cpp_python"],
        python_version=answer["python"],
        system_info=answer["system_info"],
        cmake=_cmake_facts(_llama_cpp.LIBRARY_DIR if patched else library_dir or (library.parent if library else None)),
        gpus=answer["gpus"],
    )


def run_worker(build: Build, request: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """What worker.py answers.

    Raises:
        MesaError: it failed; the first line of why.
    """
    command = [build.python, str(WORKER), json.dumps(request)]
    try:
        done = subprocess.run(
            command,
            env=build.environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout,
        )
    except OSError as err:
        raise MesaError(f"{build.python} cannot be started: {err.strerror}") from None
    except subprocess.TimeoutExpired:
        raise MesaError(f"no answer within {timeout} s") from None
    lines = done.stdout.strip().splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    except ValueError:
        answer = {}
    if done.returncode == 0 and answer:
        return answer
    if "error" in answer:
        raise MesaError(answer["error"])
    if done.returncode == -9:
        raise MesaError("killed, by the system if memory ran out")
    told = done.stderr.strip().splitlines()
    raise MesaError(f"exit code {done.returncode}: {told[-1] if told else 'it said nothing'}")


def _cmake_facts(library_dir: Path | None) -> dict[str, str]:
    """From the cache of the build tree that the folder belongs to, if there is one."""
    if library_dir is None:
        return {}
    for folder in (library_dir, library_dir.parent):
        try:
            lines = (folder / "CMakeCache.txt").read_text(errors="replace").splitlines()
        except OSError:
            continue
        entries = {
            name.partition(":")[0]: value for name, found, value in (line.partition("=") for line in lines) if found
        }
        facts = {key: entries[key] for key in CMAKE_KEYS if entries.get(key)}
        for key in ("CMAKE_C_COMPILER", "CMAKE_CXX_COMPILER"):
            if key in facts:
                facts[key] = Path(facts[key]).name
        return {**facts, **{key: entries[key] for key in CMAKE_SWITCHES if key in entries}}
    return {}


#
# the machine
#


@dataclass(frozen=True)
class Machine:
    """Where it is measured.

    Attributes:
        n_cores: logical cores that this process may use.
        memory: bytes; None if the system does not say.
        load: processes that wanted to run before anything was measured, the mean of the last minute.
    """

    cpu: str
    n_cores: int
    memory: int | None
    system: str
    load: float

    @property
    def is_busy(self) -> bool:
        """Something else is running."""
        return self.load > 0.5


def this_machine() -> Machine:
    """The machine that this process runs on."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = None
    return Machine(
        cpu_name(), n_cores(), memory, f"{platform.system()} {platform.release()}", round(os.getloadavg()[0], 2)
    )


def n_cores() -> int:
    """Logical cores that this process may use."""
    return machine.usable_cpus()


def cpu_name() -> str:
    """Of the processor, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        if done.stdout.strip():
            return done.stdout.strip()
    return platform.processor() or platform.machine()
