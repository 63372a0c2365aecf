"""Stop strings of generate and stream against plain search in the text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxlm
from jaxlm.core.errors import ConfigError, TokenizerError
from jaxlm.decode import generate as module
from jaxlm.decode.generate import generate, stream
from jaxlm.decode.rows import release
from jaxlm.decode.samplers import Temperature
from jaxlm.decode.stop import cut
from jaxlm.decode.text import kept_bytes, text_rule
from tests.decode.steps import Script
from tests.decode.test_stop import SHORT, TEXT, byte_level_tokenizer, first_complete
from tests.tiny import VOCAB, tokenizer_json, write_folder

LENGTH = 24  # tokens a script, so that one compiled program serves
WARM = Temperature(1.0)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A model whose tokens hold several characters, or a part of one."""
    folder = write_folder(tmp_path_factory.mktemp("merged") / "m", vocab_size=320,
                          bos_token_id=None, eos_token_id=None)
    (folder / "tokenizer.json").write_text(byte_level_tokenizer().to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return jaxlm.load(folder)


def scripted(bundle, tokens, **arguments):
    """What generate and stream, in three sizes of piece, make of given tokens."""
    script = Script(jnp.asarray(tokens + [0] * (LENGTH - len(tokens))))
    arguments |= {"sampler": script, "max_new_tokens": len(tokens), "max_len": LENGTH + 8}
    answer = generate(bundle, "go", **arguments)
    for chunk in (1, 3, LENGTH):
        pieces, found = collect(stream(bundle, "go", chunk=chunk, **arguments))
        assert "".join(pieces) == answer.text and found.finish == answer.finish
        assert found.tokens == answer.tokens
    return answer


def collect(run):
    """The pieces of a stream, and its answer."""
    pieces = []
    while True:
        try:
            pieces.append(next(run))
        except StopIteration as end:
            return pieces, end.value


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(["So the", " answer", " is", "\n\n", "##", " Step", "\n", "é", "数",
                                 "a", "🙂", "#"]), min_size=1, max_size=9).map("".join), st.data())
def test_the_text_ends_where_a_search_would_end_it(merged, text, data):
    tokens = merged.tokenizer.encode(text)[:LENGTH]
    text = merged.tokenizer.decode(tokens)  # the last character may be cut
    spans = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 4))
    parts = spans.map(lambda span: text[span[0]: span[0] + span[1]])
    strings = data.draw(st.lists(st.one_of(parts, SHORT), min_size=1, max_size=3))
    strings = [string for string in strings if "\ufffd" not in string] or ["#"]
    include = data.draw(st.booleans())
    answer = scripted(merged, tokens, stop=strings, include_stop=include)
    assert answer.text == cut(text, strings, after=include)
    complete = any(string in text for string in strings)
    assert answer.finish == ("string" if complete else "length")
    drawn = [merged.tokenizer.decode([t]) for t in tokens]
    if complete and "\ufffd" not in "".join(drawn):
        last = first_complete([d.encode() for d in drawn], [s.encode() for s in strings])
        assert answer.tokens == tuple(tokens[: last + 1])


def test_special_tokens_and_split_characters(merged):
    tokens = merged.tokenizer.encode(TEXT)
    for string, before in {
        "<|end|>": TEXT.removesuffix("<|end|>"), "|end": TEXT.removesuffix("<|end|>"),
        "学 🙂": TEXT.split("学")[0], "\n<|e": TEXT.removesuffix("\n<|end|>"), "So": "",
    }.items():
        answer = scripted(merged, tokens[-LENGTH:] if string != "So" else tokens[:8], stop=string)
        assert answer.finish == "string" and before.endswith(answer.text), string
        assert len(answer.text) > 3 or string == "So"
    shown = scripted(merged, tokens[-LENGTH:], stop="\n<|end|>", include_stop=True)
    assert shown.text.endswith("done\n\n")  # a special token's name is not text


def test_an_id_and_a_string(merged):
    tokens = merged.tokenizer.encode("ab\n\ncd")
    ids = {"stop_ids": [tokens[-1]]}
    assert scripted(merged, tokens, stop=["x"], **ids).finish == "stop"
    assert scripted(merged, tokens, stop=["x"], **ids).text == "ab\n\nc"
    assert scripted(merged, tokens, stop=["\n\n"], **ids).finish == "string"
    assert scripted(merged, tokens, stop=["d"], **ids).text == "ab\n\nc"


PROMPTS = ["Hello", "a longer prompt", "x"]


