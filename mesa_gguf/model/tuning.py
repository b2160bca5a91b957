"""Numbers that were measured of a model, and kept for it: ``mesa-gguf tune`` keeps them, `MesaLlama` and the commands find them.

A model's numbers lie in a file of their own, named by the model's fingerprint, in the folder of the environment variable MESA_TUNE or in the
user's data folder. A file that is damaged, or of another version, counts as none: then the defaults are used, as without it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config import MesaConfig
from ..errors import ConfigError
from ..paths import expanded, has_home, user_data_folder
from .fingerprint import model_fingerprint

ENVIRONMENT = "MESA_TUNE"
VERSION = 1
FAR = 1e18  # beyond it a number is none that was measured
GEOMETRY = ("train_length", "reading_length", "plan")
"""Fields of `MesaConfig` that kept numbers do not go with: they are of the model's own T, and belong to their R."""


@dataclass(frozen=True)
class Tuning:
    """Numbers of a model, in place of defaults.

    Attributes:
        model: the name of its file.
        date: when they were measured.
        items: how many answers they follow from.
        gain: by how much more likely a token of an answer is than with the defaults, in nats, on those items.
    """

    reading_length: int
    chunk: int
    stair_bias: float
    log_length: int
    model: str
    date: str
    items: int
    gain: float

    @property
    def numbers(self) -> dict[str, Any]:
        """As fields of `MesaConfig`."""
        return {name: getattr(self, name) for name in ("reading_length", "chunk", "stair_bias", "log_length")}

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.numbers.items())


def default_folder() -> Path:
    """The folder of the environment variable MESA_TUNE, or the user's data folder."""
    given = os.environ.get(ENVIRONMENT)
    if given:
        return expanded(given)
    return user_data_folder() / "tune"


def find_tuning(path: Path) -> Tuning | None:
    """What is kept of a model; None: nothing, or nothing that can be read.

    Raises:
        ModelError: the model's file cannot be read.
    """
    folder = default_folder()
    try:
        if not any(folder.iterdir()):
            return None  # mostly: the fingerprint costs some milliseconds
        contents = json.loads((folder / f"{model_fingerprint(path)}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return _of(contents)


def _of(contents: Any) -> Tuning | None:
    try:
        if contents["version"] != VERSION:
            return None
        tuning = Tuning(**contents["tuning"])
        MesaConfig(**tuning.numbers)
    except (KeyError, TypeError, ConfigError):
        return None
    numbers = (*tuning.numbers.values(), tuning.items, tuning.gain)
    texts = (tuning.model, tuning.date)
    if not all(_is_finite(n) for n in numbers) or not all(isinstance(text, str) for text in texts):
        return None
    return tuning


def _is_finite(number: object) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and -FAR < number < FAR


def keep_tuning(path: Path, tuning: Tuning, measured: Mapping[str, Any]) -> Path:
    """Keep numbers of a model, in place of those before; the file.

    Args:
        measured: what they follow from, to be kept beside them.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    contents = {"version": VERSION, "tuning": asdict(tuning), "measured": dict(measured)}
    with _beside(path) as (file, new):
        new.write_text(json.dumps(contents, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(new, file)
    return file


def check_keeps(path: Path) -> None:
    """See whether numbers of a model can be kept, before they are measured.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    with _beside(path) as (file, _):
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, Path]]:
    """The file of a model's numbers, and a new one beside it, to take its place when it is whole."""
    file = default_folder() / f"{model_fingerprint(path)}.json"
    try:
        if not has_home(file.parent):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".json")
        os.close(handle)
        try:
            yield file, Path(name)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(name)
    except OSError as err:
        raise ConfigError(
            f"{file}: the numbers cannot be kept there: {err.strerror}: set {ENVIRONMENT} to another folder"
        ) from None


def forget_tuning(path: Path) -> bool:
    """Remove what is kept of a model; False: there was nothing.

    Raises:
        ConfigError: it cannot be removed.
    """
    file = default_folder() / f"{model_fingerprint(path)}.json"
    try:
        file.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as err:
        raise ConfigError(f"{file}: cannot be removed: {err.strerror}") from None
    return True


def tuned(config: MesaConfig, path: Path, train_length: int) -> tuple[MesaConfig, Tuning | None]:
    """A config whose numbers that nobody gave are those kept of the model, and these; None: they are not used.

    Numbers that are given win. Where they do not go with those that are kept, the defaults do.

    Raises:
        ModelError: the model's file cannot be read.
    """
    if not (config.enabled and config.tuned) or config.method != "mesa":
        return config, None
    if any(getattr(config, name) is not None for name in GEOMETRY) or config.stair_width != "auto":
        return config, None
    tuning = find_tuning(path)
    if tuning is None:
        return config, None
    new = replace(config, **{name: value for name, value in tuning.numbers.items() if getattr(config, name) is None})
    if new == config:
        return config, None
    try:
        new.params(train_length)
    except ConfigError:
        return config, None
    return new, tuning
