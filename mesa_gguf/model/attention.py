"""Whether flash attention is faster on this machine's CPU: measured, for the shape of a model's heads.

It saves memory everywhere. With this package's kernel it is faster, too; ggml's own one is slower than products with a softmax between them on some
processors.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import _core
from .header import Header
from .memory import KV_TYPES

N_WINDOW, N_KEYS = 128, 1024  # queries and keys of a window: enough to tell, and some hundredths of a second of work
MOST_KEYS = 8192  # behind which a token is measured
N_WRITTEN = 256  # tokens of an answer


@dataclass(frozen=True)
class AttentionTimes:
    """Seconds that attention takes in one layer.

    Attributes:
        n_keys: those behind which a token is written.
        window, token: flash attention, of the queries of a window in a chunk, and of a token that is written.
        plain_window, plain_token: products with a softmax between them.
    """

    n_keys: int
    window: float
    token: float
    plain_window: float
    plain_token: float

    @property
    def flash_is_faster(self) -> bool:
        """For a text of n_keys tokens and an answer. It is one choice for both: the cache lies in another way without flash attention."""
        n_windows = self.n_keys / N_WINDOW
        return (
            n_windows * self.window + N_WRITTEN * self.token
            <= n_windows * self.plain_window + N_WRITTEN * self.plain_token
        )

    def __str__(self) -> str:
        return (
            f"flash attention {1e3 * self.window:.1f} ms for {N_WINDOW} tokens of a chunk and {1e3 * self.token:.2f} ms for a token behind "
            f"{self.n_keys}, without it {1e3 * self.plain_window:.1f} and {1e3 * self.plain_token:.2f}"
        )


def time_attention(
    header: Header, n_ctx: int, n_threads: int, type_k: int | None = None, type_v: int | None = None
) -> AttentionTimes | None:
    """Measure it on the CPU; None: it cannot be measured, for want of heads in the first layer, or of memory, or because no cache has heads of that
    size and type.

    Raises:
        ModelError: the model's numbers are none.
    """
    n_head = header.number("attention.head_count", layer=0)
    n_head_kv = header.number("attention.head_count_kv", n_head, layer=0)
    if n_head == 0 or n_head_kv == 0 or n_head % n_head_kv != 0:
        return None
    default = header.number("embedding_length") // n_head
    n_k, n_v = (header.number(f"attention.{name}_length", default) for name in ("key", "value"))
    type_k, type_v = (KV_TYPES["f16"] if kind is None else kind for kind in (type_k, type_v))
    n_keys = max(N_KEYS, min(n_ctx, MOST_KEYS))

    def seconds(flash: bool, n_queries: int, keys: int) -> float:
        return _core.time_attention(flash, n_head, n_head_kv, n_k, n_v, type_k, type_v, n_queries, keys, n_threads)

    try:
        for kind, length in ((type_k, n_k), (type_v, n_v)):
            _core.row_size(kind, length)
        window, plain_window = (seconds(flash, N_WINDOW, N_KEYS) for flash in (True, False))
        token, plain_token = (seconds(flash, 1, n_keys) for flash in (True, False))
    except (RuntimeError, ValueError):  # of memory; or a head is no whole blocks of its type, which llama.cpp refuses
        return None
    return AttentionTimes(n_keys, window, token, plain_window, plain_token)
