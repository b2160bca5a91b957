"""The extension in PyTorch, to judge a checkpoint by: chunked prefill, woven positions, log-n scaling.

Not used in training. The engine does the same in C++; tests/oracle.py is the careful definition.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from training.model import Model, rotate, rotation

FIRST_CHUNK = 32
LAST_CHUNK = 100


def borders(ids: list[int], ends: set[int], chunk: int, slack: int = 64) -> list[int]:
    """Starts of the middle chunks and of the last chunk; each after a sentence end where one is near."""
    starts = [FIRST_CHUNK]
    while len(ids) - starts[-1] > chunk + LAST_CHUNK:
        wanted = starts[-1] + chunk
        starts.append(next((i for i in range(wanted, wanted - slack, -1) if ids[i - 1] in ends), wanted))
    last = max(starts[-1] + 1, len(ids) - LAST_CHUNK)
    starts.append(next((i for i in range(last, max(starts[-1], last - slack), -1) if ids[i - 1] in ends), last))
    return starts


@torch.no_grad()
def answer_logits(
    model: Model, ids: list[int], tails: list[list[int]], ends: set[int], chunk: int = 400, log_n: bool = True
) -> list[Tensor]:
    """Logits at each token of each tail (a question and its answer), every tail read right after ``ids``."""
    context, base, head_dim = model.shape.context, model.shape.rope_base, model.shape.head_dim
    starts = borders(ids, ends, chunk)
    anchor = starts[-1]
    longest = len(ids) - anchor + max(map(len, tails))
    width = max(1, math.ceil(anchor / (context - longest)))
    offset = math.ceil(anchor / width)

    # Keys and values of everything before the last chunk, from chunk-local reading.
    tokens = torch.tensor(ids)
    groups = [(0, FIRST_CHUNK), *pairwise(starts)]
    hidden = [model.token_embd[tokens[start:end]][None] for start, end in groups]
    caches: list[tuple[Tensor, Tensor]] = []
    for layer in model.layers:
        keys, values = [], []
        for i, (start, end) in enumerate(groups):
            q, k, v = layer.heads(hidden[i])
            keys.append(k)
            values.append(v)
            first = 0 if i == 0 else FIRST_CHUNK
            if i:
                k, v = torch.cat((keys[0], k), 2), torch.cat((values[0], v), 2)
            cos, sin = rotation(torch.arange(first + end - start), head_dim, base)
            visible = torch.ones(end - start, first + end - start, dtype=torch.bool).tril(first)
            q, k = rotate(q, cos[first:], sin[first:]), rotate(k, cos, sin)
            hidden[i] = layer.finish(hidden[i], F.scaled_dot_product_attention(q, k, v, attn_mask=visible))
        caches.append((torch.cat(keys, 2), torch.cat(values, 2)))

    far = offset - torch.ceil((anchor - torch.arange(anchor)) / width)
    out = []
    for tail in tails:
        text = torch.tensor(ids[anchor:] + tail)
        near = offset + torch.arange(len(text))
        cos, sin = rotation(torch.cat((far, near)), head_dim, base)
        scale = (
            torch.log(torch.arange(anchor, anchor + len(text)) + 1.0) / math.log(context) if log_n else torch.ones(1)
        )
        visible = torch.ones(len(text), anchor + len(text), dtype=torch.bool).tril(anchor)
        x = model.token_embd[text][None]
        for layer, (keys, values) in zip(model.layers, caches):
            q, k, v = layer.heads(x)
            q = rotate(q, cos[anchor:], sin[anchor:]) * scale.clamp_min(1.0)[:, None]
            k = rotate(torch.cat((keys, k), 2), cos, sin)
            attended = F.scaled_dot_product_attention(q, k, torch.cat((values, v), 2), attn_mask=visible)
            x = layer.finish(x, attended)
        out.append(model.logits(model.normed(x[0, -len(tail) :])))
    return out
