"""Print an answer as it is generated, and stop early.

python examples/stream.py [MODEL.gguf]
"""

import sys
from pathlib import Path

from mesa_gguf import MesaLlama, Reader
from mesa_gguf.model.hub import find_model

model = find_model(sys.argv[1] if len(sys.argv) > 1 else None)
reader = Reader(MesaLlama(model, n_ctx=4096, verbose=False))
reader.read(Path(__file__).with_name("directory.txt").read_text(encoding="utf-8"))

stream = reader.ask("Which door code belongs to the clerk of Karel Zorn?", max_tokens=64)
for piece in stream:
    print(piece, end="", flush=True)
answer = stream.answer  # the whole of it, and what it took
print(
    f"\n{answer.n_tokens} tokens, the first after {answer.first_token_seconds:.2f} s; ended by: {answer.finish_reason}"
)

with reader.ask("Which door code belongs to the clerk of Karel Zorn?") as stream:
    for piece in stream:
        print(piece, end="", flush=True)
        if "Enid" in piece:  # enough
            break
print(f" …\nended by: {stream.answer.finish_reason}")
