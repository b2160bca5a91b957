"""Chat completion, as with llama_cpp.Llama. A model without a chat template is given one.

python examples/chat.py [MODEL.gguf]
"""

import sys
from pathlib import Path

from mesa_gguf import MesaLlama  # before llama_cpp, which then finds the library of this package
from mesa_gguf.model.hub import find_model

# isort: split
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

# what the bundled model was trained on; an answer of it ends with its line
TEMPLATE = "{{ messages[0].content }}\n\nQuestion: {{ messages[1].content }}\nAnswer:"

model = find_model(sys.argv[1] if len(sys.argv) > 1 else None)
llm = MesaLlama(model, n_ctx=4096, verbose=False)
if "tokenizer.chat_template" not in llm.metadata:
    llm.chat_handler = Jinja2ChatFormatter(TEMPLATE, eos_token="\n", bos_token="").to_chat_handler()

document = Path(__file__).with_name("directory.txt").read_text(encoding="utf-8").strip()
messages = [
    {"role": "system", "content": document},
    {"role": "user", "content": "Which door code belongs to Jakob Klein?"},
]
for part in llm.create_chat_completion(messages, max_tokens=64, temperature=0, stream=True):
    print(part["choices"][0]["delta"].get("content", ""), end="", flush=True)
print(f"\n{llm.plan()}")
