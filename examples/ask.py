"""Ask a document several questions. It is read once, however long it is.

python examples/ask.py [MODEL.gguf]
"""

import sys
from pathlib import Path

from mesa_gguf import MesaLlama, Reader
from mesa_gguf.model.hub import find_model

model = find_model(sys.argv[1] if len(sys.argv) > 1 else None)  # None: the bundled model
document = Path(__file__).with_name("directory.txt").read_text(encoding="utf-8")

reader = Reader(MesaLlama(model, n_ctx=4096, verbose=False))
reading = reader.read(document)
print(f"{reading.n_tokens} tokens, {len(reading.plan.chunk_starts)} chunks, stair width {reading.plan.stair_width}")

for question in ("What is the door code of Sven Thorn?", "Which door code belongs to the teacher of Linus Engel?"):
    print(f"> {question}")
    print(reader.ask(question, max_tokens=64).answer)
