"""`MesaLlama` is `llama_cpp.Llama`: what that can do works past the trained length."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LlamaGrammar
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from conftest import (
    BUNDLED,
    F32,
    Q8_0,
    READER,
    SMALL,
    ModelPath,
    Opener,
    random_tokens,
    read,
    stock_kernels,
    worst,
)
from mesa_gguf import ConfigError, MesaConfig, MesaLlama, MesaPlan, PromptError
from mesa_gguf.lab.documents import make_document
from mesa_gguf.model.attention import AttentionTimes, time_attention
from mesa_gguf.model.header import check_model

DOCUMENT = make_document(3, 1400)
PROMPT = DOCUMENT.prompt()


@pytest.fixture(scope="module")
def llm() -> Iterator[MesaLlama]:
    """The bundled model, T = 512."""
    if not BUNDLED.exists():
        reason = f"the bundled model is not at {BUNDLED}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    llm = MesaLlama(BUNDLED, n_ctx=4096, logits_all=True, n_threads=1, n_threads_batch=1)
    yield llm
    llm.close()


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    """What one test reads is no prefix for the next."""
    if "llm" in request.fixturenames:
        request.getfixturevalue("llm").reset()


def complete(llm: MesaLlama, prompt: str | list[int] = PROMPT, **options) -> str:
    return llm.create_completion(prompt, **(dict(max_tokens=40, temperature=0.0) | options))["choices"][0]["text"]


@pytest.fixture
def evaluated(llm: MesaLlama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that were decoded."""
    sizes: list[int] = []
    decode = llm._ctx.decode

    def count(batch: object) -> None:
        sizes.append(batch.n_tokens())  # type: ignore[attr-defined]
        decode(batch)

    monkeypatch.setattr(llm._ctx, "decode", count)
    return sizes


# Completion.


def test_completion(llm: MesaLlama) -> None:
    answer = llm.create_completion(PROMPT, max_tokens=8, temperature=0.0)
    assert answer["usage"]["prompt_tokens"] > 2 * llm.train_length
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["text"].strip()
    assert len(llm.plan().chunk_starts) > 3


def test_call_is_completion(llm: MesaLlama) -> None:
    assert llm(PROMPT, max_tokens=8, temperature=0.0)["choices"][0]["text"] == complete(llm, max_tokens=8)


def test_streaming_equals_not_streaming(llm: MesaLlama) -> None:
    pieces = llm.create_completion(PROMPT, max_tokens=40, temperature=0.0, stream=True)
    streamed = "".join(piece["choices"][0]["text"] for piece in pieces)
    llm.reset()
    assert streamed == complete(llm)


def test_generation_goes_on_past_the_room(llm: MesaLlama) -> None:
    """Several moves of the anchor."""
    before = llm.plan_of(llm.tokenize(PROMPT.encode()))
    complete(llm, max_tokens=300, logit_bias={llm.token_eos(): -1e9})
    assert llm.plan().anchor > before.anchor
    assert llm.plan().n_positions(llm.n_tokens) <= llm.train_length


