"""How tokens are chosen and become text: no crash, no byte lost, and what the caller's functions raise reaches the caller."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import LlamaGrammar, LogitsProcessorList, StoppingCriteriaList
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
from llama_cpp.llama_tokenizer import BaseLlamaTokenizer

from conftest import ModelPath, Opener, random_tokens, run_python
from mesa_gguf import ConfigError, MesaConfig, MesaError, MesaLlama, ModelError, PromptError
from mesa_gguf import grammar as grammars
from mesa_gguf.sampling import SamplingOptions
from words import DASHES, EOS, VOCABULARY, byte_tokens, dictate, token, write_words

N_VOCAB = len(VOCABULARY)
NEVER_END = {EOS: -math.inf, token("<|im_end|>"): -math.inf}
EMOJI = "\N{GRINNING FACE}"  # no token of its own: 4 bytes


@pytest.fixture(scope="session")
def words_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("words") / "words.gguf")


@pytest.fixture(scope="module")
def shared(words_path: Path) -> Iterator[MesaLlama]:
    llm = MesaLlama(words_path, n_ctx=256, logits_all=True, n_threads=1, n_threads_batch=1)
    yield llm
    llm.close()


@pytest.fixture
def llm(shared: MesaLlama) -> MesaLlama:
    shared.reset()
    shared.set_seed(1)
    shared.set_cache(None)
    return shared


def gbnf(text: str) -> LlamaGrammar:
    return LlamaGrammar.from_string(text, verbose=False)


def complete(llm: MesaLlama, prompt: Any = "hi", **options: Any) -> dict[str, Any]:
    return llm.create_completion(prompt, **(dict(max_tokens=8, temperature=0.0) | options))["choices"][0]


def say(llm: MesaLlama, tokens: list[int], **options: Any) -> dict[str, Any]:
    return complete(llm, logits_processor=dictate(tokens), **(dict(max_tokens=len(tokens) + 5) | options))


def stream(llm: MesaLlama, tokens: list[int], **options: Any) -> tuple[str, str]:
    """-> (text, finish reason)"""
    options = dict(max_tokens=len(tokens) + 5, temperature=0.0) | options
    chunks = list(llm.create_completion("hi", logits_processor=dictate(tokens), stream=True, **options))
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])
    return "".join(c["choices"][0]["text"] for c in chunks), chunks[-1]["choices"][0]["finish_reason"]


# Grammars that llama.cpp cannot use.

BAD_GRAMMARS = {
    'rout = "a"': "::= is expected after rout",
    'rout ::= "a"': "no rule named root",
    "root ::= missing": "no rule named missing .line 1, column 10",
    'root ::= "a\nx ::= (b': "this string is not closed",
    "root ::= ([a-z]": "parenthesis is not closed",
    "root ::= [a-z": r"this \[ is not closed",
    'root ::= "\\d"': r"no escape \\d",
    'root ::= "\\u12"': "4 hexadecimal digits",
    "root ::= *": r"nothing comes before \*",
    "root ::= [a]{2001}": "more than 2000 repetitions",
    "root ::= " + '("a" ' * 1001 + ")?" * 1001: "more than 2000 rules are repeated",
    'root ::= ("a" | (b c)+){500}\nb ::= "x"\nc ::= "y"': "more than 2000 rules are repeated",
    "root ::= [a]{5,2}": "at most 2 and at least 5",
    "root ::= [a]{x}": "a number is expected",
    "root ::= <[5>": "token's number",
    "root ::= !a": "a token in < and >",
    "root ::= [a] ) [b]": "end of the line",
    "my_rule ::= [a]": "::= is expected after my",
    "": "no rules",
    "# nothing": "no rules",
    'root ::= root "a" | "b"': "rule root begins with itself",
    'root ::= a\na ::= "x"? root': "begins with itself",
    # llama.cpp does not see that e can be empty, and never ends
    'root ::= e root "x" | "y"\ne ::= w\nw ::= "" | "z"': "rule root begins with itself",
    'root ::= "a"**': "rule root begins with itself",
    "root ::= " + "(" * 100_000: "more than 4000 parentheses",
    "root ::= r0\n"
    + "".join(f"r{i} ::= r{i + 1}\n" for i in range(10_001))
    + 'r10001 ::= "a"': "more than 10000 of its rules",
    "".join(f'r{i} ::= r{i + 1} "x" | r{i + 1} "y"\n' for i in range(60))
    + 'r60 ::= "a"\nroot ::= r0': "more than 100000 ways",
    "root ::= " + '"' + "a" * 10_000 + '"{2000}': "longer than 2000000",
    'root ::= "a\0b"': "NUL",
}


@pytest.mark.parametrize("text", BAD_GRAMMARS, ids=range(len(BAD_GRAMMARS)))
def test_a_grammar_that_cannot_be_used(llm: MesaLlama, text: str) -> None:
    """Named before anything is read; the next call works."""
    with pytest.raises(ConfigError, match=f"grammar.*{BAD_GRAMMARS[text]}"):
        llm.create_completion("hi", grammar=gbnf(text))
    assert llm.n_tokens == 0
    assert complete(llm, grammar=gbnf('root ::= "ab"'))["text"] == "ab"


@pytest.mark.parametrize("text", ['rout = "a"', "root ::= missing"])
def test_every_way_in_for_a_grammar(llm: MesaLlama, text: str) -> None:
    for use in (
        lambda grammar: llm.create_completion("hi", grammar=grammar),
        lambda grammar: llm.create_completion("hi", grammar=grammar, stream=True),
        lambda grammar: llm.create_chat_completion([{"role": "user", "content": "hi"}], grammar=grammar),
        lambda grammar: llm.generate([1, 2], grammar=grammar),
        lambda grammar: llm.sample(grammar=grammar),
    ):
        with pytest.raises(ConfigError, match=f"grammar.*{BAD_GRAMMARS[text]}"):
            use(gbnf(text))
    assert llm.n_tokens == 0
    assert complete(llm, grammar=gbnf('root ::= "ab"'))["text"] == "ab"


def test_a_grammar_that_only_llama_cpp_knows_to_be_wrong(llm: MesaLlama, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"grammar.*llama\.cpp refuses it"):
        llm.create_completion("hi", grammar=gbnf("root ::= <no-such-token>"))


@pytest.mark.parametrize("grammar", ['root ::= "a"', 5, LlamaGrammar(_grammar=None)])
def test_what_is_no_grammar(llm: MesaLlama, grammar: Any) -> None:
    with pytest.raises(ConfigError, match=r"grammar is .*LlamaGrammar\.from_string"):
        llm.create_completion("hi", grammar=grammar)


def test_a_lone_surrogate_in_a_grammar(llm: MesaLlama) -> None:
    with pytest.raises(PromptError, match=r"the grammar is not text: its character 10 .*U\+D800"):
        llm.create_completion("hi", grammar=gbnf('root ::= "\ud800"'))


def test_a_model_without_a_vocabulary_has_no_grammar(model_path: ModelPath, open_llama: Opener) -> None:
    with pytest.raises(ModelError, match="no vocabulary: a grammar"):
        open_llama(model_path("llama")).generate([1, 2], grammar=gbnf('root ::= "a"'))


GOOD_GRAMMARS = [
    'root ::= ""',
    "root::=([a-z] #comment\n | [^x-z\\]] )+ # end\n\n\nx-1 ::= root",
    'root ::= "a"{0}  "b"{2,}  "c"{0,3}',
    "root ::= [] | [^] | .",
    f"root ::= <[{token('ab')}]> !<[7]> <s>?",
    'root ::= "\\x41\\u00e9\\U0001F600\\t\\r\\n\\\\\\"\\[\\]\\-"',
    'root ::= ("a"?)* | ("b"?){3,5}',
    "root ::= item*\nitem ::= ws\nws ::= [ ]*\n",
    "root ::= a | b\r\na ::= [0-9]\r\nb ::= a a\r\n",
    "root ::= " + " | ".join(f'"w{i}"' for i in range(3000)),
    "root ::= " + '("a" ' * 1000 + ")?" * 1000,
    'root ::= "é😀" [é-😀]',
]


@pytest.mark.parametrize("text", GOOD_GRAMMARS, ids=range(len(GOOD_GRAMMARS)))
def test_grammars_that_can_be_used(llm: MesaLlama, text: str) -> None:
    """Both by our check and by llama.cpp."""
    list(zip(range(1), llm.generate([1, 2], temp=0.0, grammar=gbnf(text))))


FUZZ = """
import os, random, sys, time
import mesa_gguf
import llama_cpp
from llama_cpp import LlamaGrammar
from mesa_gguf.grammar import check

