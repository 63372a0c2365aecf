"""The bundled model's tokenizer loses nothing silently, and its batches hold what they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import tiny_tokenizer
from experiments.tiny_data import NOISE, STEP, VALUE, Mix, batch
from experiments.tiny_tokenizer import BOS, EOS, UNK, VOCAB, build, encode
from jaxlm.eval import arithmetic
from jaxlm.hf.tokenizer import Tokenizer

TOKENIZER = build()
LETTERS = {i: t for t, i in VOCAB.items()}


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=[chr(i) for i in range(32, 127)] + ["\n"], max_size=80))
def test_text_in_range_round_trips_exactly(text):
    if any(special in text for special in tiny_tokenizer.SPECIAL):
        return  # those are tokens of their own
    ids = TOKENIZER.encode(text).ids
    assert ids == [BOS, *encode(text)]
    assert TOKENIZER.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_no_character_is_dropped(text):
    if any(special in text for special in tiny_tokenizer.SPECIAL):
        return
    ids = TOKENIZER.encode(text).ids[1:]
    assert ids == [VOCAB.get(c, UNK) for c in text]
    assert TOKENIZER.decode(ids) == "".join(c if c in VOCAB else "<unk>" for c in text)


def test_the_written_folder_is_what_the_library_reads(tmp_path):
    tiny_tokenizer.write(tmp_path, 2048)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.size == len(VOCAB) <= 128
    assert [tokenizer.id_of(f"{n}_token") for n in ("pad", "bos", "eos", "unk")] == [0, 1, 2, 3]
    assert tokenizer.encode("Q:1+2=\n") == [BOS, *encode("Q:1+2=\n")]


@pytest.mark.torch
def test_transformers_reads_it_the_same(tmp_path):
    from transformers import AutoTokenizer

    tiny_tokenizer.write(tmp_path, 2048)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Q:37+58*4-16=\n58*4=232\n ?kf49 <x> "
    assert tokenizer(text)["input_ids"] == [BOS, *encode(text)]
    assert tokenizer.decode(encode(text)) == text


def documents(row: np.ndarray) -> list[str]:
    """The texts of one packed row."""
    text = "".join(LETTERS[int(i)] for i in row)
    return [part.replace("<pad>", "") for part in text.split("<bos>")[1:]]


def test_batches_are_a_function_of_seed_and_step():
    mix = Mix((4, 128))
    same, other = batch(mix, 0, 7), batch(mix, 0, 8)
    assert all(np.array_equal(same[k], batch(mix, 0, 7)[k]) for k in same)
    assert not np.array_equal(same["inputs"], other["inputs"])
    assert np.array_equal(same["inputs"][:, 1:], same["targets"][:, :-1])


@pytest.mark.parametrize("split", ["train", "test"])
def test_arithmetic_rows_hold_right_solutions_of_their_side(split):
    data = batch(Mix((4, 256), recall=0.0), 0, 0, split)
    for row in data["inputs"]:
        *whole, _cut = documents(row)
        assert whole
        for text in whole:
            question, solution = text.removesuffix("<eos>").split("\n", 1)
            assert arithmetic.split_of(question[2:-1]) == split
            assert all(eval_line(line) for line in solution.strip().split("\n")[:-1])


def eval_line(line: str) -> bool:
    """Whether a step's arithmetic holds, worked out apart from the library."""
    left, result = line.split("=")
    op = next(c for c in left if c in "+-*")
    x, y = map(int, left.split(op))
    return {"+": x + y, "-": x - y, "*": x * y}[op] == int(result)


def test_weights_fall_on_what_can_be_known():
    data = batch(Mix((4, 256), recall=1.0), 0, 0)
    for ids, weights in zip(data["targets"], data["weights"], strict=True):
        values = [LETTERS[int(i)] for i in ids[weights == VALUE]]
        assert values and all(v.isdigit() for v in values)
        known = [LETTERS[int(i)] for i in ids[weights == STEP]]
        assert set(known) - set("abcdefghijklmnopqrstuvwxyz") == {"\n"}
        assert 2 * known.count("\n") == len(known) == len(values)  # a letter and a line end each
        assert (weights[(ids == VOCAB[";"]) | (ids == VOCAB["?"])] == np.float32(NOISE)).all()
        assert not weights[(ids == BOS) | (ids == tiny_tokenizer.PAD)].any()
    sums = batch(Mix((4, 256), recall=0.0), 0, 0)
    assert (sums["weights"][sums["targets"] == EOS] == STEP).all()