def test_stop_strings(llm: MesaLlama) -> None:
    text = complete(llm)
    stop = text.split()[2]
    answer = llm.create_completion(PROMPT, max_tokens=40, temperature=0.0, stop=[stop])["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert answer["text"] == text[: text.index(stop)]


def test_grammar(llm: MesaLlama) -> None:
    grammar = LlamaGrammar.from_string('root ::= " " ("yes" | "no") " " [0-9] [0-9]', verbose=False)
    text = complete(llm, grammar=grammar)
    answer, number = text.split()
    assert answer in ("yes", "no")
    assert len(number) == 2 and number.isdigit()


def test_sampling_with_a_seed_repeats(llm: MesaLlama) -> None:
    texts = []
    for seed in (1, 1, 2):
        llm.reset()  # reused tokens differ in rounding, and at this temperature that can decide
        # the model is sure of its answers
        texts.append(complete(llm, temperature=5.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed, max_tokens=60))
    assert texts[0] == texts[1] != texts[2]


def test_log_probabilities(llm: MesaLlama) -> None:
    logprobs = llm.create_completion(PROMPT, max_tokens=5, temperature=0.0, logprobs=3)["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == 5
    for value, best in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert value == pytest.approx(max(best.values()))


def test_logprobs_without_the_logits_of_all_tokens(llm: MesaLlama) -> None:
    options: dict[str, Any] = dict(max_tokens=5, temperature=0.0, logprobs=3)
    light = MesaLlama(BUNDLED, n_ctx=4096, n_threads=1, n_threads_batch=1)
    try:
        with stock_kernels():  # ours round in another way where more logits are asked for
            expected = llm.create_completion(PROMPT, **options)["choices"][0]["logprobs"]
            assert light.create_completion(PROMPT, **options)["choices"][0]["logprobs"] == expected
        with pytest.raises(ConfigError, match="logits_all"):
            light.create_completion(PROMPT, echo=True, **options)
    finally:
        light.close()


def test_chat(llm: MesaLlama) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    answer = llm.create_chat_completion(messages, max_tokens=8, temperature=0.0)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["prompt_tokens"] > 2 * llm.train_length
    streamed = llm.create_chat_completion(messages, max_tokens=8, temperature=0.0, stream=True)
    text = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in streamed)
    assert text == answer["choices"][0]["message"]["content"]


# Scores.


def test_logits_of_every_token(llm: MesaLlama) -> None:
    tokens = llm.tokenize(PROMPT.encode())
    llm.eval(tokens)
    scores = llm.scores[: len(tokens)]
    assert np.isfinite(scores).all()
    assert scores.std(axis=1).min() > 0.1
    assert len(llm.eval_logits) == len(tokens)
    assert list(llm.eval_tokens) == tokens


def test_without_logits_of_every_token_the_answer_is_the_same(llm: MesaLlama) -> None:
    other = MesaLlama(BUNDLED, n_ctx=4096, n_threads=1, n_threads_batch=1)
    assert complete(other) == complete(llm)
    other.close()


# Reuse of what was read.


def test_a_second_question_reads_the_question_only(llm: MesaLlama, evaluated: list[int]) -> None:
    first, second = (DOCUMENT.prompt(fact) for fact in DOCUMENT.facts[:2])
    complete(llm, first, max_tokens=10)
    whole = sum(evaluated)
    evaluated.clear()
    complete(llm, second, max_tokens=1)
    common = llm.longest_token_prefix(llm.tokenize(first.encode()), llm.tokenize(second.encode()))
    assert whole > 1300
    assert sum(evaluated) == len(llm.tokenize(second.encode())) - common


def test_a_second_question_is_answered_as_if_it_were_the_first(llm: MesaLlama) -> None:
    first, second = (DOCUMENT.prompt(fact) for fact in DOCUMENT.facts[:2])
    complete(llm, first)
    again = complete(llm, second, stop=["\n"])
    llm.reset()
    assert again == complete(llm, second, stop=["\n"])


def test_the_same_prompt_again_reads_at_most_one_token(llm: MesaLlama, evaluated: list[int]) -> None:
    complete(llm, max_tokens=1)
    evaluated.clear()
    complete(llm, max_tokens=1)
    assert sum(evaluated) <= 1


def test_a_prefix_that_fits_into_T_again_is_read_plainly(open_llama: Opener) -> None:
    """It was read in chunks, as part of a longer text; the short text must not notice."""
    tokens = random_tokens(1500, seed=1, n_vocab=200)
    llm = open_llama(READER, MesaConfig(first_chunk=32, chunk=100), n_ctx=2048)
    short = read(llm, tokens[:400])
    llm.reset()
    read(llm, tokens)
    llm.n_tokens = 350
    llm.eval(tokens[350:400])
    assert llm.plan().is_plain
    # seen: 0.0003 on a scale of 45
    assert worst(llm.scores[350:400], short[350:]) <= 3e-3


def test_a_chat_grows(llm: MesaLlama, evaluated: list[int]) -> None:
    """Each turn reads what is new only."""
    text = PROMPT
    for turn in range(3):
        evaluated.clear()
        before = len(llm.tokenize(text.encode()))
        text += complete(llm, text, max_tokens=20, stop=["\n"])
        text += f"\nQuestion: {DOCUMENT.facts[turn].question}\nAnswer:"
        if turn > 0:
            assert sum(evaluated) < 120 < before


# Speculation.


LOGITS_ALL = [
    True,
    False,
]


@pytest.mark.parametrize("logits_all", LOGITS_ALL)
@pytest.mark.parametrize("flash", [False, True])
def test_prompt_lookup_speculation_changes_no_text(llm: MesaLlama, flash: bool, logits_all: bool) -> None:
    """Roll-backs inside generate(), across the anchor's moves. f32, so that a batch of drafts rounds like single tokens."""
    mesa = MesaConfig(room=20)
    options = dict(mesa=mesa, n_ctx=2048, n_threads=1, n_threads_batch=1, type_k=F32, type_v=F32, flash_attn=flash)
    plain = MesaLlama(BUNDLED, **options)
    draft = LlamaPromptLookupDecoding(num_pred_tokens=5)
    lookup = MesaLlama(BUNDLED, draft_model=draft, logits_all=logits_all, **options)
    try:
        for fact in DOCUMENT.facts[:3]:
            texts = [complete(llm, DOCUMENT.prompt(fact), max_tokens=60) for llm in (plain, lookup)]
            assert texts[0] == texts[1]
    finally:
        plain.close()
        lookup.close()


# Tokens, without a vocabulary.


def test_generate(open_llama: Opener) -> None:
    llm = open_llama(READER, n_ctx=2048, mesa=MesaConfig())
    tokens = random_tokens(1200, seed=1, n_vocab=200)
    generator = llm.generate(tokens, temp=0.0)
    first = [next(generator) for _ in range(20)]
    assert llm.n_tokens >= 1219
    assert first[0] == int(llm.scores[1199].argmax())
    assert first[1:] == [int(row.argmax()) for row in llm.scores[1200:1219]]


def test_eval_in_parts_is_a_growing_text(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path("llama"))
    for part in (100, 200, 5, 1, 100):
        llm.eval(random_tokens(part))
    assert llm.n_tokens == 406
    assert llm.plan().n_positions(406) <= 128


def test_eval_of_nothing(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path("llama"))
    llm.eval([])
    assert llm.n_tokens == 0


def test_reset_empties_the_context(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path("llama"))
    first = read(llm, random_tokens(300))
    llm.reset()
    assert llm.n_tokens == 0
    assert np.array_equal(read(llm, random_tokens(300)), first)


# Progress.


def test_progress(open_llama: Opener) -> None:
    seen: list[tuple[int, int]] = []
    llm = open_llama(READER, MesaConfig(), n_ctx=2048, progress=lambda done, total: seen.append((done, total)))
    llm.eval(random_tokens(1500, n_vocab=200))
    assert [total for _, total in seen] == [1500] * len(seen)
    done = [n for n, _ in seen]
    assert done == sorted(set(done)) and done[-1] == 1500 and len(done) >= 3


def test_progress_is_not_told_of_a_single_batch(open_llama: Opener) -> None:
    seen: list[tuple[int, int]] = []
    llm = open_llama(READER, MesaConfig(), progress=lambda *n: seen.append(n))
    llm.eval(random_tokens(100))
    llm.eval([1])
    assert seen == []


def test_progress_that_raises_stops_reading(open_llama: Opener) -> None:
    """As a user's interrupt does: what was read so far stays, and reading can go on."""

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    llm = open_llama(READER, MesaConfig(), n_ctx=2048, progress=stop)
    tokens = random_tokens(1500, n_vocab=200)
    with pytest.raises(KeyboardInterrupt):
        llm.eval(tokens)
    assert 0 < llm.n_tokens < 1500
    llm.progress = None
    llm.eval(tokens[llm.n_tokens :])
    assert llm.n_tokens == 1500
    assert llm.plan().n_positions(1500) <= 512


# Too long, or not tokens: before any work.


def test_a_text_beyond_n_ctx(llm: MesaLlama, evaluated: list[int]) -> None:
    tokens = [5] * 4097
    with pytest.raises(PromptError, match="4097 tokens, more than n_ctx \\(4096\\)"):
        llm.eval(tokens)
    with pytest.raises(PromptError, match="4097 tokens, more than n_ctx \\(4096\\)"):
        llm.generate(tokens)
    assert evaluated == []


def test_a_growing_text_beyond_n_ctx(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path("llama"))
    llm.eval(random_tokens(500))
    with pytest.raises(PromptError, match="513 tokens, more than n_ctx"):
        llm.eval(random_tokens(13))
    assert llm.n_tokens == 500
    llm.eval(random_tokens(12))


def test_a_completion_beyond_n_ctx(llm: MesaLlama, evaluated: list[int]) -> None:
    with pytest.raises(PromptError, match="n_ctx"):
        llm.create_completion([5] * 5000, max_tokens=1)
    assert evaluated == []


# Plans.


def test_plan_of_a_text_is_the_one_it_gets(llm: MesaLlama) -> None:
    tokens = llm.tokenize(PROMPT.encode())
    plan = llm.plan_of(tokens)
    llm.eval(tokens)
    assert llm.plan() == plan
    assert llm.plan(len(tokens)).chunk_starts != plan.chunk_starts  # the grid


def test_chunks_begin_where_sentences_do(llm: MesaLlama) -> None:
    tokens = llm.tokenize(PROMPT.encode())
    for start in llm.plan_of(tokens).chunk_starts[2:]:
        before = llm.detokenize(tokens[:start]).decode()
        assert before.rstrip(" ").endswith((".", "?", "!", "\n"))


QUESTIONS = [
    "Who?",
    "Who? " * 40,
    "\n" * 100,
    "and then " * 200 + "who?",
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_documents_chunks_do_not_depend_on_the_question(llm: MesaLlama, question: str) -> None:
    """All but the last two borders of the shorter text."""
    document = llm.tokenize(DOCUMENT.text.encode())
    starts = llm.plan_of(document).chunk_starts[:-2]
    with_question = llm.plan_of(document + llm.tokenize(question.encode(), add_bos=False)).chunk_starts
    assert with_question[: len(starts)] == starts


def test_a_fixed_stair_width_that_is_too_small(open_llama: Opener) -> None:
    llm = open_llama(READER, MesaConfig(stair_width=2), n_ctx=2048)
    with pytest.raises(ConfigError, match="stair_width 2 is too small for 1500 tokens"):
        llm.eval(random_tokens(1500))
    llm.eval(random_tokens(600))
    assert llm.plan().stair_width == 2


# Objects.


def test_mesa_off_is_llama(open_llama: Opener) -> None:
    tokens = random_tokens(700, n_vocab=200)
    off = open_llama(READER, MesaConfig(enabled=False), n_ctx=1024)
    stock = llama_cpp.Llama(
        str(READER), n_ctx=1024, logits_all=True, type_k=F32, type_v=F32, n_threads=1, n_threads_batch=1, verbose=False
    )
    stock.eval(tokens)
    assert np.array_equal(read(off, tokens), stock.scores[:700])
    assert off.plan() == MesaPlan([0], 0, 1)
    stock.close()


CONFIGS = [
    SMALL,
    MesaConfig(enabled=False),
    MesaConfig(plan=MesaPlan([0, 12, 52], 52, 2)),
]


@pytest.mark.parametrize("faster", [True, False])
def test_flash_attention_where_it_is_faster(
    model_path: ModelPath, open_llama: Opener, monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    """On the CPU it is measured, and a copy of the context keeps to it."""
    measured = AttentionTimes(2048, 20.0, 1.0, 50.0, 0.9) if faster else AttentionTimes(2048, 20.0, 1.0, 15.0, 1.1)
    monkeypatch.setattr("mesa_gguf.llama.time_attention", lambda *args: measured)
    monkeypatch.setattr("mesa_gguf.rpc.has_gpu", lambda: False)
    llm = open_llama(model_path("llama"), flash="auto")
    assert llm.attention_times == measured
    monkeypatch.undo()
    copy = pickle.loads(pickle.dumps(llm))
    names = {True: llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, False: llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED}
    for one in (llm, copy):
        assert one.context_params.flash_attn_type == names[faster]
    copy.close()


def test_attention_is_measured(model_path: ModelPath) -> None:
    """With quantized keys, too, where heads are whole blocks."""
    header = check_model(model_path("llama-head-size"))
    for kind in (None, F32, Q8_0):
        times = time_attention(header, 4096, 1, type_k=kind)
        assert times is not None and times.n_keys == 4096
        assert min(times.window, times.token, times.plain_window, times.plain_token) > 0
        assert "without it" in str(times)
    assert time_attention(check_model(model_path("llama")), 4096, 1, type_k=Q8_0) is None


def test_quantized_values_need_flash_attention(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path("llama-head-size"), kv=Q8_0, flash="auto")
    assert llm.attention_times is None
    assert llm.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO


@pytest.mark.parametrize("mesa", CONFIGS)
def test_pickle(model_path: ModelPath, open_llama: Opener, mesa: MesaConfig) -> None:
    """Opens the same model with the same options: what multiprocessing needs."""
    llm = open_llama(model_path("llama"), mesa)
    expected = read(llm, random_tokens(100))
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.mesa == mesa
    assert copy.n_ctx() == llm.n_ctx()
    assert np.array_equal(read(copy, random_tokens(100)), expected)
    copy.close()


def test_n_ctx_zero_is_the_trained_length(open_llama: Opener) -> None:
    assert open_llama(READER, MesaConfig(), n_ctx=0).n_ctx() == 512


def test_two_contexts_side_by_side(model_path: ModelPath, open_llama: Opener) -> None:
    a, b, alone = (open_llama(model_path("llama")) for _ in range(3))
    for seed in range(5):
        tokens = random_tokens(80, seed=seed)
        read(b, random_tokens(90, seed=seed + 10))
        assert np.array_equal(read(a, tokens), read(alone, tokens))


def test_close_twice(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path("llama"))
    llm.close()
    llm.close()


def test_a_context_manager_is_not_needed_to_free_memory(model_path: ModelPath) -> None:
    for _ in range(20):
        MesaLlama(model_path("llama"), mesa=SMALL, n_ctx=512)


def test_log_likelihoods_are_those_of_the_logits(open_llama: Opener, model_path: ModelPath) -> None:
    """Inside T, over chunks, on the stair, in batches of any size; the context is as eval leaves it."""
    for n in (20, 100, 370):
        tokens = random_tokens(n)
        llm = open_llama(model_path("llama"), n_batch=33)
        logits = read(llm, tokens).astype(np.float64)
        total = np.log(np.exp(logits).sum(axis=1))
        expected = logits[np.arange(n - 1), tokens[1:]] - total[:-1]
        other = open_llama(model_path("llama"), n_batch=200, logits_all=False)
        assert worst(other.log_likelihoods(tokens), expected) < 1e-3
        assert other.n_tokens == n and worst(other._get_logits(n - 1), logits[-1]) < 1e-3
        other.reset()
        other.eval(tokens[:15])
        if n <= 128:  # else it is another plan
            assert worst(other.log_likelihoods(tokens[15:]), expected[15:]) < 1e-3
        for last in (0, 1, 7, n - 1):
            other.reset()
            told = other.log_likelihoods(tokens, last)
            assert told.shape == (last,) and worst([0, *told], [0, *expected[n - 1 - last :]]) < 1e-3
            assert other.n_tokens == n and worst(other._get_logits(n - 1), logits[-1]) < 1e-3
            other.n_tokens = (
                n - 1
            )  # another token than the last one has its logits read anew, where they are no more there
            assert worst(other._get_logits(n - 2), logits[-2]) < 1e-3
        for wrong in (-1, n):
            with pytest.raises(PromptError, match="less than the number of tokens"):
                other.log_likelihoods(tokens, wrong)
        assert other.log_likelihoods([tokens[0]]).shape == (0,) and other.log_likelihoods([]).shape == (0,)
