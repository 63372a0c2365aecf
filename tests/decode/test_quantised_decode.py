"""Models over quantised caches: the loop, shared prompts, a mesh, what compilers make of it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlm.cache import Dense, Kivi, ReferenceSquat, RotatedSquat, Squat
from jaxlm.cache.base import broken_layer
from jaxlm.cache.shared import Shared, SharedState
from jaxlm.core.mesh import make_mesh
from jaxlm.decode.placement import state_shardings
from jaxlm.decode.rows import fork, gather, repeat
from jaxlm.decode.samplers import Categorical, Greedy
from jaxlm.decode.state import decode, decode_step, prefill
from jaxlm.decode.stop import NEVER
from tests.decode.tiny import DECODE, EXTEND, PREFILL, VOCAB, prompts, tiny_model

SMALL = dict(group=8, window=8)
SQUAT8 = Squat(8, 8, **SMALL, block=2)
TIME, SLOTS = 40, 72


def begin(lm, params, cache, rows=3, sampler=Greedy(), slots=SLOTS):
    """Prefilled rows of 40, 4 and 7 tokens, ..."""
    tokens, lengths = prompts(rows, TIME, seed=2)
    keys = jax.random.split(jax.random.key(5), rows)
    return PREFILL(lm, params, sampler, tokens, lengths, cache, slots, keys)


def test_a_mix_of_kinds_follows_the_dense_cache_and_pieces_change_nothing():
    """One loop, the same loop in pieces, and single steps: the same text, bit for bit."""
    lm, params = tiny_model(num_layers=3)
    mixed = (Kivi(8, 8, **SMALL), Dense(), SQUAT8)
    dense, whole, pieces, single = (begin(lm, params, c) for c in (Dense(), mixed, mixed, mixed))
    np.testing.assert_allclose(whole.logits_BV, dense.logits_BV, atol=1e-5)  # prompts are exact
    dense, whole = (DECODE(lm, params, Greedy(), s, NEVER, 24) for s in (dense, whole))
    for count in (5, 1, 11, 7):
        pieces = DECODE(lm, params, Greedy(), pieces, NEVER, count)
    step = jax.jit(decode_step, static_argnums=0)
    for _ in range(24):
        single = step(lm, params, Greedy(), single)
    for other in (pieces, single):
        np.testing.assert_array_equal(whole.tokens_BS, other.tokens_BS)
        np.testing.assert_allclose(whole.logits_BV, other.logits_BV, atol=1e-5)
    assert whole.caches[0]["packed_B"].tolist() == [56, 24, 24]
    same = np.asarray(whole.tokens_BS == dense.tokens_BS)
    assert same[0, :TIME + 8].all(), "8-bit codes changed the first greedy tokens"


def test_a_row_that_outgrows_its_cache_keeps_its_text_and_codes():
    lm, params = tiny_model()
    state = begin(lm, params, SQUAT8)
    more = jax.random.randint(jax.random.key(4), (3, 40), 0, VOCAB)
    grown, _ = EXTEND(lm, params, state, more, jnp.array([40, 40, 0]))
    assert bool(jnp.isnan(grown.logits_BV[0]).all())
    assert grown.length_B.tolist() == [TIME, 4 + 40, 7]
    for old, new in zip(jax.tree.leaves(state.caches), jax.tree.leaves(grown.caches), strict=True):
        np.testing.assert_array_equal(old[0], new[0])


def test_shared_prompts_equal_copied_ones_until_groups_start():
    """Own tokens begin groups of their own; at 8 bits that moves logits by little."""
    lm, params = tiny_model()
    hot = Categorical(0.9)
    one = begin(lm, params, SQUAT8, sampler=hot, slots=TIME)
    two = begin(lm, params, SQUAT8, sampler=hot)
    shared, copied = fork(lm, params, one, 4, 32), repeat(two, 4)
    rows = [cache.own["sketch"].rows for cache in shared.caches]
    assert all(bool((m != 0).any()) for m in rows), "suffixes code keys by the prompts' queries"
    ancestors = jnp.array([[0, 0, 2, 3], [3, 3, 3, 3], [1, 0, 3, 2]])
    for count in (4, 20):
        text = jax.random.randint(jax.random.key(count), (12, count), 0, VOCAB)
        shared, copied = (gather(EXTEND(lm, params, s, text, jnp.full(12, count))[0], ancestors)
                          for s in (shared, copied))
        spread = float(copied.logits_BV.std())
        np.testing.assert_allclose(shared.logits_BV, copied.logits_BV, atol=0.1 * spread)
    assert shared.caches[0].own["packed_B"].tolist() == [16] * 12
    shared, copied = (DECODE(lm, params, hot, s, NEVER, 1) for s in (shared, copied))
    np.testing.assert_allclose(shared.logprob_BS.sum(1), copied.logprob_BS.sum(1), atol=0.2)


def test_what_a_fork_inherits_outlives_the_first_piece_of_several_tokens():
    """At 2 bits; the rows' own length of 0 does not make them rows that know no queries."""
    lm, params = tiny_model(num_layers=1)
    prompt = begin(lm, params, Squat(2, 2, **SMALL, block=2), slots=TIME)
    text = jax.random.randint(jax.random.key(4), (6, 5), 0, VOCAB)
    more, _ = EXTEND(lm, params, fork(lm, params, prompt, 2, 32), text, jnp.full(6, 5))
    assert bool(prompt.caches[0]["sketch"].rows.any())
    for old, new in zip(prompt.caches[0]["sketch"], more.caches[0].own["sketch"], strict=True):
        np.testing.assert_array_equal(jnp.repeat(old, 2, 0), new)


