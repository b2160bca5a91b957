"""The model: llama architecture (RMSNorm, interleaved RoPE, SwiGLU, tied embeddings), as llama.cpp runs it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    n_vocab: int
    n_embd: int = 192
    n_layer: int = 4
    n_head: int = 3
    head_dim: int = 64
    n_ff: int = 256
    context: int = 512
    rope_base: float = 10000.0
    eps: float = 1e-5


def rotation(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[n, head_dim / 2]`` of each position's angles."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = positions.double()[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last dimension (llama.cpp's NORM order)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner = shape.n_head * shape.head_dim
        self.shape = shape
        self.attn_norm = nn.Parameter(torch.ones(shape.n_embd))
        self.ffn_norm = nn.Parameter(torch.ones(shape.n_embd))

        def matrix(rows: int, columns: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns) * scale * columns**-0.5)

        self.attn_q, self.attn_k, self.attn_v = (matrix(inner, shape.n_embd) for _ in range(3))
        self.attn_output = matrix(shape.n_embd, inner, 0.1)
        self.ffn_gate, self.ffn_up = (matrix(shape.n_ff, shape.n_embd) for _ in range(2))
        self.ffn_down = matrix(shape.n_embd, shape.n_ff, 0.1)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values ``[batch, head, token, head_dim]``, not yet rotated."""
        h = F.rms_norm(x, x.shape[-1:], self.attn_norm, self.shape.eps)
        return tuple(
            F.linear(h, w).unflatten(-1, (self.shape.n_head, -1)).transpose(1, 2)
            for w in (self.attn_q, self.attn_k, self.attn_v)
        )

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + F.linear(attended.transpose(1, 2).flatten(-2), self.attn_output)
        h = F.rms_norm(x, x.shape[-1:], self.ffn_norm, self.shape.eps)
        return x + F.linear(F.silu(F.linear(h, self.ffn_gate)) * F.linear(h, self.ffn_up), self.ffn_down)


class Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Parameter(torch.randn(shape.n_vocab, shape.n_embd) * 0.05)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layer))
        self.output_norm = nn.Parameter(torch.ones(shape.n_embd))
        cos, sin = rotation(torch.arange(shape.context), shape.head_dim, shape.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, sharpness: Tensor | None = None) -> Tensor:
        """The last hidden states ``[batch, token, n_embd]``, normed.

        ``sharpness`` ``[batch]`` multiplies the attention scores of a row (1 when None).
        """
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.token_embd[ids]
        for layer in self.layers:
            q, k, v = layer.heads(x)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if sharpness is not None:
                q = q * sharpness[:, None, None, None]
            x = layer.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.normed(x)

    def normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.output_norm, self.shape.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.token_embd.T


def save(model: Model, path: Path) -> None:
    torch.save({"shape": asdict(model.shape), "weights": model.state_dict()}, path)


def load(path: Path) -> Model:
    stored = torch.load(path, weights_only=True)
    model = Model(Shape(**stored["shape"]))
    model.load_state_dict(stored["weights"])
    return model.eval()
