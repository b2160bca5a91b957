"""Train the bundled model on a CPU: one process and one thread per core, gradients averaged at every step.

    python -m training.train --out run --minutes 60

Writes ``run/checkpoint.pt`` (to go on from with the same command), ``run/model.pt`` (averaged weights) and
``run/tokenizer.json`` every few minutes.

    python -m training.train --start mesa_gguf/data/mesa-reader-q8_0.gguf --out run --minutes 56 --processes 1 \
        --lr 1e-3 --muon-lr 5e-3

goes on from a model that was trained before, all at the full length.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from training import data, export, wiring
from training import model as models
from training import tokenizer as tokenizers
from training.data import Mix, Row
from training.model import Model, Shape
from training.tokenizer import Tokenizer

#: Share of the documents that have links.
LINKED = 0.6
#: Share of the time at which a stage ends, what its batches are made of, tokens per process and step.
STAGES = (
    (0.05, Mix(length=128, copy=0.25, made_up=0.0), 1024),
    (0.22, Mix(length=256, copy=0.10, made_up=0.1), 1536),
    (1.01, Mix(length=512, copy=0.03, made_up=0.3, links=LINKED), 3072),
)
SHARPNESS = (0.55, 1.35)
HELD_OUT = 1_000_003


class Muon:
    """Orthogonalised momentum (Newton-Schulz) for matrices; each process does its share of the matrices."""

    def __init__(self, matrices: list[Tensor], momentum: float = 0.95, decay: float = 0.01) -> None:
        self.matrices, self.momentum, self.decay = matrices, momentum, decay
        self.buffers = [torch.zeros_like(m) for m in matrices]

    @torch.no_grad()
    def step(self, lr: float, rank: int, ranks: int) -> None:
        updates = [torch.zeros_like(m) for m in self.matrices]
        for i, (matrix, buffer) in enumerate(zip(self.matrices, self.buffers)):
            buffer.lerp_(matrix.grad, 1 - self.momentum)
            if i % ranks == rank:
                updates[i] = orthogonal(matrix.grad.lerp(buffer, self.momentum))
        sum_over_processes(updates)
        for matrix, update in zip(self.matrices, updates):
            matrix.mul_(1 - lr * self.decay)
            matrix.add_(update, alpha=-lr * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5)


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def sum_over_processes(tensors: list[Tensor]) -> None:
    if dist.get_world_size() == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, summed in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(summed.view_as(t))


def loss_of(model: Model, ids: Tensor, weights: Tensor, sharpness: Tensor) -> Tensor:
    """Weighted cross-entropy; the vocabulary is only looked at where a target has weight."""
    hidden = model(ids[:, :-1], sharpness).flatten(0, 1)
    at = weights[:, 1:].flatten().nonzero().squeeze(1)
    losses = F.cross_entropy(model.logits(hidden[at]), ids[:, 1:].flatten()[at], reduction="none")
    w = weights[:, 1:].flatten()[at]
    return (losses * w).sum() / w.sum()


def draw_sharpness(rng: random.Random, n_rows: int) -> Tensor:
    """Attention that is flatter or sharper than it will be, for some rows: the model has to find its facts by a wide
    margin, which later survives many more keys."""
    low, high = map(math.log, SHARPNESS)
    return torch.tensor([math.exp(rng.uniform(low, high)) if rng.random() < 0.6 else 1.0 for _ in range(n_rows)])


@torch.no_grad()
def exact_share(model: Model, ids: Tensor, rows: list[Row], *, two_hop: bool) -> float:
    """Share of the answers (with one hop, or with two) of which every token is the most likely one, so that greedy
    decoding writes it."""
    hidden = model(ids)
    right = [
        bool((model.logits(hidden[r, a.start - 1 : a.end - 1]).argmax(-1) == ids[r, a.start : a.end]).all())
        for r, row in enumerate(rows)
        for a in row.answers
        if a.two_hop == two_hop
    ]
    return sum(right) / max(1, len(right))


def rate(progress: float, step: int) -> float:
    """Warm-up, a plateau, then down to zero along a cosine."""
    decay = 1.0 if progress < 0.3 else 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.3) / 0.7)))
    return min(1.0, (step + 1) / 60) * decay


def work(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = str(args.port)
    dist.init_process_group("gloo", rank=rank, world_size=args.processes)
    tokenizer = Tokenizer.load(args.out / "tokenizer.json")
    torch.manual_seed(args.seed)
    if args.start:
        started, _ = export.load(args.start)
        model = Model(replace(started.shape, context=args.context))
        model.load_state_dict(started.state_dict())
    else:
        model = Model(Shape(len(tokenizer), context=args.context))
        wiring.wire(model)
    matrices = [p for layer in model.layers for p in layer.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    average = models.Model(model.shape)
    average.load_state_dict(model.state_dict())
    step, seen, elapsed = 0, 0, 0.0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(stored["model"])
        average.load_state_dict(stored["average"])
        adam.load_state_dict(stored["adam"])
        muon.buffers = stored["muon"]
        step, seen, elapsed = stored["step"], stored["seen"], stored["elapsed"]

    n_parameters = sum(p.numel() for p in model.parameters())
    if rank == 0:
        print(f"{n_parameters / 1e6:.2f} M parameters, {len(tokenizer)} tokens of vocabulary", flush=True)
    before, saved, loss_mean = time.time(), time.time(), 0.0
    while True:
        clock = torch.tensor([elapsed + time.time() - before], dtype=torch.float64)
        dist.broadcast(clock, 0)
        progress = clock.item() / (60 * args.minutes)
        if progress >= 1:
            break
        mix, tokens = next((mix, tokens) for end, mix, tokens in STAGES[-1 if args.start else 0 :] if progress < end)
        mix = replace(mix, length=mix.length * args.context // STAGES[-1][1].length)
        rng = random.Random(f"{args.seed}/{step}/{rank}")
        ids, weights, _ = data.batch(rng, tokenizer, mix, tokens // mix.length)
        loss = loss_of(model, ids, weights, draw_sharpness(rng, len(ids)))
        model.zero_grad()
        loss.backward()
        sum_over_processes([p.grad for p in model.parameters()])
        for p in model.parameters():
            p.grad /= args.processes
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        scale = rate(progress, step)
        adam.param_groups[0]["lr"] = args.lr * scale
        adam.step()
        muon.step(args.muon_lr * scale, rank, args.processes)
        with torch.no_grad():
            keep = min(0.995, (step + 1) / (step + 20))
            for a, p in zip(average.parameters(), model.parameters()):
                a.lerp_(p, 1 - keep)
        step += 1
        seen += ids.numel() * args.processes
        loss_mean += (loss.item() - loss_mean) * 0.05
        if rank == 0 and step % args.log_every == 0:
            rng = random.Random(HELD_OUT + step)
            shares = []
            for made_up, links in ((0.0, 0.0), (1.0, 0.0), (0.0, mix.links)):
                held, _, rows = data.batch(rng, tokenizer, Mix(mix.length, 0.0, made_up, float(links > 0)), 6)
                shares.append(exact_share(average, held, rows, two_hop=links > 0))
            now = elapsed + time.time() - before
            print(
                f"{now / 60:6.1f} min  step {step}  length {mix.length}  {seen / 1e6:.2f} M tokens  "
                f"{seen / now:.0f} tokens/s  loss {loss_mean:.3f}  exact {shares[0]:.3f}  "
                f"with made-up names {shares[1]:.3f}  two hops {shares[2]:.3f}",
                flush=True,
            )
        if rank == 0 and time.time() - saved > args.save_every:
            saved = time.time()
            save(args.out, model, average, adam, muon, step, seen, elapsed + time.time() - before)
    if rank == 0:
        save(args.out, model, average, adam, muon, step, seen, elapsed + time.time() - before)
        print(f"done: {step} steps, {seen / 1e6:.2f} M tokens", flush=True)
    dist.destroy_process_group()


def save(
    out: Path,
    model: Model,
    average: Model,
    adam: torch.optim.Optimizer,
    muon: Muon,
    step: int,
    seen: int,
    elapsed: float,
) -> None:
    models.save(average, out / "model.new")
    os.replace(out / "model.new", out / "model.pt")
    torch.save(
        {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "adam": adam.state_dict(),
            "muon": muon.buffers,
            "step": step,
            "seen": seen,
            "elapsed": elapsed,
        },
        out / "checkpoint.new",
    )
    os.replace(out / "checkpoint.new", out / "checkpoint.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--start", type=Path, help="a GGUF file that training.export wrote: go on from its weights")
    parser.add_argument("--context", type=int, default=Shape.context, help="T, the longest text that it is trained on")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--muon-lr", type=float, default=0.012)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--port", type=int, default=29511)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=float, default=120, help="seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.json").exists():
        tokenizer = export.load(args.start)[1] if args.start else tokenizers.build()
        tokenizer.save(args.out / "tokenizer.json")
    torch.multiprocessing.spawn(work, (args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
