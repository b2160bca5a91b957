"""A small language model of real text: manual pages of the machine that it is trained on.

    python -m training.language --out run-language --steps 1500

`mesa-gguf eval ppl` needs a model that knows real text, and text that it has not seen. This makes both, where manual pages are
installed: ``mesa-language-q8_0.gguf`` and ``held-out.txt`` (long pages that are kept out of training). Neither is part of the
project: they hold what the machine's pages hold. The same pages, steps and threads give the same weights.

Trained as any model is: consecutive positions 0 … T - 1, T = 512 by default, every token counts, nothing that would suit an extension.
Two things come from the bundled model's training: the optimizer, and the start that can copy (`wiring`).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from training import export, wiring
from training import model as models
from training import tokenizer as tokenizers
from training.model import Model, Shape
from training.tokenizer import SPECIAL, Tokenizer, byte_symbols
from training.train import Muon, rate

NAME = "mesa-language"
DESCRIPTION = "A very small language model of manual pages, to measure log-loss by position with."
HELD_OUT = ("bash.1", "git-config.1", "curl.1", "gpg.1", "tmux.1", "perldiag.1", "systemd.exec.5", "proc.5")
SECTIONS = "12345678"
MAX_ALIKE = 200  # pages whose names begin alike (one program with a page for each of its thousand commands)
N_MERGES = 1760
TOKENS = 4096  # of a step


def pages(folder: Path) -> dict[str, Path]:
    """Manual pages in English by name, in a fixed order; pages that only refer to others are small, and left out."""
    found: dict[str, Path] = {}
    alike: dict[str, int] = {}
    for section in SECTIONS:
        for path in sorted((folder / f"man{section}").glob("*.gz")):
            stem = re.split(r"[-_.]", path.name)[0]
            alike[stem] = alike.get(stem, 0) + 1
            if alike[stem] <= MAX_ALIKE and path.stat().st_size > 600 and not path.is_symlink():
                found[path.name.removesuffix(".gz")] = path
    return found


def render(path: Path) -> str:
    """The page as plain text, a paragraph a line."""
    source = gzip.decompress(path.read_bytes())
    done = subprocess.run(
        ["groff", "-mandoc", "-Tutf8", "-P-cbou"], input=source, capture_output=True, check=False, timeout=60
    )
    text = done.stdout.decode(errors="replace").replace("‐\n", "")  # words that were hyphenated at a line's end
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n".join(p for p in paragraphs if p) + "\n"


def texts(folder: Path) -> tuple[list[str], str]:
    """Pages to train on, in a shuffled order, and the held-out ones, one after the other."""
    found = pages(folder)
    if not found:
        raise SystemExit(f"{folder}: no manual pages (man1/*.gz, …) are installed there")
    with ThreadPoolExecutor(2) as pool:
        rendered = dict(zip(found, pool.map(render, found.values())))
    held_out = "".join(rendered.pop(name) for name in HELD_OUT if name in rendered)
    names = sorted(rendered)
    random.Random(0).shuffle(names)
    return [rendered[name] for name in names], held_out


def learn_tokenizer(corpus: Iterator[str]) -> Tokenizer:
    """Byte-level BPE on llama-3's pre-tokenization: bytes, numbers of one to three digits, merges."""
    from tokenizers import Regex, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Learner
    from tokenizers import models as bpe

    learner = Learner(bpe.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizers.PATTERN.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    symbols = byte_symbols()
    learner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=256 + N_MERGES, initial_alphabet=symbols, show_progress=False),
    )
    learned = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learned]
    tokens = list(dict.fromkeys([*symbols, *(a + b for a, b in merges)]))
    tokens += SPECIAL
    tokens += [f"<|unused{i}|>" for i in range(-len(tokens) % 32)]
    return Tokenizer(tokens, merges)


