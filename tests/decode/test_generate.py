"""generate and stream: what may not change the text does not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache.dense import Dense
from jaxlm.cache.squat import Squat
from jaxlm.core.errors import NumericsError
from jaxlm.core.mesh import make_mesh
from jaxlm.decode import state as functions
from jaxlm.decode.generate import generate, stream
from jaxlm.decode.samplers import Greedy, Temperature
from jaxlm.decode.state import Stop
from jaxlm.hf.bundle import load
from tests.decode.steps import Script
from tests.tiny import model

PROMPTS = ["Hello", "a much longer prompt than the others", "x", "naïve ✓"]
KEYS = jax.random.split(jax.random.key(3), len(PROMPTS))
WARM = Temperature(1.0)


def same(one, other):
    """Tokens and finish equal, log-probabilities to rounding."""
    assert one.tokens == other.tokens and one.finish == other.finish and one.text == other.text
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.fixture(scope="module")
def answers(bundle):
    return generate(bundle, PROMPTS, max_new_tokens=10, sampler=WARM, key=KEYS)


def test_a_batch_equals_batches_of_one(bundle, answers):
    for row, prompt in enumerate(PROMPTS):
        alone = generate(bundle, prompt, max_new_tokens=10, sampler=WARM, key=KEYS[row: row + 1])
        same(alone, answers[row])


def test_padding_and_neighbours_change_nothing(bundle, answers):
    long = "y" * 90  # pads the others to three times their width
    wide = generate(bundle, [*PROMPTS[:2], long], max_new_tokens=10, sampler=WARM,
                    key=jnp.concatenate([KEYS[:2], KEYS[:1]]), max_len=200)
    for found, expected in zip(wide[:2], answers[:2], strict=True):
        same(found, expected)


def test_same_key_same_text_and_another_key_another(bundle, answers):
    again = generate(bundle, PROMPTS, max_new_tokens=10, sampler=WARM, key=KEYS)
    assert [a.tokens for a in again] == [a.tokens for a in answers]
    other = generate(bundle, PROMPTS, max_new_tokens=10, sampler=WARM, key=jax.random.key(9))
    assert all(a.tokens != b.tokens for a, b in zip(other, answers, strict=True))
    one = [generate(bundle, PROMPTS, max_new_tokens=10, sampler=WARM, key=jax.random.key(9))
           for _ in range(2)]
    assert one[0][2].tokens == one[1][2].tokens == other[2].tokens


def test_ids_and_text_are_the_same_prompt(bundle, answers):
    ids = [bundle.tokenizer.encode(prompt) for prompt in PROMPTS]
    for given in (ids, [np.asarray(i) for i in ids], tuple(map(tuple, ids))):
        for found, expected in zip(
            generate(bundle, given, max_new_tokens=10, sampler=WARM, key=KEYS), answers, strict=True
        ):
            same(found, expected)
    array = np.asarray([ids[0], ids[0]])
    rows = generate(bundle, array, max_new_tokens=2)
    assert len(rows) == 2
    same(rows[0], generate(bundle, jnp.asarray(ids[0]), max_new_tokens=np.int64(2)))


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_stream_equals_generate(bundle, answers, chunk):
    pieces = list(stream(bundle, PROMPTS, max_new_tokens=10, sampler=WARM, key=KEYS, chunk=chunk))
    assert len(pieces) <= -(-10 // chunk)
    assert ["".join(texts) for texts in zip(*pieces, strict=True)] == [a.text for a in answers]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_a_character_that_spans_tokens_is_held_back_until_it_is_whole(bundle, chunk):
    text = "é日本語🎉 ok ✓"
    ids = bundle.tokenizer.encode(text)
    assert len(ids) > len(text)
    script = Script(jnp.asarray(ids))
    pieces = list(stream(bundle, "go: ", max_new_tokens=len(ids), sampler=script, chunk=chunk))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert generate(bundle, "go: ", max_new_tokens=len(ids), sampler=script).text == text


def test_a_prompt_that_ends_inside_a_character(bundle):
    ids = bundle.tokenizer.encode("né")
    answer = generate(bundle, ids[:2], max_new_tokens=2, sampler=Script(jnp.asarray([ids[2], 33])))
    assert answer.prompt + answer.text == "né" + bundle.tokenizer.decode([33])


def test_a_stop_id_ends_the_text_and_is_kept_as_a_token(bundle):
    script = Script(jnp.asarray([10, 11, 12, 13]))
    answer = generate(bundle, "x", max_new_tokens=4, sampler=script, stop_ids=[12])
    assert answer.tokens == (10, 11, 12) and answer.finish == "stop"
    assert answer.text == bundle.tokenizer.decode([10, 11])
    free = generate(bundle, "x", max_new_tokens=4, sampler=script, stop_ids=[])
    assert free.tokens == (10, 11, 12, 13) and free.finish == "length"
    own = Script(jnp.asarray([10, *bundle.stop_ids, 12, 13]))
    assert generate(bundle, "x", max_new_tokens=4, sampler=own).finish == "stop"


def test_a_sweep_compiles_once():
    """Over temperature, one for all or one a row, and over the number of new tokens."""
    lm, params = model()
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=2)  # one a shape of temperature: (), (B,)
    def run(temperature, count):
        sampler = Temperature(temperature)
        tokens, lengths = jnp.ones((2, 4), jnp.int32), jnp.array([4, 2])
        keys = jax.random.split(jax.random.key(0), 2)
        state = functions.prefill(lm, params, sampler, tokens, lengths, Dense(), 16, keys)
        return functions.decode(lm, params, sampler, state, Stop(), count).tokens_BS

    texts = {tuple(run(jnp.float32(t), 6)[0].tolist()) for t in (0.0, 0.5, 1.0, 3.0)}
    for rows in ([0.0, 1.0], [2.0, 0.3], [1.0, 1.0]):
        run(jnp.array(rows), 4)
    assert len(texts) > 1


def test_the_front_door_compiles_once_a_sweep(bundle):
    from jaxlm.decode import generate as module

    sweep = [Temperature(t) for t in (0.0, 0.4, 1.1)]
    generate(bundle, PROMPTS, max_new_tokens=5, sampler=Temperature(0.7))
    before = module.decode_jit._cache_size(), module.prefill_jit._cache_size()
    for sampler in sweep:
        generate(bundle, PROMPTS, max_new_tokens=5, sampler=sampler)
    assert (module.decode_jit._cache_size(), module.prefill_jit._cache_size()) == before


def test_a_cold_row_is_greedy(bundle):
    cold = generate(bundle, PROMPTS, max_new_tokens=8, sampler=Temperature(0.0))
    mixed = generate(bundle, PROMPTS, max_new_tokens=8, key=KEYS,
                     sampler=Temperature(jnp.array([0.0, 1.0, 0.0, 1.0])))
    greedy = generate(bundle, PROMPTS, max_new_tokens=8, sampler=Greedy())
    for row in range(4):
        same(cold[row], greedy[row])
        assert (mixed[row].tokens == greedy[row].tokens) is (row % 2 == 0)


@pytest.mark.parametrize("axes", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 4}], ids=str)
def test_eight_devices_equal_one(tiny_folder, bundle, answers, axes):
    spread = load(tiny_folder, mesh=make_mesh(**axes))
    kernel = spread.params["layers_0"]["attn"]["q"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
    found = generate(spread, PROMPTS, max_new_tokens=10, sampler=WARM, key=KEYS)
    for one, other in zip(found, answers, strict=True):
        same(one, other)


def test_a_quantised_cache_on_eight_devices_equals_one(tiny_folder, bundle):
    kind = Squat(group=8, window=8, block=4)
    long = [prompt + " and so on and on" for prompt in PROMPTS]
    spread = load(tiny_folder, mesh=make_mesh(data=4, tensor=2))
    alone, found = (generate(model, long, max_new_tokens=20, sampler=WARM, key=KEYS, cache=kind)
                    for model in (bundle, spread))
    for one, other in zip(found, alone, strict=True):
        same(one, other)


def test_numbers_that_are_not_finite_are_an_error(bundle):
    broken = jax.tree.map(lambda x: x * jnp.nan, bundle.params)
    for run in (lambda: generate(bundle.replace(params=broken), "x", max_new_tokens=3),
                lambda: list(stream(bundle.replace(params=broken), "x", max_new_tokens=3))):
        with pytest.raises(NumericsError, match="row 0.*NaN or infinite.*check the weights"):
            run()