llm = mesa_gguf.MesaLlama(sys.argv[1], vocab_only=True)
r = random.Random(7)
names = ["root", "a", "b", "c-1"]

def sequence(depth):
    parts = []
    for _ in range(r.choice([0, 1, 1, 2, 3])):
        kind = r.random()
        if kind < 0.3:
            part = '"' + r.choice(["x", "", "ab", "\\\\n", "\\\\x41", "é"]) + '"'
        elif kind < 0.5:
            part = r.choice(["[a-z]", "[^a]", "[]", "[^]", "[a\\\\]-]", ".", " <[5]>", "!<[7]>"])
        elif kind < 0.8 or depth > 2:
            part = r.choice(names)
        else:
            part = "(" + alternatives(depth + 1) + ")"
        if r.random() < 0.3:
            part += r.choice(["*", "+", "?", "{2}", "{1,3}", "{2,}", "{0,2}", "**", "?+", "{40}", "{0,30}"])
        parts.append(part)
    return r.choice([" ", "  ", " # c\\n " if depth else " "]).join(parts)

def alternatives(depth):
    return " | ".join(sequence(depth) for _ in range(r.choice([1, 1, 2, 3])))

os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
n_good = 0
for n in range(1500):
    text = "\\n".join(f"{name} ::= {alternatives(0)}" for name in r.sample(names, r.choice([2, 3, 4, 4, 4])))
    if r.random() < 0.2:
        i = r.randrange(len(text) + 1)
        text = text[:i] + r.choice('"[](){}|*?\\\\-:= \\nxa') + text[i + r.choice([0, 1]):]
    try:
        check(LlamaGrammar.from_string(text))
        good = True
    except mesa_gguf.ConfigError as err:
        good = False
        if "left recursion" in str(err):
            continue  # llama.cpp finds some of it, and may not return from the rest
    sampler = llama_cpp.llama_sampler_init_grammar(llm._model.vocab, text.encode(), b"root")
    n_good += good
    if bool(sampler) != good:
        print(good, repr(text), flush=True)
        sys.exit(1)
