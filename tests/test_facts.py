"""Facts in real text: where they lie, how they are asked for, and that the same seed gives the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesa_gguf.errors import PromptError
from mesa_gguf.lab import facts
from mesa_gguf.lab.facts import (
    ALIKE,
    FORMS,
    UNLIKE,
    Haystack,
    Kind,
    accepted_forms,
    default_text,
    load_text,
    make_document,
)

PROSE = Haystack(
    " ".join(
        f"The {word} of stage {n} went on. Nobody saw it!\n\nSo it was."
        for n in range(60)
        for word in ("river", "march", "wind")
    )
)


def n_words(text: str) -> int:
    return len(text.split())


SMALL_WORDS = set(
    """a about after all an and are as at be been before by can did do does for from get gets give given goes had has have he her him his how
    in is it its made make must no not of on one or out own she so some than that the their there they this to up was went were what when where
    which who whose with would year day""".split()
)


def stems(text: str) -> set[str]:
    """The content words of a text, by their first five letters."""
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", re.sub(r"\{\w\}", "", text).lower())
    return {word.removesuffix("'s")[:5] for word in words if word.removesuffix("'s") not in SMALL_WORDS}


@pytest.mark.parametrize("kind", [*UNLIKE, *ALIKE], ids=lambda kind: kind.name)
def test_a_paraphrase_shares_no_content_word(kind: Kind) -> None:
    assert not stems(kind.statement) & stems(f"{kind.paraphrase} {kind.begun}")


@pytest.mark.parametrize("kind", [*UNLIKE, *ALIKE], ids=lambda kind: kind.name)
def test_a_kind_is_whole(kind: Kind) -> None:
    for text in (kind.statement, kind.question, kind.paraphrase, kind.begun):
        assert ("{k}" in text) == (kind.key != "")
        assert ("{v}" in text) == (text is kind.statement)
    assert kind.statement.endswith(
        tuple("{v}" + unit for unit in ("", " dollars", " kilometres", " years", " metres", " kilograms"))
    )
    assert kind.question.endswith("?") and kind.paraphrase.endswith("?")
    assert bool(kind.counted) == (kind.key != "")


def test_kinds_have_names_of_their_own() -> None:
    names = [kind.name for kind in UNLIKE]
    assert len(names) == len(set(names)) >= 60
    assert len({kind.name for kind in ALIKE}) == len(ALIKE) >= 12
    assert len({kind.paraphrase for kind in (*UNLIKE, *ALIKE)}) == len(UNLIKE) + len(ALIKE)


def test_a_fact_is_asked_for_as_its_own_kind_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments put other lists in, some of whose kinds have names that are here too."""
    same_name = Kind(
        ALIKE[0].name, "hundreds", "the kettle holds {v} cups", "How many cups?", "What fits in it?", "it is"
    )
    monkeypatch.setattr(facts, "UNLIKE", (same_name,))
    for document in (make_document(PROSE, seed, 900, n_words, n_unlike=1, n_alike=60, n_counts=1) for seed in range(6)):
        (i,) = [i for i, fact in enumerate(document.facts) if not fact.key and fact.kind == same_name.name]
        own = [question for question in document.questions if question.facts == (i,)]
        assert [question.text for question in own] == ["How many cups?", "What fits in it?"]
        assert all(i not in question.facts for question in document.questions if question.form == "count")


def test_word_lists_hold_each_word_once() -> None:
    lists = {name: words for name, words in vars(facts).items() if name.isupper() and isinstance(words, list)}
    assert len(lists) > 25
    for name, words in lists.items():
        assert len(words) == len(set(words)) and all(word == word.strip() and word for word in words), name


