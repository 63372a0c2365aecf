"""Stop rules against plain search in the text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxlm.core.errors import ConfigError, TokenizerError
from jaxlm.decode.rows import release
from jaxlm.decode.samplers import Categorical, Greedy
from jaxlm.decode.stop import NEVER, Stop, cut, stop_rule
from jaxlm.decode.vocabulary import token_bytes
from tests.decode.tiny import DECODE, EXTEND, VOCAB, start, tiny_model

STEP = jax.jit(lambda rule, match, token: rule.step(match, token))
SHORT = st.text("ab\n", min_size=1, max_size=4)


def run(rule, tokens):
    """Per token, whether it is done and whether it is held."""
    match, flags = jnp.zeros((1, 2), jnp.int32), []
    for token in tokens:
        match, done, held = STEP(rule, match, jnp.array([token]))
        flags.append((bool(done[0]), bool(held[0])))
    return flags


def first_complete(texts, patterns):
    """The first token after which a pattern is in the text; None if there is none."""
    for count in range(1, len(texts) + 1):
        if any(pattern in b"".join(texts[:count]) for pattern in patterns):
            return count - 1
    return None


def delimiter_ends(texts, patterns):
    """The tokens in which a delimiter ends, each search starting after the one before."""
    text, owner = b"".join(texts), [i for i, t in enumerate(texts) for _ in t]
    ends, begin = set(), 0
    for at in range(1, len(text) + 1):
        if any(text[begin:at].endswith(pattern) for pattern in patterns):
            ends.add(owner[at - 1])
            begin = at
    return ends


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text("ab\nc", max_size=5), min_size=1, max_size=12),
    st.lists(SHORT, min_size=1, max_size=4), st.lists(SHORT, min_size=1, max_size=3), st.data(),
)
def test_strings_and_delimiters_are_found_where_they_end(vocabulary, strings, delimiters, data):
    vocabulary = [text.encode() for text in [*vocabulary, "a", "b", "\n"]]
    rule = stop_rule(vocabulary, strings=strings, delimiters=delimiters)
    tokens = data.draw(st.lists(st.integers(0, len(vocabulary) - 1), min_size=1, max_size=20))
    texts = [vocabulary[token] for token in tokens]
    flags = run(rule, tokens)
    done = next((at for at, (stopped, _) in enumerate(flags) if stopped), None)
    assert done == first_complete(texts, [s.encode() for s in strings])
    held = {at for at, (_, h) in enumerate(flags) if h}
    assert held == delimiter_ends(texts, [s.encode() for s in delimiters])


@settings(max_examples=200, deadline=None)
@given(st.text("ab\n", max_size=12), st.lists(SHORT, min_size=1, max_size=3))
def test_cut_ends_at_the_first_complete_string(text, strings):
    complete = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in strings)]
    if not complete:
        assert cut(text, strings) == cut(text, strings, after=True) == text
        return
    end = complete[0]
    longest = max((s for s in strings if text[:end].endswith(s)), key=len)
    assert cut(text, strings, after=True) == text[:end]
    assert cut(text, strings) == text[: end - len(longest)]
    assert cut(text.encode(), [s.encode() for s in strings]) == cut(text, strings).encode()


def byte_level_tokenizer():
    """A small byte-level vocabulary: most characters beyond ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["So the answer is\n\n## Step 2: four\n\n"] * 9, trainer)
    return tokenizer


TEXT = "So the answer is 4.\n\n## Step 2: naïve 数学 🙂 done\n\n<|end|>"


def test_byte_level_vocabulary_and_characters_split_across_tokens():
    tokenizer = byte_level_tokenizer()
    vocabulary = token_bytes(tokenizer, size=320)
    tokens = tokenizer.encode(TEXT).ids
    assert len(vocabulary) == 320 and b"".join(vocabulary[t] for t in tokens) == TEXT.encode()
    assert len(tokenizer.encode("数").ids) == 3
    for string in ("数学", "🙂", "ï", "\n\n##", "<|end|>", "e\n\n<"):
        rule = stop_rule(vocabulary, strings=[string])
        done = [at for at, (stopped, _) in enumerate(run(rule, tokens)) if stopped]
        texts = [vocabulary[token] for token in tokens]
        assert done[0] == first_complete(texts, [string.encode()]), string


def test_sentencepiece_vocabulary(data_dir):
    path = data_dir / "tokenizers" / "granite-7b-lab" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    vocabulary = token_bytes(tokenizer)
    text = "So x = 3.\n\nStep 2: 数学 🙂 fin"
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(vocabulary[t] for t in tokens).decode().strip() == text
    rule = stop_rule(vocabulary, strings=["🙂 f"], delimiters=["\n\n"])
    texts = [vocabulary[token] for token in tokens]
    flags = run(rule, tokens)
    assert [at for at, f in enumerate(flags) if f[0]] == [first_complete(texts, ["🙂 f".encode()])]
    assert {at for at, f in enumerate(flags) if f[1]} == delimiter_ends(texts, [b"\n\n"])
    assert rule.strings.table_SC.nbytes + rule.strings.class_V.nbytes < 80_000  # 32,008 tokens


def test_other_tokenizers_are_refused():
    with pytest.raises(TokenizerError, match="WordPiece"):
        tokenizer = Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
        tokenizer.decoder = decoders.WordPiece()
        token_bytes(tokenizer)
    with pytest.raises(TokenizerError, match="the model 10 tokens"):
        token_bytes(byte_level_tokenizer(), size=10)