print("agree", n_good > 20)
"""


def test_the_check_of_grammars_agrees_with_llama_cpp(words_path: Path) -> None:
    done = run_python(FUZZ, str(words_path), timeout=100)
    assert (done.returncode, done.stdout) == (0, "agree True\n")


def test_no_token_fits_the_grammar(tmp_path: Path) -> None:
    """The vocabulary cannot spell it. llama.cpp aborts where a token is taken all the same."""
    llm = MesaLlama(write_words(tmp_path / "m.gguf", bytes_too=False), n_ctx=256, n_threads=1, n_threads_batch=1)
    with pytest.raises(MesaError, match=r"no token can be sampled.*grammar"):
        complete(llm, grammar=gbnf('root ::= "ü"'))
    assert complete(llm, grammar=gbnf('root ::= "ab"'))["text"] == "ab"
    llm.close()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("more", [{}, {"mirostat_mode": 1}, {"mirostat_mode": 2}, {"typical_p": 0.5}])
def test_a_grammar_that_excludes_all_that_a_logits_processor_leaves(
    llm: MesaLlama, temperature: float, more: dict
) -> None:
    with pytest.raises(MesaError, match=r"no token can be sampled.*logits_processor"):
        say(llm, [token("b")], grammar=gbnf('root ::= "a"'), temperature=temperature, **more)


def test_a_token_that_a_grammar_names_after_text(llm: MesaLlama) -> None:
    """llama.cpp lets token "ab" pass where "a" and then this token is wanted, and aborts when it is taken."""
    with pytest.raises(MesaError, match="no token can be sampled: Unexpected empty grammar stack"):
        say(llm, [token("ab")], grammar=gbnf(f'root ::= "a" <[{token("ab")}]>'))


# Options that cannot work.

NAN, INF = math.nan, math.inf
BAD_OPTIONS: list[tuple[str, Any]] = [
    *((name, value) for name in ("top_p", "min_p", "typical_p", "temperature") for value in (NAN, INF, -INF, -0.5, 1e300, "1", None, True)),
    *(("repeat_penalty", value) for value in (NAN, INF, 0, -1.0, 1e-60, "1")),
    *((name, value) for name in ("frequency_penalty", "presence_penalty") for value in (NAN, INF, 1e300, "1")),
    ("top_k", 1.5), ("top_k", "40"), ("top_k", None),
    ("mirostat_mode", 3), ("mirostat_mode", -1), ("mirostat_mode", "on"),
    ("mirostat_tau", NAN), ("mirostat_tau", -1.0), ("mirostat_eta", NAN), ("mirostat_eta", INF),
    ("logit_bias", {N_VOCAB: 1.0}), ("logit_bias", {-1: 1.0}), ("logit_bias", {"x": 1.0}), ("logit_bias", {2.5: 1.0}),
    ("logit_bias", {5: NAN}), ("logit_bias", {5: "x"}), ("logit_bias", [5]),
    ("logprobs", -1), ("logprobs", "5"), ("logprobs", 1.5), ("logprobs", True),
    ("max_tokens", "16"), ("max_tokens", 2.5),
    ("stop", 5), ("stop", [5]), ("stop", b"x"),
    ("seed", "a"), ("seed", 1.5),
    ("stopping_criteria", 5), ("logits_processor", 5), ("logits_processor", [5]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
def test_options_that_cannot_work(llm: MesaLlama, name: str, value: Any) -> None:
    llm.reset()
    for streamed in (False, True):
        with pytest.raises(ConfigError, match=name):
            llm.create_completion("hi", **{name: value, "stream": streamed})
    in_generate = "temp" if name == "temperature" else name
    if in_generate not in ("logit_bias", "logprobs", "max_tokens", "stop", "seed"):
        with pytest.raises(ConfigError, match=name):
            llm.generate([1, 2], **{in_generate: value})
    assert llm.n_tokens == 0


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e-42},
    {"temperature": 1e38},
    {"temperature": 0.8, "top_k": 10**12},
    {"temperature": 0.8, "top_k": -(10**12)},
    {"temperature": 0.8, "repeat_penalty": 1e-38},
    {"temperature": 0.8, "repeat_penalty": 3e38, "frequency_penalty": 3e38, "presence_penalty": -3e38},
    {"temperature": 0.8, "typical_p": 0.5, "top_k": 0, "logit_bias": {i: -1e9 for i in range(5, 200)}},
    {"temperature": 0.8, "mirostat_mode": 1, "mirostat_tau": 0.0},
    {"temperature": 0.8, "mirostat_mode": 1, "mirostat_tau": 1e38, "mirostat_eta": -1e38},
    {"temperature": 0.8, "mirostat_mode": 2, "mirostat_tau": 1e-42},
    {"temperature": 0.8, "mirostat_mode": 2, "logit_bias": {7: 1e300}},
    {"temperature": 0.8, "logit_bias": {7: INF, 8: -INF}},
    {"temperature": 0.8, "top_p": 0, "min_p": 5.0, "typical_p": 0},
    {"temperature": 0.8, "seed": 2**70},
    {"temperature": 0.8, "seed": -1},
    {"logprobs": 10**9},
    {"max_tokens": 10**12},
    {"max_tokens": None},
    {"stop": ["", "zzzz"]},
    {"stop": ("zzzz",)},
    {"stop": None},
]


@pytest.mark.parametrize("options", EXTREMES, ids=str)
def test_options_that_are_extreme(llm: MesaLlama, options: dict[str, Any]) -> None:
    answer = llm.create_completion("hi", **(dict(max_tokens=8, logit_bias=NEVER_END) | options))
    assert answer["usage"]["completion_tokens"] >= 8
    json.dumps(answer)


def test_the_smallest_temperature_takes_the_most_likely_token(llm: MesaLlama) -> None:
    assert complete(llm, temperature=1e-42) == complete(llm, temperature=0.0)


@pytest.mark.parametrize("value", [-5, 2**31 - 1])
def test_how_many_tokens_penalties_look_at(words_path: Path, value: int) -> None:
    llm = MesaLlama(words_path, n_ctx=256, n_threads=1, n_threads_batch=1, last_n_tokens_size=value)
    complete(llm, repeat_penalty=1.5)
    llm.close()


BAD_PROMPTS = [b"hi", None, 5, [1.5], ["a"], [True], {"a": 1}]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=str)
def test_a_prompt_that_is_none(llm: MesaLlama, prompt: Any) -> None:
    with pytest.raises(PromptError, match=r"prompt is .* a text or a list of tokens"):
        llm.create_completion(prompt)


@pytest.mark.parametrize("prompt", [(1, 270, 271), np.array([1, 270, 271]), [np.int32(1), 270, 271]], ids=str)
def test_tokens_of_other_kinds(llm: MesaLlama, prompt: Any) -> None:
    assert complete(llm, prompt) == complete(llm, [1, 270, 271])


@pytest.mark.parametrize("option", ["prompt", "stop", "suffix"])
def test_a_lone_surrogate(llm: MesaLlama, option: str) -> None:
    arguments = {"prompt": "hi", option: "caf\udce9"}
    with pytest.raises(PromptError, match=rf"{option}.*character 3 is a lone surrogate .U\+DCE9"):
        llm.create_completion(**arguments)


def test_a_suffix_needs_a_model_that_fills_in(llm: MesaLlama) -> None:
    with pytest.raises(ConfigError, match="suffix cannot be used"):
        llm.create_completion("hi", suffix="ho")


def test_logprobs_of_a_prompt_need_all_logits(words_path: Path) -> None:
    llm = MesaLlama(words_path, n_ctx=256, n_threads=1, n_threads_batch=1)
    with pytest.raises(ConfigError, match="logits_all=True"):
        llm.create_completion("hi", logprobs=1, echo=True)
    llm.close()


def test_a_prompt_that_leaves_no_room(llm: MesaLlama) -> None:
    with pytest.raises(PromptError, match=r"256 tokens.*no room.*n_ctx \(256\): make n_ctx 264"):
        llm.create_completion([5] * 256, max_tokens=8)


@pytest.mark.parametrize("cache", [5, "ram", {}])
def test_what_is_no_cache(llm: MesaLlama, cache: Any) -> None:
    with pytest.raises(ConfigError, match="cache is"):
        llm.set_cache(cache)


# The caller's functions.


def fail(*_: Any) -> Any:
    raise ZeroDivisionError("of the caller")


WAYS = {
    "completion": lambda llm, **o: llm.create_completion("hi", **o),
    "stream": lambda llm, **o: list(llm.create_completion("hi", stream=True, **o)),
    "chat": lambda llm, **o: llm.create_chat_completion([{"role": "user", "content": "hi"}], **o),
    "chat stream": lambda llm, **o: list(
        llm.create_chat_completion([{"role": "user", "content": "hi"}], stream=True, **o)
    ),
    "generate": lambda llm, **o: next(llm.generate([1, 2], **o)),
    "sample": lambda llm, **o: (llm.eval([1, 2]), llm.sample(**o)),
}


@pytest.mark.parametrize("kind", ["a list", "LogitsProcessorList", "a function"])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_logits_processor_raises_reaches_the_caller(llm: MesaLlama, way: str, kind: str) -> None:
    processor = {"a list": [fail], "LogitsProcessorList": LogitsProcessorList([fail]), "a function": fail}[kind]
    with pytest.raises(ZeroDivisionError, match="of the caller"):
        WAYS[way](llm, logits_processor=processor)
    assert say(llm, [token("a")])["text"] == "a"


@pytest.mark.parametrize("way", ["completion", "stream", "generate"])
def test_what_a_stopping_criterion_raises_reaches_the_caller(llm: MesaLlama, way: str) -> None:
    for criteria in (fail, [fail], StoppingCriteriaList([fail])):
        with pytest.raises(ZeroDivisionError):
            WAYS[way](llm, stopping_criteria=criteria)


def test_what_a_logits_processor_raises_later(llm: MesaLlama) -> None:
    """In the middle of a stream: what came before arrived."""
    calls = []

    def process(tokens: Any, logits: Any) -> Any:
        calls.append(len(tokens))
        return logits if len(calls) < 4 else fail()

    chunks = llm.create_completion([1, 270], stream=True, logits_processor=[process], logit_bias={token("c"): 100})
    pieces = [next(chunks)["choices"][0]["text"] for _ in range(3)]
    with pytest.raises(ZeroDivisionError):
        next(chunks)
    assert "".join(pieces) == "ccc"
    assert calls == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (lambda x: None, "None"),
        (lambda x: x[:5], r"shape \(5,\)"),
        (lambda x: x * NAN, "NaN"),
        (lambda x: "x", "str"),
        (lambda x: x[None], "shape"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_a_logits_processor_must_return(llm: MesaLlama, returned: Any, what: str, temperature: float) -> None:
    def my_processor(tokens: Any, logits: Any) -> Any:
        return returned(logits)

    with pytest.raises(ConfigError, match=f"logits_processor my_processor returned .*{what}"):
        complete(llm, logits_processor=[my_processor], temperature=temperature)


def test_logits_that_are_no_numbers(llm: MesaLlama) -> None:
    """Of a damaged model."""
    logits = np.zeros(N_VOCAB, np.float32)
    for bad in (0, 100, N_VOCAB - 1):
        logits[:] = 0.0
        logits[bad] = NAN
        for options in (SamplingOptions(), SamplingOptions(temp=0.0), SamplingOptions(repeat_penalty=1.5)):
            sampler = llm._sampler_of(options, 1)
            with pytest.raises(MesaError, match="the logits are not numbers"):
                sampler.sample(logits, np.zeros(1, np.intc))
            sampler.close()
            with pytest.raises(MesaError, match="the sampler is closed"):
                sampler.sample(logits, np.zeros(1, np.intc))


def test_a_logits_processor_may_return_float64_and_infinity(llm: MesaLlama) -> None:
    def only(tokens: Any, logits: Any) -> Any:
        wanted = logits.astype(np.float64)
        wanted[token("e")] = INF
        return wanted

    for temperature in (0.0, 0.8):
        assert complete(llm, logits_processor=[only], temperature=temperature, max_tokens=3)["text"] == "eee"


def test_logit_bias_together_with_a_logits_processor(llm: MesaLlama) -> None:
    """The processor leaves a and b, the bias decides."""
    seen = []

    def a_or_b(tokens: Any, logits: Any) -> Any:
        seen.append(len(tokens))
        forced = np.full_like(logits, -INF)
        forced[[token("a"), token("b")]] = 1.0, 0.0
        return forced

    for processor in (a_or_b, [a_or_b], LogitsProcessorList([a_or_b])):
        seen.clear()
        assert complete(llm, logits_processor=processor, max_tokens=2)["text"] == "aa"
        assert complete(llm, logits_processor=processor, max_tokens=2, logit_bias={token("b"): 5.0})["text"] == "bb"
        assert len(seen) == 4
    answer = llm.create_chat_completion(
        [{"role": "user", "content": "hi"}],
        logits_processor=[a_or_b],
        max_tokens=2,
        logit_bias={str(token("b")): 5.0},
        temperature=0.0,
    )
    assert answer["choices"][0]["message"]["content"] == "bb"


def test_a_callers_list_of_processors_is_not_changed(llm: MesaLlama) -> None:
    processors = LogitsProcessorList([lambda tokens, logits: logits])
    complete(llm, logits_processor=processors, logit_bias={5: 1.0})
    assert len(processors) == 1


def test_processors_follow_one_another(llm: MesaLlama) -> None:
    add = [lambda t, x: np.where(np.arange(len(x)) == token("d"), 0.0, -10.0), lambda t, x: -x]
    assert complete(llm, logits_processor=add, max_tokens=1)["text"] != "d"
    assert complete(llm, logits_processor=add[:1], max_tokens=1)["text"] == "d"


def test_a_stopping_criterion_gets_the_logits_that_follow_its_tokens(llm: MesaLlama) -> None:
    seen: list[tuple[list[int], np.ndarray]] = []

    def stop(tokens: Any, logits: Any) -> bool:
        seen.append((tokens.tolist(), logits.copy()))
        return len(tokens) == 6

    assert complete(llm, [1, 270, 271], stopping_criteria=stop, logit_bias=NEVER_END)["finish_reason"] == "stop"
    assert [len(tokens) for tokens, _ in seen] == [3, 4, 5, 6]
    llm.reset()
    llm.eval(seen[-1][0])
    for tokens, logits in seen:
        assert np.allclose(logits, llm.scores[len(tokens) - 1], atol=1e-3)


def test_a_stopping_criterion_that_holds_once(llm: MesaLlama) -> None:
    """The text is there all the same: it is asked once."""
    answers = iter([False, False, True])
    assert say(llm, [token("a"), token("b"), token("c")], stopping_criteria=lambda *_: next(answers))["text"] == "ab"


# Draft models.


class Drafts(LlamaDraftModel):
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
        return self.value(input_ids) if callable(self.value) else self.value


@pytest.mark.parametrize("value", [[10**6], [-1], [NAN], [[1, 2], [3, 4]], ["a"], None, 5, [2**40], [1.5]], ids=str)
def test_a_draft_model_that_returns_no_tokens(words_path: Path, value: Any) -> None:
    llm = MesaLlama(words_path, n_ctx=256, n_threads=1, n_threads_batch=1, draft_model=Drafts(np.asarray(value)))
    with pytest.raises(ConfigError, match="draft_model returned"):
        complete(llm)
    llm.draft_model = None
    assert say(llm, [token("a")])["text"] == "a"
    llm.close()


def test_what_a_draft_model_raises_reaches_the_caller(words_path: Path) -> None:
    llm = MesaLlama(words_path, n_ctx=256, n_threads=1, n_threads_batch=1, draft_model=Drafts(fail))
    with pytest.raises(ZeroDivisionError):
        complete(llm)
    llm.close()


@pytest.mark.parametrize(
    "draft",
    [
        LlamaPromptLookupDecoding(),
        Drafts(np.zeros(0)),
        Drafts([270, 271.0]),
        Drafts(lambda ids: np.full(5000, token("a"))),
        Drafts(lambda ids: np.random.default_rng(len(ids)).integers(0, N_VOCAB, 7)),
    ],
)
def test_drafts_change_no_text(words_path: Path, draft: Any) -> None:
    """Not with a grammar, a logits_processor or penalties, and up to the end of n_ctx."""
    # without flash attention, a batch of drafts rounds like single tokens
    options = dict(n_ctx=256, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, flash_attn=False)
    plain, drafted = MesaLlama(words_path, **options), MesaLlama(words_path, draft_model=draft, **options)
    seen: dict[int, list[list[int]]] = {}

    def note(tokens: Any, logits: Any) -> Any:
        seen.setdefault(id(seen), []).append(tokens.tolist())
        return logits

    for prompt, more in (
        ("ab cd ab cd", {"grammar": gbnf('root ::= ("ab" | "cd")+ "."'), "max_tokens": 15}),
        ("ab cd ab cd", {"repeat_penalty": 1.3, "max_tokens": 15}),
        ("ab cd ab cd", {"logits_processor": [note], "max_tokens": 10}),
        ("abcd" * 60, {"max_tokens": -1, "logit_bias": NEVER_END}),
    ):
        texts, tokens = [], []
        for llm in (plain, drafted):
            llm.reset()
            seen.clear()
            texts.append(complete(llm, prompt, **more))
            tokens.append([list(each) for each in seen.values()])
        assert texts[0] == texts[1]
        assert tokens[0] == tokens[1]  # a processor sees the text, not the drafts
    plain.close()
    drafted.close()


# Bytes.


@pytest.mark.parametrize("special", [False, True])
def test_long_tokens(llm: MesaLlama, special: bool) -> None:
    dashes = token(DASHES)
    for detokenize in (llm.detokenize, llm.tokenizer().detokenize, llm._model.detokenize):
        assert detokenize([dashes, token("a"), dashes], special=special) == f"{DASHES}a{DASHES}".encode()
    assert llm.detokenize([dashes], prev_tokens=[token("a")], special=special) == DASHES.encode()
    assert llm.token_bytes(dashes) == llm._model.token_to_piece(dashes) == DASHES.encode()
    assert llm.tokenizer().decode([dashes]) == DASHES


def test_a_control_token_is_text_only_if_special(llm: MesaLlama) -> None:
    assert llm.detokenize([token("<|im_end|>")]) == b""
    assert llm.detokenize([token("<|im_end|>")], special=True) == b"<|im_end|>"


def test_long_tokens_in_answers(llm: MesaLlama) -> None:
    tokens = [token("a"), token(DASHES), token("b")]
    assert say(llm, tokens)["text"] == stream(llm, tokens)[0] == f"a{DASHES}b"
    messages = [{"role": "user", "content": "hi"}]
    answer = llm.create_chat_completion(messages, logits_processor=[dictate(tokens)])
    assert answer["choices"][0]["message"]["content"] == f"a{DASHES}b"
    chunks = llm.create_chat_completion(messages, logits_processor=[dictate(tokens)], stream=True)
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == f"a{DASHES}b"


@pytest.mark.parametrize("bad", [-1, N_VOCAB, 2**40, -(2**40)])
def test_a_token_that_is_none_has_no_bytes(llm: MesaLlama, bad: int) -> None:
    """llama.cpp aborts."""
    uses = (
        lambda: llm.detokenize([1, bad]),
        lambda: llm.token_bytes(bad),
        lambda: llm.tokenizer().detokenize([bad]),
        lambda: llm._model.token_to_piece(bad),
        lambda: llm.create_completion([1, bad]),
    )
    for use in uses:
        with pytest.raises(PromptError, match=f"token {bad} is not in the model's vocabulary of {N_VOCAB}"):
            use()


TEXTS = ["é", EMOJI, f"a{EMOJI}b", f"{EMOJI}{EMOJI}", f"日本語{EMOJI}", "\N{ZERO WIDTH JOINER}x"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", [[], [EMOJI + "!"], ["b!", "zz"]])
def test_characters_of_several_tokens(llm: MesaLlama, text: str, stop: list[str]) -> None:
    """Also as the last ones before the end, or held back because a stop string begins so."""
    tokens = byte_tokens(text)
    assert say(llm, tokens, stop=stop) == {"text": text, "index": 0, "logprobs": None, "finish_reason": "stop"}
    assert stream(llm, tokens, stop=stop) == (text, "stop")
    assert stream(llm, tokens, stop=stop, logprobs=2) == (text, "stop")
    assert stream(llm, tokens, stop=stop, max_tokens=len(tokens)) == (text, "length")


def test_bytes_that_are_no_text_are_left_out_alike(llm: MesaLlama) -> None:
    tokens = [token("a"), token("<0xFF>"), token("b"), token("<0xF0>"), token("c"), token("<0xE2>"), token("<0x82>")]
    assert say(llm, tokens)["text"] == "abc"
    assert stream(llm, tokens) == ("abc", "stop")


def test_text_is_streamed_as_soon_as_it_is_certain(llm: MesaLlama) -> None:
    tokens = [token("a"), *byte_tokens(EMOJI), token("b"), token("x"), token("c")]
    chunks = llm.create_completion("hi", logits_processor=dictate(tokens), stream=True, stop=["xy"])
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", EMOJI, "b", "xc", ""]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("c", "ab"),
        (["d", "c"], "ab"),
        (["cd", "bc"], "a"),
        ("a", ""),
        (["bcd"], "a"),
        ("x", "abcd"),
        (["e", ""], "abcd"),
    ],
)
def test_stop_strings(llm: MesaLlama, stop: Any, text: str) -> None:
    """The one that comes first ends the text."""
    tokens = [token(c) for c in "abcd"]
    assert say(llm, tokens, stop=stop)["text"] == text
    assert stream(llm, tokens, stop=stop) == (text, "stop")


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_max_tokens_counts_tokens_not_characters(llm: MesaLlama, limit: int) -> None:
    options = dict(grammar=gbnf(f'root ::= "{EMOJI}"+'), max_tokens=limit, temperature=0.0, logit_bias=NEVER_END)
    answer = llm.create_completion("hi", **options)
    assert answer["usage"]["completion_tokens"] == limit
    assert answer["choices"][0] == {
        "text": EMOJI * (limit // 4),
        "index": 0,
        "logprobs": None,
        "finish_reason": "length",
    }
    chunks = list(llm.create_completion("hi", **options, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == EMOJI * (limit // 4)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("room", [1, 2, 3, 4, 5])
def test_characters_of_several_tokens_at_the_end_of_n_ctx(llm: MesaLlama, room: int) -> None:
    prompt = [1] + [token("a")] * (255 - room)  # of 256
    answer = llm.create_completion(
        prompt, grammar=gbnf(f'root ::= "{EMOJI}"+'), max_tokens=100, temperature=0.0, logit_bias=NEVER_END
    )
    assert answer["usage"]["completion_tokens"] == room
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["text"] == EMOJI * (room // 4)


def test_an_empty_prompt_begins_a_text(llm: MesaLlama) -> None:
    answer = llm.create_completion("", logits_processor=dictate([token("▁hello"), token("▁hello")]))
    assert answer["choices"][0]["text"] == "hello hello"
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def test_echo(llm: MesaLlama) -> None:
    assert say(llm, [token("b")], echo=True)["text"] == "hib"
    assert stream(llm, [token("b")], echo=True)[0] == "hib"
    assert say(llm, [token("b")], prompt=[token("a")], echo=True)["text"] == "ab"


def test_log_probabilities(llm: MesaLlama) -> None:
    """Of the right rows, the same in a stream, and numbers that JSON can hold."""
    prompt = [1, token("h"), token("i")]
    said = [*byte_tokens("é"), token("b"), token("▁hello")]
    answer = say(llm, said, prompt=prompt, logprobs=2, echo=True, stop=["zz"])
    logprobs = json.loads(json.dumps(answer["logprobs"]))
    tokens = [*prompt, *said]
    assert logprobs["tokens"] == ["h", "i", "", "", "b", " hello"]
    assert logprobs["text_offset"] == [0, 1, 2, 2, 3, 4]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    llm.reset()
    llm.eval(tokens)
    expected = llm.logits_to_logprobs(llm.scores[: len(tokens)])
    for i, value in enumerate(logprobs["token_logprobs"][1:], start=2):
        assert value == pytest.approx(expected[i - 1][tokens[i]], abs=1e-3)
    for i, top in enumerate(logprobs["top_logprobs"][3:], start=4):  # parts of characters have the same name
        assert max(top.values()) == pytest.approx(expected[i - 1].max(), abs=1e-3)

    llm.reset()
    options = dict(logits_processor=dictate(said), stream=True, logprobs=2, echo=True)
    streamed: dict[str, list] = {"tokens": [], "text_offset": [], "token_logprobs": []}
    for chunk in llm.create_completion(prompt, **options):
        for name, values in streamed.items():
            values.extend((chunk["choices"][0]["logprobs"] or {}).get(name, []))
    assert streamed["tokens"] == logprobs["tokens"]
    assert streamed["text_offset"] == logprobs["text_offset"]
    assert streamed["token_logprobs"][1:] == pytest.approx(logprobs["token_logprobs"][1:], abs=1e-3)


def test_log_probabilities_end_with_the_text(llm: MesaLlama) -> None:
    tokens = [token(c) for c in "abcd"]
    assert say(llm, tokens, logprobs=1, stop="cd")["logprobs"]["tokens"] == ["a", "b"]


class Capitals(BaseLlamaTokenizer):
    """One whose tokens are text together only: characters, of which it replaces what is incomplete."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        return [1] * add_bos + [5 + byte for byte in text]

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        before = len(self.text(prev_tokens or []))
        return self.text([*(prev_tokens or []), *tokens])[before:].encode()

    def text(self, tokens: list[int]) -> str:
        return bytes(t - 5 for t in tokens if 5 <= t < 261).decode(errors="replace").upper()