@given(
    st.integers(), st.integers(700, 1000), st.integers(0, 20), st.integers(2, 14), st.integers(0, 5), st.integers(0, 3), st.integers(0, 6)
)  # fmt: skip
def test_a_document(seed: int, n: int, n_unlike: int, n_alike: int, n_links: int, n_counts: int, n_absent: int) -> None:
    made = make_document(
        PROSE,
        seed,
        n,
        n_words,
        n_unlike=n_unlike,
        n_alike=n_alike,
        n_links=n_links,
        n_counts=n_counts,
        n_absent=n_absent,
    )
    again = make_document(
        PROSE,
        seed,
        n,
        n_words,
        n_unlike=n_unlike,
        n_alike=n_alike,
        n_links=n_links,
        n_counts=n_counts,
        n_absent=n_absent,
    )
    assert made == again
    assert n - 60 <= n_words(made.text) <= n
    assert len(made.facts) == n_unlike + n_alike + n_links
    end = 0
    for fact in made.facts:
        assert made.text[fact.start : fact.stop] == fact.sentence and fact.value in fact.sentence
        assert (
            fact.start > end
            and made.text[fact.start - 2] in ".!"
            and made.text[fact.stop : fact.stop + 1] in ("", " ", "\n")
        )
        end = fact.stop
    # one in each n-th part, more or less
    for i, fact in enumerate(made.facts):
        assert abs(fact.depth - (i + 0.5) / len(made.facts)) < 0.5 / len(made.facts) + 0.1
    n_of = {form: sum(q.form == form for q in made.questions) for form in FORMS}
    n_facts = n_unlike + n_alike
    assert list(n_of.values()) == [n_facts, n_facts, n_links, n_counts, n_absent]
    for question in made.questions:
        about = [made.facts[i] for i in question.facts]
        assert question.is_right(f"It is {question.accepted[0]}.") and not question.is_right(
            "It is nothing of the kind."
        )
        if question.form in ("literal", "paraphrase"):
            assert question.answer == about[0].value and about[0].key in question.text
        if question.form == "literal":
            assert about[0].sentence.startswith(f"{question.begun} {question.answer}")
        if question.form == "two-hop":
            link, fact = about
            assert link.value == fact.key and link.key in question.text and fact.key not in question.text
            assert question.answer == fact.value
        if question.form == "count":
            assert question.answer == facts.NUMBERS[len(about)] and all(fact.key in question.text for fact in about)
        if question.form == "absent":
            assert not about and not any(fact.sentence.startswith(question.begun) for fact in made.facts)


def test_values_tell_facts_apart() -> None:
    made = make_document(PROSE, 3, 900, n_words, n_unlike=40, n_alike=12)
    values = [fact.value for fact in made.facts if fact.kind != "link"]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("14 March", "on March 14"), ("2 May", "It is on the 2nd of May."), ("11 June", "June 11th"), ("6:05 in the morning", "at 6:05 AM"),
        ("6:05 in the evening", "6:05 p.m."), ("4210", "4,210 metres"), ("three", "There are 3 of them."), ("Otto Falk", "it was OTTO  FALK"),
    ],
)  # fmt: skip
def test_what_is_accepted(value: str, written: str) -> None:
    question = facts.Question("literal", "", "?", value, "", accepted_forms(value), (0,))
    assert question.is_right(written) and not question.is_right(f"x{value}x")


def test_a_whole_text_without_a_tokenizer() -> None:
    made = make_document(PROSE, 5)
    without = made.text
    for fact in reversed(made.facts):
        without = without[: fact.start - 1] + without[fact.stop :]
    assert without == PROSE.text


def test_a_text_without_sentences() -> None:
    made = make_document(Haystack("word " * 500), 5, 400, n_words)
    assert len(made.facts) == 28 and n_words(made.text) <= 400


def test_texts_and_lengths_that_do_not_do() -> None:
    with pytest.raises(PromptError, match="fewer than 100000 tokens"):
        make_document(PROSE, 1, 100_000, n_words)
    with pytest.raises(PromptError, match="too few"):
        make_document(PROSE, 1, 20, n_words)
    with pytest.raises(PromptError, match="has 5 sentences"):
        make_document(Haystack("So it went on. " * 6), 1)
    with pytest.raises(PromptError, match="no sentences"):
        Haystack(" ")
    with pytest.raises(PromptError, match="at most"):
        make_document(PROSE, 1, n_unlike=1000)


def test_text_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("This is b.\n", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("# Title\n\nThis is a.\n", encoding="utf-8")
    assert load_text([tmp_path / "b.txt", tmp_path / "sub"]) == "This is b.\n\n# Title\n\nThis is a."


def test_the_default_text_is_long_prose() -> None:
    text = default_text()
    assert len(text) > 300_000 and len(Haystack(text).borders) > 3000
