"""Read a text once, keep what was read in a file, and go on from there in another context.

python examples/save_state.py [MODEL.gguf]
"""

import pickle
import sys
import tempfile
import time
from pathlib import Path

from mesa_gguf import MesaLlama
from mesa_gguf.model.hub import find_model

model = find_model(sys.argv[1] if len(sys.argv) > 1 else None)
document = Path(__file__).with_name("directory.txt").read_text(encoding="utf-8").strip()
file = Path(tempfile.mkdtemp()) / "directory.state"

llm = MesaLlama(model, n_ctx=4096, verbose=False)
start = time.perf_counter()
llm.eval(llm.tokenize(f"{document}\n\n".encode()))
print(f"read {llm.n_tokens} tokens in {time.perf_counter() - start:.2f} s")
file.write_bytes(pickle.dumps(llm.save_state()))

other = MesaLlama(model, n_ctx=4096, verbose=False)
start = time.perf_counter()
other.load_state(pickle.loads(file.read_bytes()))  # note: unpickle only what you have written yourself
print(f"loaded {other.n_tokens} tokens, {file.stat().st_size / 2**20:.1f} MiB, in {time.perf_counter() - start:.2f} s")
prompt = f"{document}\n\nQuestion: What is the door code of Karel Zorn?\nAnswer:"  # its beginning is not read again
print(other.create_completion(prompt, max_tokens=64, temperature=0, stop="\n")["choices"][0]["text"].strip())