def test_another_tokenizer(words_path: Path) -> None:
    llm = MesaLlama(words_path, n_ctx=256, n_threads=1, n_threads_batch=1, tokenizer=Capitals())
    tokens = byte_tokens(f"a{EMOJI}bé")
    assert say(llm, tokens)["text"] == f"A{EMOJI}BÉ"
    assert stream(llm, tokens, stop=["X"]) == (f"A{EMOJI}BÉ", "stop")
    llm.close()


def test_bytes_of_a_real_model(smollm2: Path) -> None:
    """Its longest token, and characters that its vocabulary makes of parts."""
    llm = MesaLlama(smollm2, n_ctx=256, n_threads=1, n_threads_batch=1)
    for text in (DASHES, f"Grüße {EMOJI}, 日本語 🀄", EMOJI):
        tokens = llm.tokenize(text.encode(), add_bos=False)
        forced = iter(tokens)

        def say_them(_: Any, logits: Any, forced: Iterator[int] = forced) -> Any:
            wanted = np.full_like(logits, -INF)
            wanted[next(forced, llm.token_eos())] = 0.0
            return wanted

        assert llm.detokenize(tokens).decode() == text
        chunks = llm.create_completion("hi", logits_processor=say_them, stream=True, stop=[EMOJI + "!"], max_tokens=60)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
        answer = complete(llm, "hi", grammar=gbnf(f'root ::= "{text}"'), max_tokens=40)
        assert (answer["text"], answer["finish_reason"]) == (text, "stop")
    assert llm.detokenize([15069]) == llm.token_bytes(15069) == DASHES.encode()
    llm.close()


