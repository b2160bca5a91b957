"""The documents that the demo, the evaluation and the training of the bundled model read."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from mesa_gguf.lab import documents
from mesa_gguf.lab.documents import LINKS, SUBJECTS, count_tokens, is_right, make_document

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


@cache
def _tokenizer() -> Any:
    return pytest.importorskip("training.tokenizer", exc_type=ImportError).build()


@pytest.mark.slow  # the tokenizer is trained: 8 s
def test_tokenizer_round_trip() -> None:
    tokenizer = _tokenizer()
    document = make_document(4, 700)
    text = document.prompt()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == count_tokens(text)  # every word is known
    strange = "Zweiundvierzig naïve 猫 cats — 1234567\r\n\t ok?!\n\n  don't"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange


#
# questions of two hops
#


def test_without_links_documents_are_what_they_were() -> None:
    """The texts of published figures, and those that the bundled model was trained on first."""
    digest = hashlib.sha256()
    for seed in range(40):
        document = make_document(
            seed,
            300 + 40 * seed,
            n_facts=2 + seed % 9,
            made_up=seed % 3 / 2,
            mentions=0.05,
            depth=None if seed % 2 else seed / 40,
        )
        facts = [
            (f.sentence, f.question, f.answer, f.answer_sentence, f.kind, f.key, f.depth, f.piece)
            for f in document.facts
        ]
        assert document.links == document.two_hops == ()
        parts = (document.subject, document.pieces, facts, document.target.key, document.n_tokens)
        digest.update(repr(parts).encode())
    assert digest.hexdigest() == "8c946103fa7527cfb0ed188940f9a52c54fb52eb435dc8d0f252d1037c5a8b4b"


@pytest.mark.parametrize("kind", [*SUBJECTS, *FACT_KINDS])
@pytest.mark.parametrize("n_links", [1, 10])
def test_a_link_leads_from_one_key_to_another(kind: str, n_links: int) -> None:
    document = make_document(12, 600, kind=kind, n_facts=10, n_links=n_links, made_up=0.3)
    keys = {fact.key for fact in document.facts}
    links = document.links
    assert len(document.facts) == len(keys) == 10
    assert len(links) == len({link.key for link in links}) == len({link.answer for link in links}) == n_links
    for link in links:
        assert {link.key, link.answer} <= keys and link.key != link.answer
        assert link.sentence == document.pieces[link.piece].strip()
        assert link.key in link.question and link.answer not in link.question


@pytest.mark.parametrize("kind", [*SUBJECTS, *FACT_KINDS])
def test_a_two_hop_question_has_one_answer(kind: str) -> None:
    for seed in range(5):
        document = make_document(seed, 3000, kind=kind, n_facts=10, n_links=8)
        facts = {fact.key: fact for fact in document.facts}
        assert [two.link for two in document.two_hops] == list(document.links)
        for two in document.two_hops:
            link, fact = two.link, two.fact
            assert fact == facts[link.answer]
            # the question names the first key, and neither the second nor the value
            assert link.key in two.question and fact.key not in two.question
            assert not re.search(rf"\b{two.answer}\b", two.question)
            (phrase,) = (each.phrase for each in LINKS[_key_slot(fact)] if each.name == link.kind)
            assert phrase.format(key=link.key) in two.question
            # each hop is said once, and the key has no other link of any kind
            assert two.answer == fact.answer
            assert two.answer_sentence == f"{link.answer_sentence} {fact.answer_sentence}"
            assert document.text.count(link.answer_sentence[1:-1]) == 1
            assert document.text.count(fact.answer_sentence[1:-1]) == 1
            starts = [each.phrase.format(key=link.key)[1:] for each in LINKS[_key_slot(fact)]]
            assert sum(len(re.findall(rf"{re.escape(start)}\b", document.text)) for start in starts) == 1


def _key_slot(fact: documents.Fact) -> str:
    return next(kind.key for kinds in SUBJECTS.values() for kind in kinds if kind.name == fact.kind)


def test_links_read_as_they_should() -> None:
    two = make_document(3, 420, kind="price", n_facts=10, n_links=10).two_hops[0]
    assert re.fullmatch(r"What is the price of the one be(hind|low) the \w+ \w+\?|How much is .*\?", two.question)
    assert re.fullmatch(
        r"The one be(hind|low) the \w+ \w+ is the (\w+ \w+)\. The price of the \2 is \d{3} coins\.", two.answer_sentence
    )
    assert is_right(two, f" {two.answer_sentence}\nQuestion: Who?")
    assert not is_right(two, f" {two.fact.answer_sentence}\n")


def test_links_lie_among_the_facts_over_the_whole_length() -> None:
    document = make_document(5, 30000, n_facts=10, n_links=10, depth=0.3)
    depths = [link.depth for link in document.links]
    assert depths == sorted(depths)
    everything = sorted([*depths, *(fact.depth for fact in document.facts)])
    assert max(b - a for a, b in pairwise([0.0, *everything, 1.0])) < 2.1 / 20
    kinds = ["link" if depth in depths else "fact" for depth in everything]
    assert 4 < sum(a != b for a, b in pairwise(kinds)) < 19
    assert abs(document.target.depth - 0.3) < 0.02 and document.target in document.facts
    assert document == make_document(5, 30000, n_facts=10, n_links=10, depth=0.3)
    assert document.n_tokens == count_tokens(document.text) <= 30000


@pytest.mark.parametrize(("n_facts", "n_links"), [(1, 1), (4, 5)])
def test_more_links_than_facts(n_facts: int, n_links: int) -> None:
    with pytest.raises(ValueError, match=f"{n_links} links between {n_facts} facts"):
        make_document(1, 400, n_facts=n_facts, n_links=n_links)


@pytest.mark.slow
def test_links_have_only_words_that_the_bundled_model_knows() -> None:
    tokenizer = _tokenizer()
    for kind in SUBJECTS:
        document = make_document(6, 700, kind=kind, n_facts=12, n_links=12)
        for two in document.two_hops:
            for text in (document.prompt(two), document.prompt(two.link), " " + two.answer_sentence):
                assert len(tokenizer.encode(text)) == count_tokens(text)
