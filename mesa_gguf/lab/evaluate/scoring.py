"""What counts as found, and how sure a share is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

Z = 1.959964  # of 95 %


def n_found(expected: Sequence[str], text: str, *, exact: bool) -> int:
    """How many of the expected strings an answer gives.

    Args:
        exact: the first line has to be the one string that is expected; else each has to occur as a whole word.
    """
    if exact:
        line = text.strip().partition("\n")[0].strip()
        return sum(line == value for value in expected)
    return sum(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) is not None for value in expected)


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson's formula; (0, 1) of nothing."""
    if total == 0:
        return 0.0, 1.0
    p, zz = right / total, Z * Z
    centre, half = p + zz / (2 * total), Z * math.sqrt(p * (1 - p) / total + zz / (4 * total * total))
    low, high = (centre - half) / (1 + zz / total), (centre + half) / (1 + zz / total)
    return max(0.0, low) if right else 0.0, min(1.0, high) if right < total else 1.0


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean, by the normal approximation; of one value: that value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, mean
    half = Z * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean - half, mean + half