# Each sampler is its caller's own.

NINES = 'root ::= "9"+'


def spelled(llm: MesaLlama, *tokens: int) -> str:
    """Characters have a token and one of their byte."""
    return llm.detokenize(list(tokens)).decode()


def greedy(llm: MesaLlama) -> int:
    return int(llm._get_logits(llm.n_tokens - 1).argmax())


@pytest.mark.parametrize("end", ["abandoned", "closed", "exhausted", "failed"])
def test_sample_after_generate_with_a_grammar(llm: MesaLlama, end: str) -> None:
    criteria = (
        (lambda tokens, _: len(tokens) > 4) if end == "exhausted" else (lambda tokens, _: len(tokens) > 4 and fail())
    )
    generator = llm.generate([1, 270], temp=0.0, grammar=gbnf(NINES), stopping_criteria=criteria)
    assert spelled(llm, next(generator), next(generator)) == "99"
    if end == "closed":
        generator.close()
    elif end == "exhausted":
        list(generator)
    elif end == "failed":
        with pytest.raises(ZeroDivisionError):
            list(generator)
    llm.eval([token("a"), token("b")])
    assert llm.detokenize([greedy(llm)]) != b"9"
    assert llm.sample(temp=0.0) == greedy(llm)
    assert spelled(llm, llm.sample(temp=0.0, grammar=gbnf('root ::= "c"'))) == "c"
    assert llm.sample(temp=0.0) == greedy(llm)


