"""A start that can already copy: an induction circuit, set by hand into otherwise random weights.

Left to chance, a small model needs millions of tokens before its first "what followed the last time?" heads
appear. Here layer 0 starts with three heads that look one, two and three tokens back and note what they saw; the
heads of layers 1 and 2 look for a place where the noted tokens are the current ones, and copy what stands there.
Training then does with them what it likes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.model import Model

TOKEN = slice(0, 64)  # dimensions of the residual stream: the token itself,
BACK1 = slice(64, 128)  # the token before it,
BACK2 = slice(128, 159)  # the two before that, in fewer dimensions,
BACK3 = slice(159, 190)
CONSTANT = 191
TOKEN_SIZE, CONSTANT_SIZE = 0.08, 0.3


def orthonormal(rows: int, columns: int) -> Tensor:
    q = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns)))[0]
    return q if rows >= columns else q.T


@torch.no_grad()
def wire(model: Model) -> None:
    shape = model.shape
    if (shape.n_embd, shape.n_head, shape.head_dim) != (192, 3, 64):
        raise ValueError("the wiring is for n_embd 192 and 3 heads of 64")
    size = shape.head_dim
    frequencies = shape.rope_base ** (-torch.arange(0, size, 2) / size)
    model.token_embd.mul_(0.2)
    model.token_embd[:, TOKEN] = torch.randn(shape.n_vocab, 64) * TOKEN_SIZE
    model.token_embd[:, CONSTANT] = CONSTANT_SIZE

    look_back = model.layers[0]
    narrow = orthonormal(31, 64) * math.sqrt(64 / 31)
    for matrix in (look_back.attn_q, look_back.attn_k, look_back.attn_v, look_back.attn_output):
        matrix.mul_(0.1)
    for head, place in enumerate((BACK1, BACK2, BACK3)):
        rows = range(head * size, (head + 1) * size)
        for pair in range(10):
            angle = (head + 1) * frequencies[pair]
            at = rows[2 * pair]
            look_back.attn_q[at, CONSTANT] = 1.3
            look_back.attn_k[at, CONSTANT] = 1.3 * angle.cos()
            look_back.attn_k[at + 1, CONSTANT] = 1.3 * angle.sin()
        noted = torch.eye(64) if head == 0 else narrow
        n = noted.shape[0]
        look_back.attn_v[rows[0] : rows[n - 1] + 1, TOKEN] += 0.25 * noted
        look_back.attn_output[place, rows[0] : rows[n - 1] + 1] += 0.2 * torch.eye(n)

    for layer, heads, gain in ((model.layers[1], 3, 0.2), (model.layers[2], 2, 0.1)):
        for head in range(heads):
            slow = slice(head * size + 32, (head + 1) * size)  # the dimensions that positions hardly turn
            whole = slice(head * size, (head + 1) * size)
            one, two, three = orthonormal(32, 64), orthonormal(32, 31), orthonormal(32, 31)
            layer.attn_q[whole] *= 0.1
            layer.attn_k[whole] *= 0.1
            layer.attn_q[slow, TOKEN] += one
            layer.attn_k[slow, BACK1] += one
            layer.attn_q[slow, BACK1] += two @ narrow
            layer.attn_k[slow, BACK2] += two
            layer.attn_q[slow, BACK2] += three
            layer.attn_k[slow, BACK3] += three
            layer.attn_v[whole, TOKEN] += 0.5 * torch.eye(64)
            layer.attn_output[TOKEN, whole] += gain * torch.eye(64)
