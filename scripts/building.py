"""What the scripts here share: builds of their own under build/, and a package folder to run a build from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, options: dict[str, str], targets: Sequence[str] = (), jobs: int | None = None) -> None:
    """Configure and build the project in folder, with CMake options; exits with CMake's message where that fails.

    CMAKE_ARGS in the environment adds options, as for the wheel.
    """
    defined = [f"-D{name}={value}" for name, value in {"Python_EXECUTABLE": sys.executable, **options}.items()]
    run(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *defined, *os.environ.get("CMAKE_ARGS", "").split()])
    parallel = ["--parallel", jobs] if jobs else []
    run(["cmake", "--build", folder, *parallel, *(["--target", *targets] if targets else [])])


def package(folder: Path, site: Path) -> None:
    """Put the package, as it is in the working tree, over the compiled parts of a build: a folder for PYTHONPATH."""
    run(["cmake", "--install", folder, "--component", "mesa_gguf", "--prefix", site], quiet=True)
    shutil.copytree(
        ROOT / "mesa_gguf",
        site / "mesa_gguf",
        ignore=shutil.ignore_patterns("*.so", "*.dylib", "lib", "include", "__pycache__"),
        dirs_exist_ok=True,
    )


def run(command: Sequence[object], quiet: bool = False) -> None:
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    done = subprocess.run(words, check=False, stdout=subprocess.DEVNULL if quiet else None)
    if done.returncode:
        sys.exit(f"{Path(sys.argv[0]).name}: {words[0]} failed with exit code {done.returncode}")