def test_sample_within_generate(llm: MesaLlama) -> None:
    """Each goes by its own grammar."""
    generator = llm.generate([1, 270], temp=0.0, grammar=gbnf('root ::= "1234"'))
    for digit in "1234":
        assert spelled(llm, next(generator)) == digit
        assert spelled(llm, llm.sample(temp=0.0, grammar=gbnf('root ::= "x"'))) == "x"
    assert next(generator) == EOS


def test_generate_after_sample_with_a_grammar(llm: MesaLlama) -> None:
    free = [t for _, t in zip(range(5), llm.generate([1, 270], temp=0.0))]
    llm.reset()
    llm.eval([1, 270])
    llm.sample(temp=0.0, grammar=gbnf(NINES))
    assert [t for _, t in zip(range(5), llm.generate([1, 270], temp=0.0))] == free
    assert "9" not in llm.detokenize(free).decode(errors="replace")


def test_two_generators_take_turns(llm: MesaLlama) -> None:
    """They share the text, but not the grammar."""
    one = llm.generate([1, 270], temp=0.0, grammar=gbnf('root ::= "12"'))
    two = llm.generate([1, 271], temp=0.0, grammar=gbnf('root ::= "34"'))
    assert spelled(llm, next(one), next(two)) == "13"


def random_text(llm: MesaLlama, **options: Any) -> str:
    llm.reset()
    more = dict(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, max_tokens=20, logit_bias=NEVER_END)
    return complete(llm, **(more | options))["text"]


