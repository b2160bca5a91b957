"""Results on disk: a line of JSON for every item as it comes, so that a run goes on where it was cut off."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import ConfigError, MesaError

KEY = ("task", "method", "length", "seed", "depth", "index")

Key = tuple[Any, ...]
Row = dict[str, Any]


def key_of(row: Row) -> Key:
    """What tells an item from all others."""
    return tuple(row[name] for name in KEY)


class Store:
    """The results of a task in a file of JSON lines, the first of which holds the settings.

    Args:
        path: made if it is not there.
        settings: what results depend on, besides their keys.

    Raises:
        ConfigError: the file was made with other settings.
        MesaError: it is no file of results.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.rows: dict[Key, Row] = {}
        settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        complete = self._read(settings) if path.exists() else 0
        if complete == 0:
            path.write_text(json.dumps({"settings": settings}, ensure_ascii=False) + "\n", encoding="utf-8")
        elif complete < path.stat().st_size:  # a line that was cut off
            with path.open("r+b") as file:
                file.truncate(complete)

    def _read(self, settings: dict[str, Any]) -> int:
        """Read what is there; returns how many bytes of it are whole lines."""
        complete = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True)):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                if number == 0:
                    changed = list(_changes(row["settings"], settings))
                else:
                    self.rows.setdefault(key_of(row), row)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise MesaError(
                    f"{self.path}: line {number + 1} is no result of mesa-gguf eval: delete the file, or use another folder"
                ) from None
            if number == 0 and changed:
                raise ConfigError(
                    f"{self.path} was made with other settings ({'; '.join(changed)}): use another folder, or delete it"
                )
            complete += len(line)
        return complete

    def add(self, rows: Iterable[Row]) -> None:
        """Append results, if they are not there yet."""
        new = {key_of(row): row for row in rows if key_of(row) not in self.rows}
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new.values())
        self.rows.update(new)

    def __contains__(self, key: Key) -> bool:
        return key in self.rows


def _changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """What differs, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {json.dumps(old, ensure_ascii=False)} there, {json.dumps(new, ensure_ascii=False)} now"