@pytest.mark.parametrize("kind", [Squat(**SMALL, block=2), ReferenceSquat(**SMALL, block=2, rank=3),
                                  Squat(**SMALL, block=2, half_life=16)])
def test_empty_rows_learn_all_from_their_first_piece_unless_they_inherited(kind):
    spec = tiny_model()[0].config.attention(0)
    q = jax.random.normal(jax.random.key(0), (2, 5, 4, 8))
    state = kind.init(spec, 2, 32, jnp.float32)
    read = lambda known, q: kind.read_queries(spec, state | {kind.learnt: known}, q,
                                              jnp.zeros(2, int), jnp.full(2, 5))[kind.learnt]
    close = lambda a, b: all(jax.tree.leaves(jax.tree.map(
        lambda x, y: np.allclose(x, y, atol=1e-6), a, b)))
    first, other = read(state[kind.learnt], q), read(state[kind.learnt], q[::-1])
    assert not close(first, other) and not close(first, state[kind.learnt])
    if kind.half_life is None:
        assert close(read(first, q[::-1]), first)
    else:  # moves on from what it had, a share of it
        assert not close(read(first, q[::-1]), first)
        assert not close(read(first, q[::-1]), other)


@pytest.mark.parametrize("prompt, own", [
    (Squat(**SMALL), RotatedSquat(**SMALL)), (RotatedSquat(**SMALL), Squat(**SMALL)),
    (Squat(**SMALL, rope="before"), Squat(**SMALL)), (Squat(**SMALL, lam=1.0), Squat(**SMALL)),
    (Squat(**SMALL), ReferenceSquat(**SMALL)), (Kivi(**SMALL), Squat(**SMALL))])
def test_a_fork_inherits_nothing_that_was_learnt_otherwise(prompt, own):
    """Turned keys compensated by queries that were not turned, for one, are worse than plain."""
    spec = tiny_model()[0].config.attention(0)
    filled = jax.tree.map(jnp.ones_like, prompt.init(spec, 3, 32, jnp.float32))
    forked = SharedState(filled, filled, jnp.ones(3, int)), Shared(Dense(), prompt)
    for state, kind in ((filled, prompt), forked):
        found = own.inherit(own.init(spec, 6, 32, jnp.float32), state, 2, kind)
        assert not bool(jax.tree.leaves(found[own.learnt])[0].any())
        if isinstance(prompt, Squat):
            found = prompt.inherit(prompt.init(spec, 6, 32, jnp.float32), state, 2, kind)
            assert bool(jax.tree.leaves(found["sketch"])[0].all())


