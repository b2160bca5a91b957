"""What can go wrong, in the user's words. Each message names the cause and what to do.

An error knows its parts, so that a program can word it its own way: the command line names its options where the library names
arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Remedy:
    """An argument that would help.

    Attributes:
        option: an argument of `MesaLlama`, `MesaConfig` or of the call that failed.
        value: what to give it; None: any other.
        bound: whether the value is the least or the most that helps.
        why: what that brings.
    """

    option: str
    value: Any = None
    bound: Literal["", "or more", "or less"] = ""
    why: str = ""

    def __str__(self) -> str:
        if self.value is None:
            said = f"give another {self.option}"
        elif self.bound:
            said = f"make {self.option} {self.value} {self.bound}"
        else:
            said = f"give {self.option}={self.value!r}"
        return f"{said}, {self.why}" if self.why else said


class MesaError(Exception):
    """Base of all errors that mesa-gguf raises on purpose.

    Args:
        what: what is wrong, and where no argument helps also what to do.
        remedies: arguments that would help, each alone.
        needed: how much is needed, and
        available: how much there is, in tokens or bytes, where that is the matter.
    """

    def __init__(
        self, what: str = "", *remedies: Remedy, needed: int | None = None, available: int | None = None
    ) -> None:
        super().__init__(what, *remedies)
        self.what = what
        self.remedies = remedies
        self.needed = needed
        self.available = available

    def __str__(self) -> str:
        return f"{self.what}: {', or '.join(map(str, self.remedies))}" if self.remedies else self.what


class ModelError(MesaError, ValueError):
    """The model file cannot be used: missing, damaged, not GGUF, or of an unsupported architecture."""


class ConfigError(MesaError, ValueError):
    """Options that cannot work: a MesaConfig or MesaPlan, a grammar, a sampler's parameter."""


class PromptError(MesaError, ValueError):
    """A text that cannot be read: empty, in a wrong encoding, no text at all, or longer than n_ctx."""


class DocumentError(MesaError, ValueError):
    """A file that gives no text: of another kind than those that can be read, damaged, locked, or beyond a limit."""


class DeviceError(MesaError, ConnectionError):
    """A server that computes for this process cannot be reached, or has gone away."""


class OutOfMemoryError(MesaError, MemoryError):
    """Weights and KV cache do not fit into memory."""


class MissingPackageError(MesaError, ImportError):
    """A package that this needs, and that a light installation leaves out, is not there."""


def missing_package(what: str, package: str, extra: str) -> MissingPackageError:
    """The error to raise.

    Args:
        what: that needs it.
        package: its name.
        extra: of mesa-gguf, that brings it.
    """
    return MissingPackageError(f"{what} needs {package}, which is not installed: pip install 'mesa-gguf[{extra}]'")
