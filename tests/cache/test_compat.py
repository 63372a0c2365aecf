"""The reference's policy as a cache kind: names, refusals, pieces, the decode loop, forks.

Its numbers are held to the reference's in tests/pallas_kernels/test_squat_attention.py.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache import Dense, ReferenceKivi, ReferenceSquat, Squat
from jaxlm.cache.parse import cache_name, parse_cache
from jaxlm.core.errors import ConfigError
from jaxlm.decode.rows import fork
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import decode_step
from jaxlm.decode.stop import NEVER
from jaxlm.models.config import Rope
from pallas_kernels.quant_decode_attention.reference import dequantise
from tests.cache.contract import Contract
from tests.cache.test_quantised import SPEC, Rows, gap, text
from tests.decode.tiny import DECODE, PREFILL, prompts, tiny_model

SMALL = dict(group=8, window=16, block=4)
KIND = ReferenceSquat(4, 4, **SMALL, rank=6, lam=0.1)


@pytest.mark.slow
class TestCompatContract(Contract):
    kind = ReferenceSquat(8, 8, group=8, window=8, block=4, rope="before")
    exact, tolerance = False, 0.02
    test_what_overflows_is_dropped = None  # its docstring says so


@pytest.mark.parametrize("name", ["kivi2:compat=reference", "squat2v4:compat=reference",
                                  "squat4:compat=reference,rope=before,block=32,lam=10.0,rank=None"
                                  ])
def test_names_round_trip(name):
    kind = parse_cache(name)
    assert parse_cache(cache_name(kind)) == kind and "compat=reference" in cache_name(kind)
    assert kind.flush_every == 1 and kind.scales == "float32"


@pytest.mark.parametrize("name, message", [
    ("rkivi2:compat=reference", "compat=reference"), ("squat2:compat=other", "compat=reference"),
    ("squat2:compat=reference,guard=true", "guard is True"),
    ("squat2:compat=reference,half_life=9", "half_life is 9|lam_mode"),
    ("squat2:compat=reference,implementation=tpu", "implementation is 'tpu'"),
    ("kivi2:compat=reference,shrinks=1.0/0.9", "shrinks"),
    ("kivi2:compat=reference,block=4", "no field 'block'")])
def test_what_the_reference_lacks_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        parse_cache(name)


def test_keys_go_by_the_window_and_values_one_by_one():
    rows = Rows(KIND, lengths=[50, 21, 3])
    assert rows.state["coded_B"].tolist() == [48, 16, 0]
    for _ in range(14):
        rows.step(1, every=1)
        at = np.asarray(rows.at)
        np.testing.assert_array_equal(rows.state["coded_B"], at // 16 * 16)
        np.testing.assert_array_equal(rows.state["packed_B"], np.maximum(at - 16, 0))
    exact = Rows(Dense(), lengths=[50, 21, 3])
    exact.step(14)
    assert 1e-4 < gap(jnp.stack(rows.outs), jnp.stack(exact.outs)) < 0.12


def test_a_text_in_pieces_is_coded_as_in_one():
    """Without queries to learn from; and a piece that begins a row is learnt from."""
    kind = ReferenceKivi(2, 2, group=8, window=16)
    one, two = (Rows(kind, lengths=n) for n in ([50, 50, 50], [10, 21, 1]))
    two.extend(49, [40, 29, 49])
    for name in ("coded_B", "packed_B", "k", "v"):
        np.testing.assert_allclose(one.state[name], two.state[name], atol=1e-6)
    coded = [dequantise(rows.state["packed"], kind.format) for rows in (one, two)]
    for a, b in zip(*coded, strict=True):
        np.testing.assert_allclose(a[:, :, :48], b[:, :, :48], atol=1e-6)
    prompt, piece = Rows(KIND, lengths=[50, 50, 50]), Rows(KIND, lengths=[50, 50, 50])
    piece.state = jax.tree.map(jnp.zeros_like, piece.state)
    piece.at = jnp.zeros(3, jnp.int32)
    piece.extend(50, [50, 50, 50])
    np.testing.assert_allclose(piece.state["moves"], prompt.state["moves"], atol=1e-4)
    assert bool((prompt.state["moves"] != 0).any())
    np.testing.assert_allclose(piece.step(2, every=1), prompt.step(2, every=1), atol=1e-4)


def test_a_fork_codes_by_the_matrices_of_its_prompt_and_the_loop_equals_single_steps():
    lm, params = tiny_model(num_layers=2)
    tokens, lengths = prompts(2, 40, seed=2)
    begin = lambda kind: PREFILL(lm, params, Greedy(), tokens, lengths, kind, 72,
                                 jax.random.split(jax.random.key(5), 2))
    whole = single = begin(KIND)
    whole = DECODE(lm, params, Greedy(), whole, NEVER, 24)
    step = jax.jit(decode_step, static_argnums=0)
    for _ in range(24):
        single = step(lm, params, Greedy(), single)
    np.testing.assert_array_equal(whole.tokens_BS, single.tokens_BS)
    np.testing.assert_allclose(whole.logits_BV, single.logits_BV, atol=1e-5)
    assert whole.caches[0]["coded_B"].tolist() == [64, 16]
    forked = fork(lm, params, begin(KIND), 2, 24)
    own = forked.caches[0].own
    np.testing.assert_array_equal(own["moves"], jnp.repeat(whole.caches[0]["moves"], 2, 0))
    assert DECODE(lm, params, Greedy(), forked, NEVER, 20).length_B.tolist() == [60, 60, 24, 24]
    mixed = fork(lm, params, begin(Squat(4, 4, group=8, window=8)), 2, 24, KIND)
    assert not bool(mixed.caches[0].own["moves"].any())  # a sketch is no matrix


def test_queries_alike_are_served():
    """Power: the matrix does what it is for, on keys coded after the prompt."""
    q, k, v = text(seed=3)
    still = replace(SPEC, rope=Rope(theta=1e12, factor=1e6, kind="linear"))  # no rotation
    basis = jax.random.normal(jax.random.key(9), (3, q.shape[-1]))
    q = jax.random.normal(jax.random.key(8), (*q.shape[:3], 3)) @ basis
    errors = []
    for lam in (0.0, 10.0):
        kind = ReferenceSquat(2, 2, **SMALL, rank=3, lam=lam)
        rows = Rows(kind, still, (q, k, v), [50, 50, 50])
        rows.step(30, every=1)
        miss = dequantise(rows.state["packed"], kind.format)[0][:, :, 48:80] - k[
            :, 48:80].swapaxes(1, 2)
        errors.append(float(jnp.linalg.norm(jnp.einsum("rh,bksh->bksr", basis, miss))))
    assert errors[1] < 0.7 * errors[0], errors
