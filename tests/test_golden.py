"""The engine against two recorded runs of the authors' own program on a small F32 model with T = 512.

The anchor of L1000-E20 lies a little before the last chunk's start, and the stair of L2500-E7 reaches position 545,
past T: a plan made by hand may do both.
"""

from __future__ import annotations

import numpy as np
import pytest

from conftest import DATA, F16, F32, Q8_0, READER, Opener, read, worst
from mesa_gguf import MesaConfig, MesaPlan

# the stair of L2500-E7 leaves T, of which MesaLlama warns
pytestmark = pytest.mark.filterwarnings("ignore:the plan needs 545 positions:UserWarning")

RUNS = ["authors-L1000-E20", "authors-L2500-E7"]

# (flash attention, KV type, limit on a scale of 45). Seen: 0.0023 in f32, 0.025 with keys and values rounded to f16 (by the
# cache or by flash attention), 0.37 in q8_0.
CASES = [(False, F32, 0.01), (True, F32, 0.06), (False, F16, 0.06), (True, F16, 0.06), (True, Q8_0, 1.0)]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(("flash", "kv", "limit"), CASES)
def test_authors_logits(open_llama: Opener, name: str, flash: bool, kv: int, limit: float) -> None:
    run = np.load(DATA / f"{name}.npz")
    assert run["log_scaling"]
    plan = MesaPlan(run["chunk_starts"].tolist(), int(run["anchor"]), int(run["stair_width"]))
    llm = open_llama(READER, MesaConfig(stair_bias=0.0, log_length=512, plan=plan), kv=kv, flash=flash, n_ctx=4096)
    logits = read(llm, run["tokens"].tolist())
    assert llm.plan() == plan
    error = worst(logits[int(run["logits_from"]) :], run["logits"])
    print(f"\n{name}, flash {flash}, KV type {kv}: max |dlogit| = {error:.5f}")
    assert error <= limit


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    ("n_batch", "n_ubatch"),
    [
        (4096, 4096),
        (300, 64),
        pytest.param(4096, 512, marks=pytest.mark.slow),
        pytest.param(7, 5, marks=pytest.mark.slow),
    ],
)
def test_authors_logits_in_batches_of_any_size(open_llama: Opener, name: str, n_batch: int, n_ubatch: int) -> None:
    run = np.load(DATA / f"{name}.npz")
    plan = MesaPlan(run["chunk_starts"].tolist(), int(run["anchor"]), int(run["stair_width"]))
    llm = open_llama(
        READER, MesaConfig(stair_bias=0.0, log_length=512, plan=plan), n_ctx=4096, n_batch=n_batch, n_ubatch=n_ubatch
    )
    logits = read(llm, run["tokens"].tolist())
    assert worst(logits[int(run["logits_from"]) :], run["logits"]) <= 0.01


def test_a_plan_that_leads_past_T_warns(open_llama: Opener) -> None:
    llm = open_llama(
        READER,
        MesaConfig(stair_bias=0.0, log_length=512, plan=MesaPlan([0, 32, 482, 900], anchor=900, stair_width=2)),
        n_ctx=2048,
    )
    with pytest.warns(UserWarning, match="needs 550 positions, more than the 512"):
        llm.eval(np.arange(1000) % 200)
