"""What the bundled model is trained on, and its file read back (with PyTorch and regex installed)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from conftest import BUNDLED

pytest.importorskip("torch")
data = pytest.importorskip("training.data", exc_type=ImportError)
export = pytest.importorskip("training.export", exc_type=ImportError)


def test_a_file_that_is_read_and_written_again_is_the_same(tmp_path: Path) -> None:
    model, tokenizer = export.load(BUNDLED)
    export.export(model, tokenizer, tmp_path / "again.gguf", "q8_0")
    assert (tmp_path / "again.gguf").read_bytes() == BUNDLED.read_bytes()


@pytest.mark.parametrize("links", [0.0, 1.0])
def test_answers_stand_where_a_row_says(links: float) -> None:
    _, tokenizer = export.load(BUNDLED)
    mix = data.Mix(length=512, copy=0.0, made_up=0.3, links=links)
    ids, weights, rows = data.batch(random.Random(3), tokenizer, mix, 20)
    assert ids.shape == weights.shape == (20, 512)
    n_sentences = {False: 0, True: 0}
    for row in rows:
        assert len(row.ids) == len(row.weights) <= 512
        for answer in row.answers:
            said = tokenizer.decode(row.ids[answer.start : answer.end])
            assert said.startswith(" The ") and said.endswith(".\n")
            assert said.count(".") == (2 if answer.two_hop else 1)
            weights = row.weights[answer.start : answer.end]
            assert weights[0] == data.ANSWER_WEIGHT and weights[-1] == data.VALUE_WEIGHT
            key = [token for token, weight in zip(row.ids[answer.start :], weights) if weight == data.KEY_WEIGHT]
            assert tokenizer.decode(key).strip() in said.rpartition(". ")[2]
            assert bool(key) == answer.two_hop
            n_sentences[answer.two_hop] += 1
    assert n_sentences[False] > 20
    assert (n_sentences[True] > 20) == (links > 0)
