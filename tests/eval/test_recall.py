"""The recall task: generator, split and verifier."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.eval.recall import KEYS, Document, check_answer, sample, split_of

DOCUMENT = Document((("kf", "49"), ("qz", "13"), ("ab", "77")), (1, 0))


def test_the_format_is_the_documented_one():
    assert DOCUMENT.text == "R:kf49;qz13;ab77;\n?qz13\n?kf49\n"
    assert DOCUMENT.prompt(0) == "R:kf49;qz13;ab77;\n?qz"
    assert DOCUMENT.prompt(1) == "R:kf49;qz13;ab77;\n?qz13\n?kf"
    assert DOCUMENT.answers == ("13", "49")


@settings(max_examples=100, deadline=None)
@given(st.integers(32, 1024), st.integers(1, 3), st.integers(0, 2**32))
def test_documents_fill_their_length_with_distinct_keys(length, queries, seed):
    document = sample(np.random.default_rng(seed), length, queries)
    assert length - 5 < len(document.text) + 1 <= length
    assert len({key for key, _ in document.pairs}) == len(document.pairs)
    for i, answer in enumerate(document.answers):
        key = document.prompt(i)[-2:]
        assert document.context.replace("R:", ";").count(f";{key}{answer};") == 1
        assert document.text.startswith(document.prompt(i) + answer + "\n")


def test_same_seed_same_document_and_splits_never_meet():
    draw = lambda seed, split: sample(np.random.default_rng(seed), 128, 4, split)
    assert draw(5, "train") == draw(5, "train") != draw(6, "train")
    assert {split_of(draw(s, "test").context) for s in range(50)} == {"test"}
    assert {split_of(draw(s, "train").context) for s in range(50)} == {"train"}


@pytest.mark.parametrize("text, right", [
    ("13\n", True), ("13\n?ab77\n", True), ("13", True), ("49\n", False), ("1", False),
    ("133\n", False), (" 13\n", False), ("", False), ("\n13", False)])
def test_an_answer_is_right_or_not(text, right):
    assert check_answer(DOCUMENT, 0, text) is right


@pytest.mark.parametrize("length, queries, match", [
    (14, 1, "room for 0 pairs"), (8000, 1, f"expected 1 to {len(KEYS)}"), (64, 0, "queries")])
def test_impossible_sizes_are_refused(length, queries, match):
    with pytest.raises(ValueError, match=match):
        sample(np.random.default_rng(0), length, queries)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be"):
        sample(np.random.default_rng(0), 64, 1, "validation")