def test_seeds(llm: MesaLlama) -> None:
    """A completion's own seed is for it alone; without one, each gets another, and the same ones after set_seed."""
    assert random_text(llm, seed=5) == random_text(llm, seed=5) != random_text(llm, seed=6)
    llm.set_seed(3)
    first, second = random_text(llm), random_text(llm)
    assert first != second
    llm.set_seed(3)
    assert random_text(llm) == first
    random_text(llm, seed=5)
    assert random_text(llm) == second

    def generated() -> list[int]:
        llm.reset()
        return [t for _, t in zip(range(20), llm.generate([1, 270], temp=1.5, top_k=0, top_p=1.0, min_p=0.0))]

    llm.set_seed(9)
    tokens = generated()
    random_text(llm, seed=5)
    assert generated() == tokens


def test_an_abandoned_stream(llm: MesaLlama) -> None:
    chunks = llm.create_completion("hi", stream=True, grammar=gbnf(NINES), max_tokens=20)
    next(chunks)
    del chunks
    llm.eval([token("a")])
    assert llm.sample(temp=0.0) == greedy(llm)


@pytest.mark.parametrize("idx", [-1, 3, 10**6, 1.5, "0"])
def test_sampling_from_where_nothing_is(llm: MesaLlama, idx: Any) -> None:
    with pytest.raises(PromptError, match="no token -1 to sample after: 0 were read"):
        llm.sample()
    llm.eval([1, 270, 271])
    with pytest.raises((PromptError, ConfigError), match=r"no token .* to sample after: 3 were read|idx is"):
        llm.sample(idx=idx)
    assert llm.sample(temp=0.0, idx=2) == greedy(llm)