@pytest.mark.parametrize("cache", [Dense(), Kivi(2, 2, **SMALL, scales="int8")])
def test_a_broken_layer_is_named(cache):
    lm, params = tiny_model(num_layers=3)
    assert broken_layer(begin(lm, params, cache).caches) is None
    broken = jax.tree.map(lambda x: x, params)
    kernel = broken["layers_1"]["attn"]["k"]["kernel"]
    broken["layers_1"]["attn"]["k"]["kernel"] = kernel.at[0].set(jnp.nan)
    state = begin(lm, broken, cache)
    assert broken_layer(state.caches) == 1 and bool(jnp.isnan(state.logits_BV).all())


@pytest.mark.parametrize("own_mesh", [False, True])
def test_kv_heads_over_eight_devices_need_no_collective(own_mesh):
    """Step and flush of sharded heads, as XLA compiles them: devices do not speak."""
    lm, _ = tiny_model(num_heads=16, num_kv_heads=8)
    spec, mesh, batch = lm.config.attention(0), make_mesh(tensor=8), 2
    kind = Squat(**SMALL, block=4, mesh=mesh if own_mesh else None)
    where = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    given = lambda tree, place: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), tree)
    state = given(jax.eval_shape(lambda: kind.init(spec, batch, 128, jnp.float32)),
                  lambda x: where(None, "tensor") if x.ndim > 1 else where())
    heads = [jax.ShapeDtypeStruct((batch, 1, n, 8), jnp.float32,
                                  sharding=where(None, None, "tensor")) for n in (16, 8, 8)]
    row = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=where())
    step = jax.jit(lambda *args: kind.step(spec, *args), donate_argnums=0)
    flush = jax.jit(lambda state, at: kind.flush(spec, state, True, at), donate_argnums=0)
    for compiled in (step.lower(state, *heads, row, row).compile(),
                     flush.lower(state, row).compile()):
        found = re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter",
                           compiled.as_text())
        assert not found, found


def compiled_loop(lm, cache, batch, slots, dtype=jnp.bfloat16, place=None):
    """The decode loop over a state of `slots` tokens a row, and the bytes of its codes."""
    params = lm.shapes(dtype)
    tokens = jax.ShapeDtypeStruct((batch, 128), jnp.int32)
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    state = jax.eval_shape(lambda p, t, n, k: prefill(lm, p, Greedy(), t, n, cache, slots, k),
                           params, tokens, rows, keys)
    put = lambda tree: tree if place is None else jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
    loop = jax.jit(lambda p, s, n: decode(lm, p, Greedy(), s, max_new=n), donate_argnums=1)
    compiled = loop.lower(*put((params, state, jax.ShapeDtypeStruct((), jnp.int32)))).compile()
    return compiled, state.caches[0]["packed"].k_words


def copies_of(compiled, words):
    """Copies of an array of the codes' shape in the compiled program."""
    shape = re.escape(f"s32[{','.join(map(str, words.shape))}]")
    return re.findall(rf"= {shape}\S* copy\(", compiled.as_text())


@pytest.mark.slow
def test_the_decode_loop_never_copies_or_unpacks_the_codes():
    lm, _ = tiny_model(head_dim=64, num_heads=4, num_kv_heads=2)
    compiled, words = compiled_loop(lm, Squat(), 4, 8192, jnp.float32)
    whole = 4 * 2 * 8192 * 64 * 4  # float32 keys of one layer
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 2
    assert not copies_of(compiled, words)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_decode_loop_on_a_tpu_never_copies_the_codes(head_dim):
    from jaxlm.core.targets import target

    chip = target("v5e:1x1").devices[0]
    lm, _ = tiny_model(dim=256, head_dim=head_dim, num_heads=8, num_kv_heads=2, num_layers=2)
    kind = Squat(mesh=make_mesh(devices=[chip]))
    compiled, words = compiled_loop(lm, kind, 8, 32768, place=SingleDeviceSharding(chip))
    assert words.shape[-1] == 128 and words.shape[1] * 128 == 2 * head_dim
    assert "tpu_custom_call" in compiled.as_text()
    codes = words.size * 4
    assert compiled.memory_analysis().temp_size_in_bytes < codes
    assert not copies_of(compiled, words)


