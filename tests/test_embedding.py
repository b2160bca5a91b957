"""Embeddings and completion in one MesaLlama: vectors as llama.cpp's own where it can make them, and past a ubatch, a batch and
the trained length too."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import BUNDLED, F16, F32, ModelPath, Opener, random_tokens, read, worst
from mesa_gguf import ConfigError, MesaConfig, MesaLlama, PromptError

NONE, MEAN, CLS, LAST, RANK = range(5)  # enum llama_pooling_type
T = 512  # of the bundled model

TEXTS = ["The door code of Mara Lind is 4711.", "x", "Olaf Berg lives in Kiel. His phone number is 1234. " * 5]
LONG = "".join(f"The door code of Mara {i} is {i * 7919 % 10000}.\n" for i in range(200))
OPTIONS: dict[str, Any] = dict(n_threads=1, n_threads_batch=1, type_k=F32, type_v=F32)


@pytest.fixture
def embedder(open_llama: Opener) -> Any:
    """Opens the bundled model for embeddings. Without flash attention, which rounds fewer queries than 64 otherwise than more."""

    def opener(mesa: MesaConfig | None = None, **options: Any) -> MesaLlama:
        return open_llama(
            BUNDLED, mesa or MesaConfig(), kv=F32, **dict(dict(embedding=True, logits_all=False), **options)
        )

    return opener


def stock(pooling_type: int, normalize: bool = False, **options: Any) -> Any:
    """By llama_cpp.Llama, whole texts in one ubatch."""
    options = dict(dict(n_ctx=512, n_batch=512, n_ubatch=512), **options)
    llm = llama_cpp.Llama(
        str(BUNDLED), embedding=True, pooling_type=pooling_type, flash_attn=False, verbose=False, **OPTIONS, **options
    )
    try:
        # note: one at a time; without pooling it takes the vectors of the second from the wrong place
        return [llm.embed(text, normalize=normalize) for text in TEXTS]
    finally:
        llm.close()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling_type", [NONE, MEAN, CLS, LAST])
def test_vectors_as_llama_makes_them(embedder: Any, pooling_type: int, normalize: bool) -> None:
    llm = embedder(pooling_type=pooling_type)
    assert llm.pooling_type() == pooling_type
    vectors, expected = llm.embed(TEXTS, normalize=normalize), stock(pooling_type, normalize)
    for vector, other in zip(vectors, expected, strict=True):
        assert np.shape(vector) == np.shape(other)
        assert worst(vector, other) <= 1e-5
    assert worst(llm.embed(TEXTS[0], normalize=normalize), expected[0]) <= 1e-5


@pytest.mark.parametrize("pooling_type", [NONE, MEAN, CLS, LAST])
def test_a_text_in_many_batches(embedder: Any, pooling_type: int) -> None:
    """llama.cpp pools each ubatch by itself, and has the vector of the last one."""
    llm = embedder(pooling_type=pooling_type, n_batch=64, n_ubatch=16)
    for vector, other in zip(llm.embed(TEXTS), stock(pooling_type)):
        assert worst(vector, other) <= 1e-4


def test_without_pooling_the_model_says(embedder: Any) -> None:
    """The bundled model says nothing: each token's vector."""
    llm = embedder()
    assert llm.pooling_type() == NONE
    assert np.shape(llm.embed(TEXTS[0])) == (len(llm.tokenize(TEXTS[0].encode())), llm.n_embd())
    llm = embedder(kv_overrides={f"{llm.metadata['general.architecture']}.pooling_type": LAST})
    assert llm.pooling_type() == LAST
    assert worst(llm.embed(TEXTS[0]), stock(LAST)[0]) <= 1e-5


def output_matrix(path: Path) -> NDArray[np.float32]:
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    tensor = tensors.get("output.weight") or tensors["token_embd.weight"]
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def test_texts_past_the_trained_length(embedder: Any) -> None:
    """The vectors are those that the same context makes its logits of, chunk by chunk."""
    llm = embedder(n_ctx=8192, n_batch=256)
    tokens = llm.tokenize(LONG.encode())
    assert len(tokens) > 4 * T
    vectors = np.array(llm.embed(LONG), np.float32)
    plain = embedder(n_ctx=8192, n_batch=256, embedding=False, logits_all=True)
    logits = read(plain, tokens)
    assert not plain.plan().is_plain
    expected = vectors @ output_matrix(BUNDLED).T
    scale = float(np.std(logits))
    assert worst(expected, logits) <= 0.2 * scale  # llama.cpp rounds the vectors to q8_0 first
    assert float(np.corrcoef(expected[-1], logits[-1])[0, 1]) > 0.999

    for pooling_type, pooled in ((MEAN, vectors.mean(axis=0)), (LAST, vectors[-1]), (CLS, vectors[0])):
        llm = embedder(n_ctx=8192, n_batch=256, pooling_type=pooling_type)
        assert worst(llm.embed([TEXTS[0], LONG])[1], pooled) <= 1e-4  # whatever was read before


