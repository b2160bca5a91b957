"""A conversation: each question comes after the questions and answers before it.

python examples/follow_up.py [MODEL.gguf]
"""

import sys
from pathlib import Path

from mesa_gguf import MesaLlama, Reader
from mesa_gguf.model.hub import find_model

model = find_model(sys.argv[1] if len(sys.argv) > 1 else None)
reader = Reader(MesaLlama(model, n_ctx=4096, verbose=False))
reader.read(Path(__file__).with_name("directory.txt").read_text(encoding="utf-8"))

questions = (
    "Which door code belongs to Mina Hirsch?",
    "What is the door code of Silas Lund?",
    "What is the door code of Tara Koch?",
)
for number, question in enumerate(questions):
    print(f"> {question}")
    # without follow_up the context is rolled back to the document's end first
    print(reader.ask(question, max_tokens=64, follow_up=number > 0).answer)
print(f"{reader.llm.n_tokens} tokens are in the context now, {reader.reading.n_tokens} of them the document's")