def test_added_tokens_beyond_the_model_are_left_out():
    """As Gemma 3's image token, one past the vocabulary of its text models."""
    tokenizer = byte_level_tokenizer()
    size, before = tokenizer.get_vocab_size(), token_bytes(tokenizer)
    tokenizer.add_special_tokens(["<image>"])
    assert tokenizer.token_to_id("<image>") == size == len(before)
    assert token_bytes(tokenizer, size=size) == before
    assert token_bytes(tokenizer) == token_bytes(tokenizer, size=size + 1) == [*before, b"<image>"]
    with pytest.raises(TokenizerError, match=f"ids up to {size - 1}, the model {size - 1} tokens"):
        token_bytes(tokenizer, size=size - 1)


LETTERS = [bytes([65 + i]) if i < 26 else b"<%d>" % i for i in range(VOCAB)]


def texts_of(state, lengths):
    """What each row has drawn."""
    return [
        b"".join(LETTERS[t] for t in np.asarray(state.tokens_BS[row, lengths[row]: length]))
        for row, length in enumerate(np.asarray(state.length_B))
    ]


def test_decode_stops_holds_and_releases():
    """Rows draw the same text as without a rule, and end or wait exactly where it says."""
    lm, params = tiny_model()
    sampler, begin = Categorical(1.0), start(lm, params, 40, Categorical(1.0))
    lengths = np.asarray(begin.length_B)
    free = texts_of(DECODE(lm, params, sampler, begin, NEVER, 25), lengths)
    pair = free[0][4:9].decode()  # in row 0, in the middle of its text; may cut tokens apart
    letter = free[1][6:8].decode()
    rule = stop_rule(LETTERS, strings=[pair], delimiters=[letter])
    state = DECODE(lm, params, sampler, begin, rule, 25)
    for row, text in enumerate(texts_of(state, lengths)):
        assert free[row].startswith(text)
        done, held = bool(state.done_B[row]), bool(state.hold_B[row])
        assert done == (pair.encode() in text) and held == (letter.encode() in text)
        if not (done or held):
            assert int(state.length_B[row]) == lengths[row] + 25
    assert state.hold_B[1] and (state.done_B[0] or state.hold_B[0])
    again = DECODE(lm, params, sampler, state, rule, 25)
    np.testing.assert_array_equal(again.tokens_BS[1], state.tokens_BS[1])  # a held row waits
    only = release(state, jnp.array([False, True, False]))
    assert not only.hold_B[1] and bool(only.hold_B[0]) == bool(state.hold_B[0])
    count = 0
    while not state.done_B.all() and count < 30:
        state, count = DECODE(lm, params, sampler, release(state), rule, 25), count + 1
    for row, text in enumerate(texts_of(state, lengths)):  # in pieces, the same text as at once
        assert text.startswith(free[row]) or pair.encode() in text
        assert cut(text, [pair.encode()]) == text.split(pair.encode())[0]


def test_a_string_may_be_split_across_calls_but_not_across_chat_turns():
    lm, params = tiny_model()
    begin = start(lm, params, 40)
    lengths = np.asarray(begin.length_B)
    text = texts_of(DECODE(lm, params, Greedy(), begin, NEVER, 6), lengths)[0]
    string = text[:-1].decode()
    rule = stop_rule(LETTERS, strings=[string])
    whole = DECODE(lm, params, Greedy(), begin, rule, 12)
    pieces = begin
    for _ in range(12):
        pieces = DECODE(lm, params, Greedy(), pieces, rule, 1)
    assert bool(whole.done_B[0]) and texts_of(pieces, lengths) == texts_of(whole, lengths)
    part = DECODE(lm, params, Greedy(), begin, rule, 2)
    assert int(part.match_B2[0, 0]) != int(rule.strings.base)  # it stands inside the string
    turn = jnp.zeros((3, 1), jnp.int32)
    after, _ = EXTEND(lm, params, part, turn, jnp.array([1, 0, 0]))
    assert int(after.match_B2[0, 0]) == 0
    np.testing.assert_array_equal(after.match_B2[1:], part.match_B2[1:])


def test_a_state_left_by_another_rule_counts_as_none():
    one, other = (stop_rule(LETTERS, strings=[s]) for s in ("AB", "QB"))
    match, _, _ = one.step(jnp.zeros((1, 2), jnp.int32), jnp.array([0]))
    assert one.step(match, jnp.array([1]))[1].tolist() == [True]
    assert other.step(match, jnp.array([1]))[1].tolist() == [False]


def test_other_strings_need_no_new_compilation():
    traces = []

    @jax.jit
    def step(rule, match, token):
        traces.append(1)
        return rule.step(match, token)

    for strings in (["AB"], ["<40>", "Q"], ["ABCDEFG", "BCD", "Z<29>"]):
        rule = stop_rule(LETTERS, ids=(2,), strings=strings)
        step(rule, jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32))
    assert len(traces) == 1
    assert hash(Stop(ids=(1, 2))) == hash(Stop(ids=(1, 2)))  # ids alone may be static


def test_tokens_beyond_the_vocabulary_break_a_string():
    rule = stop_rule([b"a", b"b"], strings=["ab"])
    assert run(rule, [0, 1])[-1] == (True, False)
    assert run(rule, [0, 5, 1])[-1] == (False, False)


@pytest.mark.parametrize(
    "values", [{"strings": [""]}, {"strings": "ab"}, {"delimiters": [b"a"]}, {"strings": ["é"]},
               {"ids": [61]}, {"ids": [-1]}], ids=str,
)
def test_rules_that_cannot_be_kept_are_refused(values):
    with pytest.raises(ConfigError, match="stop"):
        stop_rule(LETTERS, **values)


@pytest.mark.parametrize("ids", [[1], (-1,), (1.0,), (True,), "2"], ids=str)
def test_ids_must_be_a_tuple_of_ids(ids):
    with pytest.raises(ConfigError, match="stop ids"):
        Stop(ids=ids)