def test_completion_beside_embeddings(embedder: Any) -> None:
    """The same text and logits as without, before and after; an answer to a long text too."""
    llm, plain = embedder(n_ctx=8192, pooling_type=LAST), embedder(n_ctx=8192, embedding=False)
    prompts = [
        "The door code of Mara Lind is 4711. The door code of Mara Lind is",
        LONG + "The door code of Mara 77 is",
    ]
    expected = [
        plain.create_completion(prompt, max_tokens=4, temperature=0.0)["choices"][0]["text"] for prompt in prompts
    ]
    vector = llm.embed(TEXTS[0])
    for _ in range(2):
        for prompt, text in zip(prompts, expected):
            assert llm.create_completion(prompt, max_tokens=4, temperature=0.0)["choices"][0]["text"] == text
        assert llm.embed(TEXTS[0]) == vector
    llm.eval(random_tokens(700, n_vocab=200))
    plain.reset()
    plain.eval(random_tokens(700, n_vocab=200))
    assert np.array_equal(llm.eval_logits, plain.eval_logits)  # bit for bit


def test_completion_computes_the_logits_that_it_needs(embedder: Any) -> None:
    """llama.cpp makes those of every token while embeddings are on."""
    llm = embedder()
    llm.eval(random_tokens(100, n_vocab=200))
    assert not llama_cpp.llama_get_logits_ith(llm._ctx.ctx, 50)
    assert llama_cpp.llama_get_logits_ith(llm._ctx.ctx, 99)


def test_create_embedding(embedder: Any) -> None:
    llm = embedder(pooling_type=MEAN)
    answer = llm.create_embedding(TEXTS)
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    assert [entry["embedding"] for entry in answer["data"]] == llm.embed(TEXTS)
    assert answer["usage"]["prompt_tokens"] == sum(len(llm.tokenize(text.encode())) for text in TEXTS)
    assert llm.create_embedding(TEXTS[0])["data"][0]["embedding"] == llm.embed(TEXTS[0])
    assert llm.create_embedding([])["data"] == []


def test_texts_beyond_n_ctx(embedder: Any) -> None:
    """Cut, as `Llama` does at n_batch, or refused before anything is read."""
    llm = embedder(pooling_type=MEAN, n_ctx=256, n_batch=64)
    tokens = llm.tokenize(LONG.encode())
    with pytest.raises(PromptError, match=rf"{len(tokens)} tokens, more than n_ctx \(256\): make n_ctx {len(tokens)}"):
        llm.embed([TEXTS[0], LONG], truncate=False)
    vector, count = llm.embed(LONG, return_count=True)
    assert count == 256
    full = embedder(pooling_type=NONE, n_ctx=256)
    assert worst(vector, np.mean(full.embed(LONG), axis=0)) <= 1e-4


@pytest.mark.parametrize("bad", [["a", 5], [[1, 2]], [b"a"], ["a", "\ud800"]])
def test_texts_that_are_none(embedder: Any, bad: Any) -> None:
    llm = embedder(pooling_type=LAST)
    with pytest.raises(PromptError, match=r"a text to embed is a str|cannot be encoded as UTF-8"):
        llm.embed(bad)
    assert llm.embed("a")


def test_an_empty_text(embedder: Any) -> None:
    llm = embedder(pooling_type=LAST)
    if llm.tokenize(b""):
        assert len(llm.embed("")) == llm.n_embd()
    else:
        with pytest.raises(PromptError, match="empty"):
            llm.embed(["a", ""])


def test_a_text_that_fails_midway_leaves_a_context_that_works(embedder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = embedder(pooling_type=LAST, n_ctx=2048, n_batch=128)
    vector = llm.embed(TEXTS[0])
    llm.progress = lambda done, total: 1 // 0
    with pytest.raises(ZeroDivisionError):
        llm.embed(LONG)
    llm.progress = None
    assert llm.embed(TEXTS[0]) == vector
    assert llm.create_completion("The door code of A is 47. The door code of A is", max_tokens=2)["choices"][0]["text"]


def test_a_model_loaded_for_completion_says_what_to_do(embedder: Any) -> None:
    llm = embedder(embedding=False)
    with pytest.raises(ConfigError, match="embedding=True"):
        llm.embed("a")


@pytest.mark.parametrize("name", ["pooling_type", "attention_type"])
@pytest.mark.parametrize("value", [-2, 5, 99, 2**31, "mean", 1.0, None, True])
def test_types_that_llama_cpp_does_not_know(name: str, value: Any) -> None:
    """It aborts on them."""
    with pytest.raises(ConfigError, match=rf"{name} is {value!r}: use one of"):
        MesaLlama(BUNDLED, embedding=True, **{name: value})


def test_types_that_mesa_cannot_read_with() -> None:
    with pytest.raises(ConfigError, match=r"attention_type is 1 .*give enabled=False"):
        MesaLlama(BUNDLED, attention_type=1)
    with pytest.raises(ConfigError, match="pooling_type is 4, which makes no embedding"):
        MesaLlama(BUNDLED, embedding=True, pooling_type=RANK)


def test_with_mesa_off_as_in_llama(embedder: Any) -> None:
    llm = embedder(MesaConfig(enabled=False), pooling_type=MEAN)
    assert worst(llm.embed(TEXTS[0]), stock(MEAN)[0]) <= 1e-6


def test_a_pickled_model_embeds_alike(embedder: Any) -> None:
    llm = embedder(pooling_type=LAST)
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.pooling_type() == LAST
    assert copy.embed(TEXTS) == llm.embed(TEXTS)
    copy.close()


def test_an_encoder_is_refused_as_before(model_path: ModelPath) -> None:
    with pytest.raises(ValueError, match="encoder"):
        MesaLlama(model_path("bert"), embedding=True, type_k=F16)