def test_rows_end_apart_and_their_neighbours_do_not_notice(bundle):
    arguments = {"max_new_tokens": 12, "sampler": WARM, "key": jax.random.key(5), "stop_ids": []}
    free = generate(bundle, PROMPTS, **arguments)
    letters = [bundle.tokenizer.decode([token]) for token in free[1].tokens]
    string = next(letter for letter in letters[2:10] if letter.isascii())
    for cache in (jaxlm.Dense(), jaxlm.Kivi(group=32, window=32)):
        answers = generate(bundle, PROMPTS, stop=[string], cache=cache, **arguments)
        for found, whole in zip(answers, free, strict=True):
            assert found.tokens == whole.tokens[: len(found.tokens)]
            assert found.text == whole.text.split(string)[0]
            assert found.finish == ("string" if string in whole.text else "length")
            np.testing.assert_allclose(found.logprobs, whole.logprobs[: len(found.tokens)],
                                       atol=1e-5)
        assert answers[1].finish == "string" and len({a.finish for a in answers}) == 2
        pieces = list(stream(bundle, PROMPTS, stop=[string], cache=cache, chunk=5, **arguments))
        assert ["".join(p) for p in zip(*pieces, strict=True)] == [a.text for a in answers]


def test_other_strings_reuse_the_program(bundle):
    arguments = {"max_new_tokens": 5, "sampler": Temperature(0.5)}
    generate(bundle, PROMPTS, stop=["ab"], **arguments)
    before = module.decode_jit._cache_size()
    for stop in ("Q:", ["\n\n", "##", "Step 12:"], {"z"}):
        generate(bundle, PROMPTS, stop=stop, **arguments)
    assert module.decode_jit._cache_size() == before
    assert text_rule(bundle, ["ab"]) is text_rule(bundle, ["ab"])


def test_a_row_is_held_released_and_ended(bundle):
    """What a search needs: the same text in steps as at once."""
    script = Script(jnp.asarray(bundle.tokenizer.encode("one.two.3.!!....")))
    keys = jax.random.split(jax.random.key(0), 2)
    rule = text_rule(bundle, strings=["!!"], delimiters=["."])
    state = module.prefill_jit(bundle.lm, bundle.params, script, jnp.ones((2, 3), jnp.int32),
                               jnp.array([3, 2]), jaxlm.Dense(), 40, keys)
    steps = []
    run = module.decode_jit
    while not state.done_B.all():
        state = run(bundle.lm, bundle.params, script, release(state), rule, 20)
        rows = [bundle.tokenizer.decode(state.tokens_BS[r, n: state.length_B[r]])
                for r, n in enumerate((3, 2))]
        assert rows[0] == rows[1] and len(steps) < 5
        steps.append(rows[0])
    assert steps == ["one.", "one.two.", "one.two.3.", "one.two.3.!!"]


@pytest.mark.parametrize("stop, words", [
    ("", "not empty"), ([""], "not empty"), (["a", ""], "not empty"), ([1], "not empty"),
    (["a", None], "not empty"), (5, "a string or a list"), (b"a", "a string or a list"),
    ({"a": 1}, "a string or a list"), (None, "a string or a list"), ([b"a"], "not empty"),
], ids=str)
def test_stops_that_are_no_strings_are_refused(bundle, stop, words):
    for function in (generate, stream):
        with pytest.raises(ConfigError, match=words):
            function(bundle, "x", stop=stop)


def test_a_string_that_no_tokens_spell(tmp_path):
    from experiments import twins

    tiny = jaxlm.load("tiny")
    with pytest.raises(ConfigError, match="no token contains"):
        generate(tiny, "Q:1+1=\n", stop="é")
    words = jaxlm.load(twins.write(twins.config_of("llama"), tmp_path / "words"))
    with pytest.raises(TokenizerError, match="decodes with None"):
        generate(words, "w5", stop="w6", max_new_tokens=2)
    assert generate(words, "w5", max_new_tokens=2).finish == "length"


@settings(max_examples=200, deadline=None)
@given(st.text("ab\né", max_size=10), st.lists(SHORT, min_size=1, max_size=3), st.booleans())
def test_what_is_kept_for_certain_stays_whatever_comes(text, strings, include):
    drawn = text.encode()
    keep, complete = kept_bytes(drawn, strings, include)
    assert complete == any(string in text for string in strings)
    for more in ("", "a", "b\n", *strings):
        later, _ = kept_bytes((text + more).encode(), strings, include)
        assert later == keep if complete else later >= keep


def test_a_tokenizer_with_an_added_token_beyond_the_model(tmp_path):
    """Gemma 3 1B: what loads and generates takes stop strings and delimiters too."""
    made = tokenizer_json()
    made["added_tokens"].append(made["added_tokens"][-1] | {"id": VOCAB, "content": "<image>"})
    folder = write_folder(tmp_path / "m")
    (folder / "tokenizer.json").write_text(json.dumps(made))
    bundle = jaxlm.load(folder)
    assert bundle.tokenizer.size == VOCAB + 1 == bundle.lm.config.vocab_size + 1
    tokens = bundle.tokenizer.encode("ab\nA:c", special=False)
    answer = generate(bundle, "go", sampler=Script(jnp.asarray(tokens)), stop="A:",
                      max_new_tokens=len(tokens))
    assert (answer.finish, answer.text) == ("string", "ab\n")
    rule = text_rule(bundle, delimiters=["\n"])
    match, held = jnp.zeros((1, 2), jnp.int32), []
    for token in tokens:
        match, _, held_B = rule.step(match, jnp.array([token]))
        held.append(bool(held_B[0]))
    assert held == [False, False, True, False, False, False]