@pytest.mark.slow
def test_layers_on_a_tpu_take_turns_with_their_matrices():
    """A flush works with matrices of H x H a row and head: of one layer, not of all at once."""
    from jaxlm.core.targets import target

    chip = target("v5e:1x1").devices[0]
    kind, used = Squat(mesh=make_mesh(devices=[chip])), []
    for layers in (2, 5):
        lm, _ = tiny_model(dim=256, head_dim=128, num_heads=4, num_kv_heads=2, num_layers=layers)
        compiled, _ = compiled_loop(lm, kind, 64, 1024, place=SingleDeviceSharding(chip))
        used.append(compiled.memory_analysis().temp_size_in_bytes)
    matrix = 64 * 2 * 128 * 128 * 4
    assert used[1] - used[0] < 3 * matrix  # it was two matrices a layer, and more


@pytest.mark.slow
def test_layers_on_a_tpu_take_turns_to_code_a_prompt():
    """Keys, values and what codes them are held of one layer, whatever the number of layers."""
    from jaxlm.core.targets import target

    chip, rows, length, used = target("v5e:1x1").devices[0], 16, 1024, []
    place = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=SingleDeviceSharding(chip)), tree)
    kind = Squat(mesh=make_mesh(devices=[chip]))
    for layers in (2, 6):
        lm, _ = tiny_model(dim=256, head_dim=128, num_heads=4, num_kv_heads=2, num_layers=layers)
        read = lambda params, tokens, lengths, keys, lm=lm: prefill(
            lm, params, Greedy(), tokens, lengths, kind, length + 64, keys)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        inputs = (lm.shapes(jnp.bfloat16), jax.ShapeDtypeStruct((rows, length), jnp.int32),
                  jax.ShapeDtypeStruct((rows,), jnp.int32), keys)
        compiled = jax.jit(read).lower(*place(inputs)).compile()
        used.append(compiled.memory_analysis().temp_size_in_bytes)
    keys_and_values = 2 * rows * length * 2 * 128 * 2
    assert used[1] - used[0] < 4 * keys_and_values  # three; it was ten before they took turns


def test_a_prompt_is_read_as_without_codes():
    """Logits and their gradient are those of a dense cache: a prompt attends in full precision."""
    lm, params = tiny_model()
    tokens, lengths = jax.random.randint(jax.random.key(1), (2, 70), 0, VOCAB), jnp.array([70, 41])
    keys = jax.random.split(jax.random.key(2), 2)

    @partial(jax.jit, static_argnames="kind")
    def read(params, lengths, kind):
        logits = prefill(lm, params, Greedy(), tokens, lengths, kind, 80, keys).logits_BV
        return jnp.sin(logits).sum(), logits

    slope = jax.value_and_grad(read, has_aux=True)
    (_, want), dense = slope(params, lengths, Dense())
    for kind in (Kivi(**SMALL), Squat(**SMALL, block=4)):
        (_, logits), coded = slope(params, lengths, kind)
        np.testing.assert_allclose(logits, want, atol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), coded, dense)
        short = read(params, lengths.astype(jnp.int16), kind)[1]
        np.testing.assert_array_equal(short, read(params, lengths, kind)[1])


def test_cache_shardings_follow_rows_and_heads():
    """Every leaf of a quantised state is split as its rows and kv heads are."""
    lm, params = tiny_model(num_heads=16, num_kv_heads=8)
    state = jax.eval_shape(lambda: begin(lm, params, Squat(**SMALL, block=4), rows=2))
    places = state_shardings(state, 8, make_mesh(tensor=8))
    for leaf, place in zip(jax.tree.leaves(state.caches), jax.tree.leaves(places.caches),
                           strict=True):
        assert place.spec[1:2] == (("tensor",) if leaf.ndim > 1 else ()), (leaf.shape, place)
