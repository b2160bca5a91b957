"""How texts of different lengths are cut, and how much of full attention it takes to read them.

python examples/plan_lengths.py [MODEL.gguf]
"""

import sys

from mesa_gguf import MesaConfig
from mesa_gguf.model.header import check_model
from mesa_gguf.model.hub import find_model
from mesa_gguf.reading.plans import format_line, summarize

train_length = check_model(find_model(sys.argv[1] if len(sys.argv) > 1 else None)).train_length
for config in (MesaConfig(), MesaConfig(chunk=train_length // 4)):
    print("all defaults" if config == MesaConfig() else f"middle chunks of {config.chunk} tokens")
    for times in (1, 2, 4, 16, 64):
        n_tokens = times * train_length
        plan = config.make_plan(n_tokens, train_length)
        print(f"  {format_line(summarize(plan, n_tokens, config.params(train_length)))}")