def prepare(folder: Path, out: Path) -> tuple[Tokenizer, np.ndarray]:
    """Tokenizer and token ids of all pages, each after a bos; written to `out` the first time."""
    if not (out / "corpus.npy").exists():
        corpus, held_out = texts(folder)
        (out / "held-out.txt").write_text(held_out)
        tokenizer = learn_tokenizer(iter(corpus))
        tokenizer.save(out / "tokenizer.json")
        ids = [np.array([tokenizer.bos, *tokenizer.encode(text)], np.int16) for text in corpus]
        np.save(out / "corpus.npy", np.concatenate(ids))
        n_bytes = sum(len(text.encode()) for text in corpus)
        print(f"{len(corpus)} pages, {n_bytes / 1e6:.1f} MB; held out: {len(held_out) / 1e6:.2f} MB", flush=True)
    return Tokenizer.load(out / "tokenizer.json"), np.load(out / "corpus.npy")


def batch(rng: random.Random, ids: np.ndarray, tokenizer: Tokenizer, length: int, n_rows: int) -> torch.Tensor:
    """Token ids ``[n_rows, length]``: pieces from anywhere, a bos in front."""
    starts = [rng.randrange(len(ids) - length) for _ in range(n_rows)]
    rows = np.stack([ids[start : start + length] for start in starts]).astype(np.int64)
    rows[:, 0] = tokenizer.bos
    return torch.from_numpy(rows)


def loss_of(model: Model, ids: torch.Tensor) -> torch.Tensor:
    hidden = model(ids[:, :-1])
    return F.cross_entropy(model.logits(hidden).flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Model, tokenizer: Tokenizer, text: str, n_rows: int = 24) -> float:
    """Mean log-loss in nats of a token, on rows of T tokens."""
    ids = np.array(tokenizer.encode(text[: 400 * n_rows * 8]), np.int16)
    return float(loss_of(model, batch(random.Random(5), ids, tokenizer, model.shape.context, n_rows)))


def train(out: Path, folder: Path, context: int, steps: int, threads: int, seed: int, log_every: int) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # Muon asks how many it shares with
    tokenizer, ids = prepare(folder, out)
    held_out = (out / "held-out.txt").read_text()
    torch.manual_seed(seed)
    model = Model(Shape(len(tokenizer), n_ff=512, context=context))
    wiring.wire(model)
    matrices = [p for layer in model.layers for p in layer.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{n_parameters / 1e6:.2f} M parameters, {len(tokenizer)} tokens of vocabulary, {len(ids) / 1e6:.2f} M tokens"
    )
    start, mean = time.time(), 0.0
    for step in range(steps):
        progress = step / steps
        length = context // 2 if progress < 0.3 else context
        loss = loss_of(model, batch(random.Random(f"{seed}/{step}"), ids, tokenizer, length, TOKENS // length))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        scale = rate(progress, step)
        adam.param_groups[0]["lr"] = 3e-3 * scale
        adam.step()
        muon.step(0.015 * scale, 0, 1)
        mean = loss.item() if step == 0 else mean + 0.02 * (loss.item() - mean)
        if (step + 1) % log_every == 0 or step + 1 == steps:
            held = held_out_loss(model, tokenizer, held_out)
            speed = (step + 1) * TOKENS / (time.time() - start)
            print(f"step {step + 1}  loss {mean:.3f}  held out {held:.3f}  {speed:.0f} tokens/s", flush=True)
            models.save(model, out / "model.pt")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("run-language"))
    parser.add_argument("--man", type=Path, default=Path("/usr/share/man"), help="where manual pages are installed")
    parser.add_argument("--context", type=int, default=Shape.context, help="T, the longest text that it is trained on")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=50)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.out, args.man, args.context, args.steps, args.threads, args.seed, args.log_every)
    model, tokenizer = models.load(args.out / "model.pt"), Tokenizer.load(args.out / "tokenizer.json")
    path = args.out / export.file_name(NAME, model.shape, "q8_0")
    export.export(model, tokenizer, path, "q8_0", name=NAME, description=DESCRIPTION)
    print(path)


if __name__ == "__main__":
    main()
