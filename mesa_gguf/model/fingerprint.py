"""What tells model files apart, fast and surely enough to keep work by it."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from ..errors import ModelError
from .header import read_header
from .hub import shards

BLOCK = 4096  # bytes looked at in each tensor
ALIGNMENT = 32  # bytes; ggml's default, where the file says nothing


def model_fingerprint(path: Path) -> str:
    """A hash of a model's whole header and of two blocks of each tensor, over all shards, as 64 hex digits.

    The header has every hyperparameter and the vocabulary; files that differ in one number of it have another fingerprint. Of the
    weights 8 KiB a tensor are looked at: fine-tuned models differ there, and so do quantizations.

    Raises:
        ModelError: a file is missing, is no GGUF file, or is damaged or cut short.
    """
    digest = hashlib.sha256()
    for shard in shards(path):
        try:
            status = shard.stat()
        except OSError as err:
            raise ModelError(f"{shard}: cannot be read: {err.strerror}") from None
        digest.update(
            _file_digest(
                str(shard), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
            )
        )
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _file_digest(path: str, device: int, inode: int, size: int, mtime_ns: int, ctime_ns: int) -> bytes:
    """The arguments besides path tell the file from another that was there before."""
    contents = read_header(Path(path))
    alignment = int(contents["metadata"].get("general.alignment", ALIGNMENT))
    offsets, end = [], 0
    for _, _, n_bytes in contents["tensors"]:  # they lie in this order, which ggml's reader makes sure of
        offsets.append((end, n_bytes))
        end += -(-n_bytes // alignment) * alignment
    start = contents["n_bytes"] - (offsets[-1][0] + offsets[-1][1] if offsets else 0)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = start
        while left > 0 and (data := file.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
        for offset, n_bytes in offsets:
            for place in {0, max(0, n_bytes // 2 - BLOCK // 2)}:
                file.seek(start + offset + place)
                digest.update(file.read(min(BLOCK, n_bytes - place)))
    return digest.digest()
