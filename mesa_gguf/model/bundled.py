"""The model that comes with the package."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError

BUNDLED_NAME = "mesa-reader-q8_0.gguf"


def bundled_model() -> Path:
    """The small reader that comes with the package, trained at 512 tokens.

    Raises:
        ModelError: it was left out of this installation.
    """
    path = Path(__file__).parents[1] / "data" / BUNDLED_NAME
    if not path.is_file():
        raise ModelError(f"this installation is without the bundled model ({BUNDLED_NAME}): name another model")
    return path
