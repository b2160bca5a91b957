"""Texts: what UTF-8 cannot hold of those from outside, and numbers in messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import PromptError


def check_text(value: Any, name: str) -> None:
    """Refuse lone surrogates in a text, or in the texts of a message, schema or list of them.

    Python makes them of bytes that are not UTF-8 (errors="surrogateescape"), and json.loads of half an escaped pair.

    Raises:
        PromptError: there is one; names where.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as err:
            raise PromptError(
                f"{name} is not text: its character {err.start} is a lone surrogate (U+{ord(value[err.start]):04X}), "
                "as Python makes of bytes that are not UTF-8"
            ) from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_text(key, f"a name in {name}")
            check_text(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_text(item, f"{name}[{i}]")


def counted(n: int, what: str) -> str:
    """So many of something: "1 chunk", "2 chunks"."""
    return f"{n} {what}{'s' * (n != 1)}"