def test_positional_arguments_are_those_of_llama(llm: MesaLlama) -> None:
    llm.eval([1, 270])
    assert llm.sample(40, 0.95, 0.05, 1.0, 0.0) == greedy(llm)
    assert next(llm.generate([1, 270], 40, 0.95, 0.05, 1.0, 0.0)) == greedy(llm)
    with pytest.raises(TypeError):
        llm.sample(temperature=0.5)
    with pytest.raises(TypeError):
        llm.create_completion("hi", temp=0.5)


# Without a context.

GONE = {
    "tokenize": lambda llm: llm.tokenize(b"a"),
    "detokenize": lambda llm: llm.detokenize([1]),
    "token_bytes": lambda llm: llm.token_bytes(1),
    "eval": lambda llm: llm.eval([1]),
    "generate": lambda llm: next(llm.generate([1])),
    "sample": lambda llm: llm.sample(),
    "completion": lambda llm: llm.create_completion("hi"),
    "chat": lambda llm: llm.create_chat_completion([{"role": "user", "content": "hi"}]),
    "save_state": lambda llm: llm.save_state(),
    "plan": lambda llm: llm.plan(),
    "train_length": lambda llm: llm.train_length,
    "reading_length": lambda llm: llm.reading_length,
    "n_vocab": lambda llm: llm.n_vocab(),
    "token_eos": lambda llm: llm.token_eos(),
}


def test_a_model_that_was_closed(words_path: Path) -> None:
    llm = MesaLlama(words_path, n_ctx=256, n_threads=1, n_threads_batch=1)
    llm.eval([1, 2])
    tokenizer = llm.tokenizer()
    generator = llm.generate([1, 2], grammar=gbnf(NINES))
    next(generator)
    llm.close()
    for use in [
        *GONE.values(),
        lambda _: tokenizer.tokenize(b"a"),
        lambda _: tokenizer.detokenize([1]),
        lambda _: next(generator),
    ]:
        with pytest.raises(ModelError, match="was closed"):
            use(llm)
    llm.close()


def test_a_model_without_weights(words_path: Path) -> None:
    llm = MesaLlama(words_path, vocab_only=True)
    uses: list[Callable[[], object]] = [
        lambda: llm.create_completion("hi"),
        lambda: llm.generate([1]),
        lambda: llm.eval([1]),
        lambda: llm.log_likelihoods([1, 2]),
    ]
    for use in uses:
        with pytest.raises(ModelError, match="vocab_only"):
            use()
    assert llm.loaded_chunks() == [] and llm.plan().chunk_starts == [0]
    llm.close()


# Embeddings.


@pytest.fixture(scope="module")
def embedder(words_path: Path) -> Iterator[MesaLlama]:
    llm = MesaLlama(
        words_path,
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        n_batch=64,
        embedding=True,
        pooling_type=1,
        mesa=MesaConfig(enabled=False),
    )
    yield llm
    llm.close()


BAD_INPUTS: list[tuple[Any, dict[str, Any], str]] = [
    ([5], {}, "a text to embed is a str, not int"),
    (["a", "caf\udce9"], {}, "cannot be encoded"),
    (["a", "b" * 100], {"truncate": False}, r"a text to embed has 1\d\d tokens, more than n_batch .64"),
    (None, {}, "a text to embed is a str, not NoneType"),
]


@pytest.mark.parametrize(("texts", "options", "what"), BAD_INPUTS, ids=range(len(BAD_INPUTS)))
def test_inputs_that_cannot_be_embedded(embedder: MesaLlama, texts: Any, options: dict[str, Any], what: str) -> None:
    with pytest.raises(PromptError, match=what):
        embedder.embed(texts, **options)
    assert len(embedder.embed(["a", "b" * 100])) == 2


def test_an_empty_text_without_a_beginning_token_cannot_be_embedded(
    embedder: MesaLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama_cpp writes before the beginning of the batch."""
    monkeypatch.setattr(embedder.tokenizer_, "tokenize", lambda *_, **__: [])
    with pytest.raises(PromptError, match="a text to embed is empty"):
        embedder.embed("")


def test_no_texts_have_no_embeddings(embedder: MesaLlama) -> None:
    assert embedder.embed([]) == []
    assert embedder.create_embedding([])["data"] == []


def test_embeddings_of_a_model_that_was_not_opened_for_them(llm: MesaLlama) -> None:
    with pytest.raises(ConfigError, match="embedding=True"):
        llm.embed("hi")


def test_generation_without_a_vocabulary_goes_on_working(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path("llama"))
    answer = llm.create_completion(random_tokens(20), max_tokens=5, temperature=0.0)
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["text"] == ""


def test_the_checks_names(words_path: Path) -> None:
    """Rules that repetitions make do not show in messages."""
    with pytest.raises(ConfigError) as caught:
        grammars.check(gbnf('root ::= "x" ("b" | "a"**)'))
    assert "_" not in str(caught.value)
