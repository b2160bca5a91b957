"""The documents that the demo, the evaluation and the training of the bundled model read."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from mesa_gguf import documents
from mesa_gguf.documents import SUBJECTS, count_tokens, is_right, make_document

FACT_KINDS = [kind.name for kinds in SUBJECTS.values() for kind in kinds]


def test_same_seed_same_document() -> None:
    assert make_document(7, 900, depth=0.3) == make_document(7, 900, depth=0.3)
    assert make_document(7, 900).text != make_document(8, 900).text


@pytest.mark.parametrize("n_tokens", [200, 512, 3000, 65536])
def test_length_is_as_asked(n_tokens: int) -> None:
    document = make_document(n_tokens, n_tokens)
    assert document.n_tokens == count_tokens(document.text)
    assert n_tokens - 25 <= document.n_tokens <= n_tokens


def test_length_by_another_tokenizer() -> None:
    document = make_document(1, 4000, len)
    assert abs(len(document.text) - 4000) < 150


@pytest.mark.parametrize("kind", [*SUBJECTS, *FACT_KINDS])
def test_facts_are_told_apart(kind: str) -> None:
    document = make_document(11, 600, kind=kind, n_facts=10, made_up=0.3)
    facts = document.facts
    assert len(facts) == 10
    assert len({fact.key for fact in facts}) == 10
    assert len({(fact.kind, fact.answer) for fact in facts}) == 10
    for fact in facts:
        assert fact.sentence == document.pieces[fact.piece].strip()
        assert fact.key in fact.question
        assert fact.key in fact.answer_sentence
        assert fact.answer in fact.answer_sentence
        assert fact.answer_sentence[1:-1] in fact.sentence


def test_only_the_fact_states_the_answer() -> None:
    for seed in range(20):
        document = make_document(seed, 6000)
        for fact in document.facts:
            assert document.text.count(fact.answer_sentence[1:-1]) == 1
            if fact.answer.isdigit() and len(fact.answer) > 3:
                assert len(re.findall(rf"\b{fact.answer}\b", document.text)) == 1


def test_filler_does_not_show_keys_unless_asked() -> None:
    document = make_document(3, 20000, mentions=0.0)
    for fact in document.facts:
        assert len(re.findall(rf"\b{re.escape(fact.key)}\b", document.text)) == 1


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="nothing"):
        make_document(1, 300, kind="nothing")


def test_more_facts_than_values() -> None:
    with pytest.raises(ValueError, match="40 different facts"):
        make_document(1, 2000, kind="badge", n_facts=40)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_target_lies_where_asked(depth: float) -> None:
    for seed in range(5):
        document = make_document(seed, 4000, depth=depth)
        assert abs(document.target.depth - depth) < 0.02
        at = document.text.index(document.target.sentence) / len(document.text)
        assert abs(at - depth) < 0.04


def test_facts_are_spread_over_the_whole_length() -> None:
    depths = [fact.depth for fact in make_document(5, 30000, n_facts=12).facts]
    assert depths == sorted(depths)
    assert max(b - a for a, b in pairwise([0.0, *depths, 1.0])) < 2.1 / 12


def test_answers_are_judged_by_their_first_line() -> None:
    fact = make_document(2, 300).target
    assert is_right(fact, f" {fact.answer_sentence}\nQuestion: Who?")
    assert not is_right(fact, " " + fact.answer_sentence.replace(fact.answer, "nothing"))
    assert not is_right(fact, "")


def test_prompt_ends_where_the_answer_begins() -> None:
    document = make_document(2, 300)
    assert document.prompt().startswith(document.text + "\n\nQuestion: ")
    assert document.prompt().endswith("\nAnswer:")
    assert documents.prompt(document.text, "Who?").endswith("\n\nQuestion: Who?\nAnswer:")


def test_tokenizer_round_trip() -> None:
    tokenizers = pytest.importorskip("training.tokenizer", exc_type=ImportError)
    tokenizer = tokenizers.build()
    document = make_document(4, 700)
    text = document.prompt()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == count_tokens(text)  # every word is known
    strange = "Zweiundvierzig naïve 猫 cats — 1234567\r\n\t ok?!\n\n  don't"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange
